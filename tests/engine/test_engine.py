"""The engine over a runner that shows every mistake: right text, whatever else is going on."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_runner import (
    N_VOCAB,
    FakeRunner,
    add,
    drain,
    expected,
    hashed_logits,
    ids,
    make_engine,
    prompt,
    run,
    scripted,
)

from headrace.backend import PAGE_SIZE
from headrace.engine.engine import choose_context
from headrace.errors import ContextOverflowError, RequestError
from headrace.sampling import SamplingParams

SAMPLED = SamplingParams(seed=7, temperature=1.0)


@pytest.mark.parametrize("n_prompt", [1, 2, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_of_any_size_give_the_same_text(n_prompt: int, chunk: int) -> None:
    engine = make_engine(chunk=chunk)
    tokens = prompt(n_prompt)
    sequence = run(engine, tokens, max_tokens=70, sampling=SAMPLED)
    assert sequence.generated == expected(tokens, 70, SAMPLED)
    assert sequence.finish_reason == "length"
    assert max(len(batch.tokens) for batch in engine.runner.batches) <= chunk


def test_same_text_alone_or_beside_others_that_come_and_go() -> None:
    engine = make_engine(n_pages=64, max_sequences=5, chunk=33, chunk_beside=9)
    rng = random.Random(1)
    todo = [(prompt(rng.randint(1, 150), seed), rng.randint(1, 90)) for seed in range(20)]
    sequences = []
    for i, (tokens, n) in enumerate(todo):
        params = SamplingParams(seed=i, temperature=0.9, repetition_penalty=1.2)
        sequences.append((add(engine, tokens, max_tokens=n, sampling=params), params))
        for _ in range(rng.randint(0, 9)):
            engine.step()
    drain(engine)
    for (sequence, params), (tokens, n) in zip(sequences, todo, strict=True):
        assert sequence.generated == expected(tokens, n, params)
    assert max(len(set(batch.slots)) for batch in engine.runner.batches) == 5
    assert engine.pool.n_held == 0


def test_a_generating_sequence_moves_on_in_every_step_beside_a_long_prompt() -> None:
    engine = make_engine(chunk=100, chunk_beside=10, n_pages=64)
    first = add(engine, prompt(5), max_tokens=50)
    engine.step()
    add(engine, prompt(300, seed=1), max_tokens=2)
    for n in range(2, 32):
        engine.step()
        assert first.n_generated == n
        assert len(engine.runner.batches[-1].tokens) == 11


def test_first_come_first_served() -> None:
    engine = make_engine(chunk=50, chunk_beside=50, max_sequences=3, n_pages=64)
    sequences = [add(engine, prompt(80, seed), max_tokens=5) for seed in range(9)]
    finished: list[object] = []
    while engine.step():
        finished += [s for s in sequences if s.finished and s not in finished]
    assert finished == sequences
    # A whole chunk of prompts, of two if need be, and one row each for two that generate.
    assert max(len(batch.tokens) for batch in engine.runner.batches) == 52


class TestPreemption:
    def test_text_is_the_same_when_pages_run_out(self) -> None:
        # Each grows to 5 pages; three fit only at the start.
        engine = make_engine(context=320, n_pages=8, chunk=64)
        prompts = [prompt(70, seed) for seed in range(4)]
        sequences = [add(engine, p, max_tokens=230, sampling=SAMPLED) for p in prompts]
        drain(engine)
        for p, sequence in zip(prompts, sequences, strict=True):
            assert sequence.generated == expected(p, 230, SAMPLED)
        assert engine.scheduler.n_preempted > 0
        assert engine.pool.n_held == 0

    def test_the_oldest_is_never_stopped(self) -> None:
        engine = make_engine(context=320, n_pages=5)
        sequences = [add(engine, prompt(60, seed), max_tokens=200) for seed in range(3)]
        oldest = sequences[0]
        while not oldest.finished:
            engine.step()
            assert oldest in engine.scheduler.running or oldest.finished
        drain(engine)
        assert all(len(sequence.generated) == 200 for sequence in sequences)

    def test_the_whole_pool_for_one_sequence(self) -> None:
        engine = make_engine(context=320, n_pages=5)
        tokens = prompt(260)
        run(engine, tokens, max_tokens=60)
        # Its last page is known in part, but there is no page to copy it to.
        again = run(engine, tokens + expected(tokens, 60)[:50], max_tokens=10)
        assert again.generated == expected(tokens, 60)[50:]


@pytest.mark.parametrize("n", [2, 50, 51, 101, 150, 151])
def test_rows_of_a_prompt_never_go_alone(n: int) -> None:
    engine = make_engine(chunk=50)
    sequence = run(engine, prompt(n), max_tokens=3)
    assert sequence.generated == expected(prompt(n), 3)
    rows = [len(batch.tokens) for batch in engine.runner.batches]
    assert sum(rows) == n + 2
    assert all(1 < some <= 50 for some in rows[:-2])


class TestPrefixReuse:
    def test_a_second_equal_prompt_computes_its_last_two_tokens(self) -> None:
        engine = make_engine()
        tokens = prompt(200)
        first = run(engine, tokens, max_tokens=10)
        before = engine.runner.n_rows
        second = run(engine, tokens, max_tokens=10)
        assert second.generated == first.generated == expected(tokens, 10)
        assert first.completion().timings.cached_tokens == 0
        assert second.completion().timings.cached_tokens == 198
        assert engine.runner.n_rows - before == 11

    def test_turns_of_a_conversation_compute_only_what_is_new(self) -> None:
        engine = make_engine()
        tokens = prompt(30)
        for turn in range(8):
            before = engine.runner.n_rows
            sequence = run(engine, tokens, max_tokens=25)
            assert sequence.generated == expected(tokens, 25)
            if turn:
                # 20 new, the last answer's final token (never run), and 24 of this answer.
                assert engine.runner.n_rows - before == 20 + 1 + 24
            tokens = tokens + sequence.generated + prompt(20, seed=turn + 1)

    @pytest.mark.parametrize("n_common", [1, 63, 64, 65, 100, 127, 128, 150, 199])
    def test_prompts_that_part_anywhere(self, n_common: int) -> None:
        engine = make_engine()
        tokens = prompt(200)
        run(engine, tokens, max_tokens=5)
        other = [*tokens[:n_common], 3 + (tokens[n_common] - 2) % 256, *prompt(40, seed=2)]
        sequence = run(engine, other, max_tokens=5)
        assert sequence.generated == expected(other, 5)
        assert sequence.completion().timings.cached_tokens == n_common
        # The first one's pages were copied, not written.
        assert run(engine, tokens, max_tokens=5).generated == expected(tokens, 5)

    def test_requests_side_by_side_share_pages(self) -> None:
        engine = make_engine(n_pages=64)
        tokens = prompt(5 * PAGE_SIZE)
        first = add(engine, tokens, max_tokens=100)
        engine.step(), engine.step()
        others = [add(engine, [*tokens, 9, 9 + i], max_tokens=5) for i in range(6)]
        engine.step()
        assert engine.pool.n_held == 6 + 6
        assert engine.pool.references(first.pages[0]) == 7
        drain(engine)
        for i, other in enumerate(others):
            assert other.generated == expected([*tokens, 9, 9 + i], 5)

    def test_least_recently_used_go_first_and_the_beginning_of_a_prompt_last(self) -> None:
        engine = make_engine(context=256, n_pages=10)
        old, new = prompt(250, seed=1), prompt(250, seed=2)
        run(engine, old, max_tokens=2)
        run(engine, new, max_tokens=2)
        run(engine, prompt(100, seed=3), max_tokens=2)  # takes the 2 free ones
        again = run(engine, new, max_tokens=2)  # its copy of a page takes the last one of ``old``
        assert again.completion().timings.cached_tokens == 248
        cached = run(engine, old, max_tokens=2).completion().timings.cached_tokens
        assert cached == 3 * PAGE_SIZE


class TestContext:
    @pytest.mark.parametrize("n_prompt", [1, 100, 255])
    def test_one_under_at_and_one_over(self, n_prompt: int) -> None:
        engine = make_engine(context=256)
        tokens = prompt(n_prompt)
        fits = 256 - n_prompt
        if fits > 1:
            assert run(engine, tokens, max_tokens=fits - 1).n_generated == fits - 1
        assert run(engine, tokens, max_tokens=fits).generated == expected(tokens, fits)
        with pytest.raises(ContextOverflowError, match=f"{n_prompt} tokens and {fits + 1} more"):
            add(engine, tokens, max_tokens=fits + 1)
        assert engine.n_waiting == 0

    def test_a_prompt_that_leaves_no_room(self) -> None:
        with pytest.raises(ContextOverflowError):
            add(make_engine(context=256), prompt(256))

    def test_generating_to_the_end_is_length(self) -> None:
        sequence = run(make_engine(context=100), prompt(90), max_tokens=None)
        assert (sequence.finish_reason, sequence.n_generated) == ("length", 10)

    def test_choice(self) -> None:
        assert choose_context(None, 2048) == 2048
        assert choose_context(None, 131072) == 8192
        assert choose_context(131072, 131072) == 131072
        with pytest.raises(RequestError, match="context must be a whole number from 1 to 2048"):
            choose_context(2049, 2048)


class TestText:
    def answer(self, text: str, **options):
        engine = make_engine(FakeRunner(scripted({"q": text})))
        return run(engine, ids("q"), **options)

    def test_end_token_is_no_part_of_the_answer(self) -> None:
        sequence = self.answer("so — é!")
        assert sequence.finish_reason == "stop"
        completion = sequence.completion()
        assert completion.text == "so — é!"
        assert list(completion.tokens) == ids("so — é!")
        assert "".join(event.text for event in sequence.events) == completion.text
        # Three bytes of the dash: nothing is shown before the last.
        assert [event.text for event in sequence.events[3:6]] == ["", "", "—"]

    def test_ignore_eos(self) -> None:
        sequence = self.answer("ab", ignore_eos=True, max_tokens=5)
        assert sequence.finish_reason == "length"
        assert sequence.generated[:3] == [*ids("ab"), 2]

    def test_stop_ids(self) -> None:
        sequence = self.answer("abcd", stop_ids={*ids("c")})
        assert sequence.completion().text == "ab"
        assert sequence.finish_reason == "stop"

    @pytest.mark.parametrize("stop", ["STOP", "lo STOP", "S"])
    def test_stop_strings_never_leak(self, stop: str) -> None:
        sequence = self.answer("hello STOP more", stop=(stop, "never"))
        shown = "hello STOP more".split(stop)[0]
        assert sequence.completion().text == shown
        assert "".join(event.text for event in sequence.events) == shown
        assert sequence.finish_reason == "stop"
        for i in range(len(sequence.events)):
            assert shown.startswith("".join(event.text for event in sequence.events[:i]))

    def test_the_beginning_of_a_stop_string_is_text_if_it_ends_there(self) -> None:
        assert self.answer("hello ST", stop=("STOP",)).completion().text == "hello ST"
        sequence = self.answer("hello ST", stop=("STOP",), max_tokens=8)
        assert sequence.completion().text == "hello ST"
        assert sequence.events[-1].text == "ST"

    def test_half_a_character_at_the_end(self) -> None:
        sequence = self.answer("é", max_tokens=1)
        assert sequence.completion().text == "\ufffd"


class TestLogits:
    def test_every_row_beside_running_sequences(self) -> None:
        engine = make_engine(chunk=50, n_pages=64)
        sequence = add(engine, prompt(100), max_tokens=20)
        engine.step()
        tokens = prompt(170, seed=1)
        logits = engine.logits(tokens)
        want = np.array([hashed_logits(tokens[: i + 1]) for i in range(170)])
        np.testing.assert_array_equal(logits, want)
        drain(engine)
        assert sequence.generated == expected(prompt(100), 20)
        assert engine.pool.n_held == 0

    def test_limits(self) -> None:
        engine = make_engine(context=128)
        assert engine.logits(prompt(128)).shape == (128, N_VOCAB)
        with pytest.raises(ContextOverflowError):
            engine.logits(prompt(129))
        with pytest.raises(RequestError):
            engine.logits([])
        with pytest.raises(RequestError, match="token"):
            engine.logits([N_VOCAB])


def test_timings() -> None:
    sequence = run(make_engine(chunk=10), prompt(35), max_tokens=6)
    timings = sequence.completion().timings
    assert (timings.prompt_tokens, timings.cached_tokens, timings.decode_tokens) == (35, 0, 5)
    assert timings.time_to_first_token >= timings.prompt_seconds > 0
    assert timings.decode_tokens_per_second == 5 / timings.decode_seconds
    assert timings.prompt_tokens_per_second == 35 / timings.prompt_seconds


def test_logprobs_are_of_the_models_own_distribution() -> None:
    params = SamplingParams(temperature=0, logprobs=3, logit_bias={9: 100.0})
    sequence = run(make_engine(), [5, 6], max_tokens=4, sampling=params)
    completion = sequence.completion()
    assert completion.tokens == (9, 9, 9, 9)
    raw = hashed_logits([5, 6]).astype(np.float64)
    want = raw - np.log(np.exp(raw).sum())
    entry = completion.logprobs[0]
    assert entry.token == 9
    assert entry.logprob == pytest.approx(want[9], abs=1e-5)
    best = np.argsort(-raw)[:3]
    assert [token for token, _ in entry.top] == best.tolist()
    assert [p for _, p in entry.top] == pytest.approx(want[best], abs=1e-5)
    assert len(completion.logprobs) == 4
    assert [event.logprobs for event in sequence.events] == list(completion.logprobs)
