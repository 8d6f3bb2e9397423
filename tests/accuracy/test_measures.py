"""The distances that accuracy is judged by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from headrace.reference.accuracy import (
    Accuracy,
    Distance,
    distance,
    negative_log_likelihood,
    read_golden,
    teacher_forced,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LLAMA_CPP = {"kl_cases_mean": 0.004, "kl_perplexity_text_mean": 0.006}


def test_distance_is_kl_over_the_whole_vocabulary_and_the_gap():
    p = np.log(np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]] * 10))
    q = np.log(np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]] * 10))
    # Logits are logprobs up to a constant, which must not matter.
    result = distance((p + 700).astype(np.float32), (q - 50).astype(np.float32))
    kl_first = 0.5 * math.log(2) + 0.3 * math.log(0.6) + 0.2 * math.log(0.8)
    kl_second = 0.6 * math.log(1.2) + 0.3 * math.log(1.2) + 0.1 * math.log(0.4)
    np.testing.assert_allclose(result.kl, [kl_first, kl_second] * 10, atol=1e-4)
    np.testing.assert_allclose(result.gap, [math.log(0.5 / 0.3), 0] * 10, atol=1e-4)
    assert result.top1 == 0.5


def test_negative_log_likelihood():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 1000
    nll = negative_log_likelihood(logits, np.array([1, 2], np.int32))
    np.testing.assert_allclose(nll, [math.log(4), -math.log(0.8)])


def accuracy(kl=0.001, gaps=(0.0,) * 100, perplexity=8.0) -> Accuracy:
    part = Distance(np.full(100, kl), np.array(gaps))
    return Accuracy(part, part, reference_perplexity=8.0, device_perplexity=perplexity)


@pytest.mark.parametrize(
    ("measured", "complaints"),
    [
        (accuracy(), []),
        (accuracy(kl=0.005), ["cases: mean KL"]),
        (accuracy(kl=0.007), ["cases: mean KL", "text: mean KL"]),
        (accuracy(gaps=[0.1] * 5 + [0] * 95), ["cases: top-1", "text: top-1"]),
        (accuracy(gaps=[0.5] + [0] * 99), ["cases: a disagreement", "text: a disagreement"]),
        (accuracy(perplexity=8.06), ["perplexity off"]),
        (accuracy(perplexity=7.94), ["perplexity off"]),
    ],
)
def test_each_limit_is_enforced(measured, complaints):
    failures = measured.failures(LLAMA_CPP)
    assert len(failures) == len(complaints)
    for failure, complaint in zip(failures, complaints, strict=True):
        assert failure.startswith(complaint)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_teacher_forcing_visits_every_position_once(chunk):
    class Recorder:
        def step(self, batch):
            self.seen += zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True)
            return np.array([[self.seen[-len(batch.tokens) + row][1]] for row in batch.logit_rows])

    runner = Recorder()
    runner.seen = []
    tokens = list(range(50, 60))
    positions = np.concatenate(list(teacher_forced(runner, tokens, 4, chunk)))
    assert runner.seen == list(zip(tokens, range(10), strict=True))
    assert positions.ravel().tolist() == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_golden_files_are_whole(path):
    golden = read_golden(path)
    assert len(golden.cases) == 6
    assert all(len(case.greedy) == len(case.float32) == 48 for case in golden.cases)
    assert len(golden.text_tokens) == len(golden.text_float32_nll) + 1 == 512
    assert golden.llama_cpp["kl_cases_mean"] > 0
