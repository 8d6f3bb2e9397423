"""The engine over the CUDA backend: bursts on the device make the text that steps would."""

from __future__ import annotations

import numpy as np
import pytest
from fake_runner import TOKENIZER, add, drain
from tiny_families import tiny_model, write_tiny

from headrace.cuda.device import Device
from headrace.cuda.runner import CUDARunner
from headrace.engine.engine import Engine
from headrace.gguf.reader import open_gguf
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.sampling import SamplingParams

N_VOCAB = 70
PROMPTS = [np.random.default_rng(n).integers(3, N_VOCAB, n).tolist() for n in (3, 61)]
PARAMS = [
    SamplingParams(seed=5, temperature=1.2, repetition_penalty=1.3, logprobs=2),
    SamplingParams(temperature=0, logprobs=0),
]


class Stepping:
    """A runner without bursts: the host chooses every token."""

    def __init__(self, runner: CUDARunner) -> None:
        self._runner = runner

    def __getattr__(self, name: str):
        if name in ("decode", "can_sample"):
            raise AttributeError(name)
        return getattr(self._runner, name)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load_decoder(open_gguf(write_tiny(tiny_model("llama"), path)))


def answers(engine: Engine, n: int):
    asked = [
        add(engine, tokens, max_tokens=n, sampling=params, ignore_eos=True)
        for tokens, params in zip(PROMPTS, PARAMS, strict=True)
    ]
    drain(engine)
    return asked


def test_bursts_answer_as_steps_do(device: Device, decoder: Decoder) -> None:
    runner = CUDARunner(decoder, device, max_rows=16)
    wanted = answers(Engine(Stepping(runner), TOKENIZER, context=128, n_pages=8), 12)
    engine = Engine(runner, TOKENIZER, context=128, n_pages=8)
    before = runner.counters.graph_launches
    for again in (False, True):  # the second time from pages that are known
        made = answers(engine, 12)
        for got, one in zip(made, wanted, strict=True):
            assert got.generated == one.generated
            for a, b in zip(got.logprobs, one.logprobs, strict=True):
                assert [i for i, _ in a.top] == [i for i, _ in b.top]
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert again == (made[0].n_cached == 1)
    assert runner.counters.graph_launches > before
    engine.close()
