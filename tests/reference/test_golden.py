"""The reference against the recorded figures of exact float32 arithmetic, on the real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.backend import PAGE_SIZE
from headrace.gguf.reader import open_gguf
from headrace.model import load_decoder
from headrace.reference.accuracy import (
    TEXT_CHUNK,
    negative_log_likelihood,
    read_golden,
    teacher_forced,
)
from headrace.reference.runner import ReferenceRunner

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

pytestmark = pytest.mark.real_model


@pytest.fixture(
    scope="module",
    params=[
        ("smollm2_path", "smollm2-135m-instruct-q4_1.json"),
        ("gemma3_path", "gemma-3-270m-q4_k_m.json"),
    ],
    ids=["smollm2", "gemma3"],
)
def model(request):
    """(golden, runner) of one model; its dequantised weights are shared by the tests."""
    path, golden_name = request.param
    golden = read_golden(GOLDEN / golden_name)
    runner = ReferenceRunner(load_decoder(open_gguf(request.getfixturevalue(path))))
    runner.allocate_cache(-(-len(golden.text_tokens) // PAGE_SIZE))
    yield golden, runner
    runner.close()


def test_continuations(model):
    golden, runner = model
    differences, agreements = [], []
    for case in golden.cases:
        tokens = case.tokens + case.greedy[:-1]
        steps = teacher_forced(runner, tokens, len(case.tokens), chunk=len(tokens))
        logits = np.concatenate(list(steps))
        assert len(logits) == len(case.float32)
        best = np.array([step[0][0] for step in case.float32], np.int32)
        logprobs = np.array([step[0][1] for step in case.float32])
        differences.append(np.abs(-negative_log_likelihood(logits, best) - logprobs))
        agreements.append(logits.argmax(axis=-1) == best)
    assert np.concatenate(differences).mean() <= 0.002
    assert np.concatenate(agreements).mean() >= 0.995


def test_perplexity(model):
    golden, runner = model
    targets = np.array(golden.text_tokens[1:], np.int32)
    chunks = teacher_forced(runner, golden.text_tokens[:-1], 1, TEXT_CHUNK)
    nll, done = [], 0
    for logits in chunks:
        nll.append(negative_log_likelihood(logits, targets[done : done + len(logits)]))
        done += len(logits)
    ours, exact = np.exp(np.concatenate(nll).mean()), np.exp(np.mean(golden.text_float32_nll))
    assert done == len(golden.text_float32_nll)
    assert ours == pytest.approx(exact, rel=0.001)
