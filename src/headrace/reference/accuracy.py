"""How far a backend's next-token distributions are from the reference's.

Both are teacher-forced along the same golden tokens: the cases one token a step after their prompt,
as decode runs, and the perplexity text in chunks, as prefill runs.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE, Batch, Runner

TEXT_CHUNK = 64
"""Rows a step of the perplexity text: bounds the logits held (64 rows of 262,144 are 67 MB)."""

_ROWS_AT_ONCE = 8
"""Rows whose float64 copies are held while distributions are compared."""

TOP1_LIMIT = 0.96
GAP_LIMIT = 0.4
PERPLEXITY_LIMIT = 0.007


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens that follow it; ``float32[i]`` holds the best (id, logprob) pairs of
    exact arithmetic at continued position i, best first."""

    prompt: str
    tokens: tuple[int, ...]
    greedy: tuple[int, ...]
    float32: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class Golden:
    """Recorded truths about one model file (see tests/data/golden): exact arithmetic's figures,
    and llama.cpp's own distance from them."""

    model: str
    sha256: str
    cases: tuple[Case, ...]
    text_tokens: tuple[int, ...]
    text_float32_nll: tuple[float, ...]
    llama_cpp: dict[str, float]


def read_golden(path: Path) -> Golden:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text = data["perplexity"]
    llama_cpp = data["llama_cpp_vs_float32"] | {
        "perplexity": text["ppl"],
        "perplexity_ratio": text["ppl"] / text["float32_ppl"],
    }
    cases = (
        Case(
            case["prompt"],
            tuple(case["tokens"]),
            tuple(case["greedy"]),
            tuple(tuple((int(i), float(p)) for i, p in step) for step in case["float32"]),
        )
        for case in data["cases"]
    )
    return Golden(
        model=data["model"],
        sha256=data["sha256"],
        cases=tuple(cases),
        text_tokens=tuple(text["tokens"]),
        text_float32_nll=tuple(text["float32_nll"]),
        llama_cpp=llama_cpp,
    )


def teacher_forced(
    runner: Runner, tokens: Sequence[int], n_prompt: int, chunk: int
) -> Iterator[NDArray[np.float32]]:
    """Logits at every position from the prompt's last token on, as steps bring them.

    The first step is the prompt and yields [1, n_vocab]; later ones are ``chunk`` tokens and yield
    [≤ chunk, n_vocab]. Uses slot 0 and the first pages of the runner's cache.
    """
    pages = np.arange(-(-len(tokens) // PAGE_SIZE), dtype=np.int32)[None]
    starts = [0, *range(n_prompt, len(tokens), chunk), len(tokens)]
    for start, end in itertools.pairwise(starts):
        n = end - start
        wanted = range(n_prompt - 1 if start == 0 else 0, n)
        yield runner.step(
            Batch(
                tokens=np.array(tokens[start:end], np.int32),
                positions=np.arange(start, end, dtype=np.int32),
                slots=np.zeros(n, np.int32),
                page_table=pages,
                logit_rows=np.array(wanted, np.int32),
            )
        )


@dataclass(frozen=True)
class Distance:
    """Row by row: ``kl`` = KL(reference ‖ device) in nats; ``gap`` = what the device's first choice
    loses to the reference's in reference logprob, 0 where they agree."""

    kl: NDArray[np.float64]
    gap: NDArray[np.float64]

    @property
    def top1(self) -> float:
        """Share of rows whose first choice agrees (or ties exactly)."""
        return float(np.mean(self.gap == 0))


def distance(reference: NDArray[Any], device: NDArray[Any]) -> Distance:
    """Compare logits [R, n_vocab] over the whole vocabulary, in float64."""
    kl, gap = np.empty(len(reference)), np.empty(len(reference))
    for start in range(0, len(reference), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        p, q = reference[rows].astype(np.float64), device[rows].astype(np.float64)
        p -= p.max(axis=-1, keepdims=True)
        q -= q.max(axis=-1, keepdims=True)
        choice = q.argmax(axis=-1)
        gap[rows] = -p[np.arange(len(p)), choice]
        weight = np.exp(p)
        total = weight.sum(axis=-1)
        # KL = E[(p - log Σe^p) - (q - log Σe^q)] over the reference's distribution.
        expected = ((p - q) * weight).sum(axis=-1) / total
        kl[rows] = expected - np.log(total) + np.log(np.exp(q).sum(axis=-1))
    return Distance(kl, gap)


def negative_log_likelihood(
    logits: NDArray[Any], targets: NDArray[np.int32]
) -> NDArray[np.float64]:
    """``-log softmax(logits)[target]`` of each row, in float64.

    logits [R, n_vocab], targets [R] -> [R].
    """
    nll = np.empty(len(logits))
    for row, target in enumerate(targets):
        x = logits[row].astype(np.float64)
        top = x.max()
        nll[row] = np.log(np.exp(x - top).sum()) + top - x[target]
    return nll


@dataclass(frozen=True)
class Accuracy:
    """A device against the reference on one model's golden data."""

    cases: Distance
    text: Distance
    reference_perplexity: float
    device_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.device_perplexity / self.reference_perplexity

    def failures(self, llama_cpp: dict[str, float]) -> list[str]:
        """The limits not met, in words: no further from the reference than llama.cpp is, and no
        first choice that is clearly another."""
        checks = []
        for name, part, limit in (
            ("cases", self.cases, llama_cpp["kl_cases_mean"]),
            ("text", self.text, llama_cpp["kl_perplexity_text_mean"]),
        ):
            kl, gap = float(part.kl.mean()), float(part.gap.max())
            checks += [
                (kl <= limit, f"{name}: mean KL {kl:.5f} > llama.cpp's {limit:.5f}"),
                (part.top1 >= TOP1_LIMIT, f"{name}: top-1 {part.top1:.2%} < {TOP1_LIMIT:.0%}"),
                (gap < GAP_LIMIT, f"{name}: a disagreement with gap {gap:.3f} >= {GAP_LIMIT}"),
            ]
        off = abs(self.perplexity_ratio - 1)
        checks.append((off <= PERPLEXITY_LIMIT, f"perplexity off by {off:.3%}"))
        return [message for met, message in checks if not met]


def measure(reference: Runner, device: Runner, golden: Golden) -> Accuracy:
    """Run both along ``golden``; replaces what their caches hold."""
    longest = max(len(case.tokens) + len(case.greedy) for case in golden.cases)
    n_pages = -(-max(longest, len(golden.text_tokens)) // PAGE_SIZE)
    for runner in (reference, device):
        runner.allocate_cache(n_pages)

    cases = []
    for case in golden.cases:
        tokens, n_prompt = case.tokens + case.greedy[:-1], len(case.tokens)
        ours = np.concatenate(list(teacher_forced(device, tokens, n_prompt, chunk=1)))
        exact = np.concatenate(list(teacher_forced(reference, tokens, n_prompt, len(tokens))))
        cases.append(distance(exact, ours))

    text, exact_nll, our_nll = [], [], []
    targets = np.array(golden.text_tokens[1:], np.int32)
    done = 0
    for exact, ours in zip(
        teacher_forced(reference, golden.text_tokens, 1, TEXT_CHUNK),
        teacher_forced(device, golden.text_tokens, 1, TEXT_CHUNK),
        strict=True,
    ):
        text.append(distance(exact, ours))
        known = targets[done : done + len(exact)]  # the last token has no successor
        exact_nll.append(negative_log_likelihood(exact[: len(known)], known))
        our_nll.append(negative_log_likelihood(ours[: len(known)], known))
        done += len(exact)
    return Accuracy(
        cases=_joined(cases),
        text=_joined(text),
        reference_perplexity=math.exp(np.concatenate(exact_nll).mean()),
        device_perplexity=math.exp(np.concatenate(our_nll).mean()),
    )


def _joined(parts: list[Distance]) -> Distance:
    return Distance(
        np.concatenate([part.kl for part in parts]), np.concatenate([part.gap for part in parts])
    )
