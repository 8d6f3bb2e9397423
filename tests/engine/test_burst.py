"""Tokens chosen by the device, ahead of the host: the same answers as step by step."""

from __future__ import annotations

import numpy as np
import pytest
from fake_runner import (
    N_VOCAB,
    FakeDecodingRunner,
    FakeRunner,
    add,
    check_pages,
    drain,
    expected,
    ids,
    make_engine,
    prompt,
    run,
    scripted,
)

from headrace.backend import DecodingRunner
from headrace.engine.burst import MAX_STEPS
from headrace.errors import DeviceError
from headrace.sampling import SamplingParams

HOT = SamplingParams(temperature=1.0, seed=3, presence_penalty=0.5)


def device_engine(**options: int):
    runner = FakeDecodingRunner()
    return make_engine(runner, **options), runner


def test_which_runners_choose() -> None:
    assert isinstance(FakeDecodingRunner(), DecodingRunner)
    assert not isinstance(FakeRunner(), DecodingRunner)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), HOT])
def test_one_sequence(params: SamplingParams) -> None:
    engine, runner = device_engine()
    done = run(engine, prompt(30), max_tokens=200, sampling=params)
    assert done.generated == expected(prompt(30), 200, params)
    assert done.finish_reason == "length"
    assert len(runner.batches) == 1  # the prompt: all else was the device's
    assert max(burst.n_steps for burst in runner.bursts) <= MAX_STEPS
    assert done.sampler.n_sampled == 200


def test_sequences_join_and_leave() -> None:
    engine, runner = device_engine(n_pages=40)
    first = [add(engine, prompt(20 + i, i), max_tokens=40 + 9 * i, sampling=HOT) for i in range(3)]
    for _ in range(12):
        engine.step()
        check_pages(engine)
    late = add(engine, prompt(70, 9), max_tokens=30, sampling=HOT)
    drain(engine)
    for i, sequence in enumerate(first):
        assert sequence.generated == expected(prompt(20 + i, i), 40 + 9 * i, HOT)
    assert late.generated == expected(prompt(70, 9), 30, HOT)
    assert {burst.n_rows for burst in runner.bursts} >= {3, 4}


def test_a_newcomer_waits_only_for_steps_under_way() -> None:
    engine, runner = device_engine()
    add(engine, prompt(10), max_tokens=60)
    for _ in range(3):
        engine.step()
    late = add(engine, prompt(10, 1), max_tokens=5)
    for _ in range(runner.AHEAD + 1):
        engine.step()
    assert late.n_computed >= 10


def test_an_end_found_late_leaves_no_trace() -> None:
    """Steps started too many wrote beyond what the sequence holds: the next turn is as if alone."""
    runner = FakeDecodingRunner(scripted({"a question": "its answer", "other": "thing"}))
    engine = make_engine(runner, n_pages=16)
    done = run(engine, ids("a question"))
    assert (done.finish_reason, bytes(t - 3 for t in done.generated)) == ("stop", b"its answer")
    assert runner.bursts[0].n_steps <= len("its answer") + runner.AHEAD
    assert bytes(t - 3 for t in run(engine, ids("other")).generated) == b"thing"
    again = run(engine, ids("a question"))
    assert again.generated == done.generated
    assert again.n_cached == len(ids("a question")) - 2


def test_cancelled_in_mid_burst() -> None:
    engine, _ = device_engine()
    gone, stays = add(engine, prompt(9), max_tokens=50), add(engine, prompt(9, 1), max_tokens=50)
    for _ in range(7):
        engine.step()
    engine.cancel(gone)
    check_pages(engine)
    drain(engine)
    assert gone.finish_reason == "cancelled"
    assert gone.generated == expected(prompt(9), 50)[: gone.n_generated]
    assert stays.generated == expected(prompt(9, 1), 50)


def test_logits_end_the_burst_first() -> None:
    engine, _ = device_engine(n_pages=40)
    sequence = add(engine, prompt(9), max_tokens=50)
    for _ in range(5):
        engine.step()
    assert engine.logits(prompt(4, 2)).shape == (4, N_VOCAB)
    drain(engine)
    assert sequence.generated == expected(prompt(9), 50)


def test_few_pages_shorten_bursts_and_take_nobodys() -> None:
    engine, _ = device_engine(context=256, n_pages=4)
    sequences = [add(engine, prompt(60, i), max_tokens=150, sampling=HOT) for i in range(3)]
    drain(engine)
    for i, sequence in enumerate(sequences):
        assert sequence.generated == expected(prompt(60, i), 150, HOT)
    assert engine.scheduler.n_preempted


@pytest.mark.parametrize("how", [{"sampling": SamplingParams(top_k=1)}, {"mask": None}])
def test_what_the_device_cannot_choose_the_host_does(how: dict) -> None:
    engine, runner = device_engine()
    if "mask" in how:
        how = {"mask": lambda generated: np.arange(N_VOCAB) % 2 == 1}
    add(engine, prompt(9), max_tokens=20, **how)
    drain(engine)
    assert not runner.bursts
    assert len(runner.batches) == 20


def test_a_fault_in_a_burst_ends_its_sequences_and_no_others() -> None:
    engine, runner = device_engine(n_pages=40, max_sequences=2)
    doomed = [add(engine, prompt(9, i), max_tokens=50) for i in range(2)]
    waiting = add(engine, prompt(9, 2), max_tokens=20)
    for _ in range(4):
        engine.step()

    def fail() -> None:
        runner.bursts[-1].ended = True
        runner.before_choice = lambda: None
        raise DeviceError("the card fell off the bus")

    runner.before_choice = fail
    drain(engine)
    for sequence in doomed:
        assert sequence.finish_reason == "error"
        assert "fell off the bus" in str(sequence.error)
    assert waiting.generated == expected(prompt(9, 2), 20)
