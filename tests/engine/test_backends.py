"""The engine over real backends and a tiny model: the same text whichever way it is made."""

from __future__ import annotations

import numpy as np
import pytest
from fake_runner import TOKENIZER, add, drain
from tiny_families import tiny_model, write_tiny

from headrace.devices import load_runner
from headrace.engine.engine import Engine
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.sampling import SamplingParams

N_VOCAB = 70
PROMPTS = [np.random.default_rng(n).integers(3, N_VOCAB, n).tolist() for n in (1, 50, 60, 120)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load_decoder(open_gguf(write_tiny(tiny_model("llama"), path)))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def ask(engine: Engine, tokens: list[int], seed: int = 5):
    params = SamplingParams(seed=seed, temperature=1.0, logprobs=0)
    return add(engine, tokens, max_tokens=100, sampling=params, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(decoder, device: str):
    """Each prompt's answer from an engine of its own, its prompt in one chunk."""
    answers = []
    for tokens in PROMPTS:
        engine = Engine(load_runner(decoder, device), TOKENIZER, context=256)
        answers.append(ask(engine, tokens))
        drain(engine)
        engine.close()
    return answers


def same(answers, others, device: str) -> None:
    for answer, other in zip(answers, others, strict=True):
        assert answer.generated == other.generated
        a = [entry.logprob for entry in answer.logprobs]
        b = [entry.logprob for entry in other.logprobs]
        if device == "reference":  # BLAS sums in an order that depends on the number of rows
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
        else:
            assert a == b


@pytest.mark.parametrize(
    ("chunk", "chunk_beside", "n_pages"),
    [(256, 64, 40), (1, 1, 40), (7, 3, 40), (64, 16, 5)],  # 5 pages: some are preempted
)
def test_beside_each_other_and_in_chunks(
    decoder, device, alone, chunk: int, chunk_beside: int, n_pages: int
) -> None:
    engine = Engine(
        load_runner(decoder, device),
        TOKENIZER,
        context=256,
        n_pages=n_pages,
        chunk=chunk,
        chunk_beside=chunk_beside,
    )
    together = [ask(engine, tokens) for tokens in PROMPTS]
    drain(engine)
    same(alone, together, device)
    assert (engine.scheduler.n_preempted > 0) == (n_pages == 5)
    # Once more, now from pages that are known.
    again = [ask(engine, tokens) for tokens in PROMPTS]
    drain(engine)
    same(alone, again, device)
    if n_pages == 40:
        assert all(s.completion().timings.cached_tokens == max(0, s.n_prompt - 2) for s in again)
    engine.close()


def test_turns_continue_from_a_copied_page(decoder, device) -> None:
    engine = Engine(load_runner(decoder, device), TOKENIZER, context=512)
    tokens = PROMPTS[1]
    for turn in range(3):
        warm = ask(engine, tokens, seed=turn)
        drain(engine)
        fresh_engine = Engine(load_runner(decoder, device), TOKENIZER, context=512)
        fresh = ask(fresh_engine, tokens, seed=turn)
        drain(fresh_engine)
        fresh_engine.close()
        same([warm], [fresh], device)
        cached = warm.completion().timings.cached_tokens
        assert cached == (len(tokens) - 6 if turn else 0)
        tokens = tokens + warm.generated + PROMPTS[2][:5]
    engine.close()


def test_logits_in_chunks(decoder, device) -> None:
    engine = Engine(load_runner(decoder, device), TOKENIZER, context=256)
    whole = engine.logits(PROMPTS[3])
    small = Engine(load_runner(decoder, device), TOKENIZER, context=256, chunk=33)
    np.testing.assert_allclose(small.logits(PROMPTS[3]), whole, rtol=0, atol=1e-4)
    assert whole.shape == (120, N_VOCAB)
    assert whole.dtype == np.float32
    engine.close(), small.close()
