"""The life of a request: cancelled, failed, refused. Nothing of it may touch the others."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_runner import (
    N_VOCAB,
    FakeRunner,
    add,
    check_pages,
    drain,
    expected,
    hashed_logits,
    ids,
    make_engine,
    prompt,
    run,
    scripted,
)

from headrace.errors import DeviceError, RequestError
from headrace.sampling import SamplingParams


class TestCancel:
    def test_a_thousand_aborts_and_every_page_is_free(self) -> None:
        runner = FakeRunner()
        runner.logits = lambda context: hashed_logits(context[-1:])
        engine = make_engine(runner, n_pages=40, max_sequences=6, chunk=40)
        rng = random.Random(0)
        live: list = []
        n_aborts = 0
        while n_aborts < 1000:
            live.append(add(engine, prompt(rng.randint(1, 300), rng.randint(0, 9))))
            for _ in range(rng.randint(0, 3)):
                engine.step()
            while len(live) > rng.randint(0, 8):
                victim = live.pop(rng.randrange(len(live)))
                engine.cancel(victim)
                engine.cancel(victim)
                assert victim.events[-1].finish_reason == "cancelled"
                assert not victim.pages
                n_aborts += 1
            check_pages(engine)
        for sequence in live:
            engine.cancel(sequence)
        assert engine.pool.n_held == 0
        assert engine.pool.n_free + engine.pool.n_cached == 40
        assert (engine.n_running, engine.n_waiting) == (0, 0)
        tokens = prompt(500, seed=99)
        runner.logits = hashed_logits
        assert run(engine, tokens, max_tokens=50).generated == expected(tokens, 50)

    def test_during_a_step_of_another_thread(self) -> None:
        runner = FakeRunner()
        engine = make_engine(runner)
        sequence, other = add(engine, prompt(5)), add(engine, prompt(6), max_tokens=4)

        def cancel(batch) -> None:
            # As if from another thread: the lock is taken, so this must neither wait nor free
            # pages that the step is writing.
            runner.before_step = lambda batch: None
            engine.cancel(sequence)
            engine.cancel(sequence)
            assert sequence.pages

        runner.before_step = cancel
        engine.step()
        assert sequence.finish_reason == "cancelled"
        assert not sequence.pages
        drain(engine)
        assert other.generated == expected(prompt(6), 4)

    def test_cancelled_text_is_what_was_shown(self) -> None:
        engine = make_engine(FakeRunner(scripted({"q": "hello ST..."})))
        sequence = add(engine, ids("q"), stop=("STOP",))
        for _ in range(8):
            engine.step()
        engine.cancel(sequence)
        assert sequence.completion().text == "hello ST"
        assert "".join(event.text for event in sequence.events) == "hello ST"

    def test_close_ends_everything(self) -> None:
        engine = make_engine(max_sequences=1)
        sequences = [add(engine, prompt(5)), add(engine, prompt(6))]
        engine.step()
        engine.close()
        engine.close()
        assert [s.finish_reason for s in sequences] == ["cancelled", "cancelled"]


class TestErrors:
    def test_a_device_error_ends_only_the_request_that_causes_it(self) -> None:
        runner = FakeRunner()

        def fail(batch) -> None:
            if 77 in batch.tokens:
                raise DeviceError("step of 77: no")

        runner.before_step = fail
        engine = make_engine(runner)
        good = [[5, 6, 7], [8, 9], [10]]
        sequences = [add(engine, tokens, max_tokens=5, mask=no_77) for tokens in good]
        bad = add(engine, [11, 77, 12])
        drain(engine)
        assert bad.finish_reason == "error"
        assert isinstance(bad.events[-1].error, DeviceError)
        for sequence in sequences:
            assert sequence.finish_reason == "length"
        assert engine.pool.n_held == 0

    def test_the_last_page_of_a_failed_request_is_not_reused(self) -> None:
        runner = FakeRunner()
        engine = make_engine(runner)
        bad = add(engine, prompt(30))
        engine.step()
        runner.before_step = lambda batch: 1 / 0
        engine.step()
        assert bad.finish_reason == "error"
        runner.before_step = lambda batch: None
        again = run(engine, prompt(30), max_tokens=3)
        assert again.completion().timings.cached_tokens == 0

    def test_any_other_exception_is_a_device_error_with_its_cause(self) -> None:
        runner = FakeRunner()
        runner.before_step = lambda batch: 1 / 0
        sequence = run(make_engine(runner), [5])
        error = sequence.events[-1].error
        assert isinstance(error, DeviceError)
        assert isinstance(error.__cause__, ZeroDivisionError)

    def test_logits_that_are_no_numbers(self) -> None:
        runner = FakeRunner()
        runner.logits = lambda context: (
            np.full(N_VOCAB, np.nan, np.float32) if context[0] == 5 else hashed_logits(context)
        )
        engine = make_engine(runner)
        bad, good = add(engine, [5, 6]), add(engine, [6, 7], max_tokens=3)
        drain(engine)
        assert "largest logit is nan" in str(bad.events[-1].error)
        assert good.generated == expected([6, 7], 3)

    def test_a_failed_page_copy(self) -> None:
        runner = FakeRunner()
        engine = make_engine(runner)
        run(engine, prompt(30), max_tokens=3)

        def fail() -> None:
            raise DeviceError("no copy")

        runner.before_copy = fail
        bad, good = add(engine, prompt(30)), add(engine, prompt(30, seed=1), max_tokens=3)
        drain(engine)
        assert bad.finish_reason == "error"
        assert good.generated == expected(prompt(30, seed=1), 3)
        assert engine.pool.n_held == 0

    def test_a_failing_sink_or_mask(self) -> None:
        engine = make_engine()

        def fail(*args: object) -> None:
            raise KeyError("mine")

        bad = add(engine, [5, 6], mask=fail)
        worse = add(engine, [5, 6])
        worse.sink = fail
        good = add(engine, [6, 7], max_tokens=3)
        drain(engine)
        assert bad.finish_reason == "error"
        assert worse.finish_reason == "cancelled"
        assert good.generated == expected([6, 7], 3)

    def test_an_interrupted_step_can_be_run_again(self) -> None:
        runner = FakeRunner()
        engine = make_engine(runner, chunk=50)
        sequence = add(engine, prompt(120), max_tokens=9)
        interrupts = iter([True, False, False, True, True, False, True])

        def interrupt(batch) -> None:
            if next(interrupts, False):
                raise KeyboardInterrupt

        runner.before_step = interrupt
        while not sequence.finished:
            try:
                engine.step()
            except KeyboardInterrupt:
                check_pages(engine)
        assert sequence.generated == expected(prompt(120), 9)
        assert next(interrupts, None) is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tokens": []}, "prompt is empty"),
            ({"tokens": [N_VOCAB]}, f"prompt token {N_VOCAB} is not below"),
            ({"tokens": [-1]}, "prompt token must be"),
            ({"tokens": [True]}, "prompt token must be"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": True}, "max_tokens"),
            ({"max_tokens": 2.5}, "max_tokens"),
            ({"stop": ["a"] * 100_000}, "stop: at most"),
            ({"stop": [""]}, "stop"),
            ({"stop": ["a" * 10_000]}, "stop"),
            ({"stop": [5]}, "stop"),
            ({"stop_ids": {-3}}, "stop_ids"),
            ({"ignore_eos": 1}, "ignore_eos"),
            ({"sampling": SamplingParams(logit_bias={N_VOCAB: 1.0})}, "logit_bias: token id"),
        ],
    )
    def test_requests_refused_before_any_work(self, options: dict, message: str) -> None:
        engine = make_engine()
        with pytest.raises(RequestError, match=message):
            add(engine, **{"tokens": [5], **options})
        assert engine.n_waiting == 0


def no_77(generated) -> np.ndarray:
    allowed = np.ones(N_VOCAB, bool)
    allowed[77] = False
    return allowed
