"""From logits to the next token: small pure functions, applied in llama.cpp's order.

    logit_bias → repetition penalty → presence and frequency penalties → mask
               → top_k → top_p → min_p → temperature → draw

Each truncation works on the distribution the one before left, and the temperature shapes only the
draw. (vLLM applies the temperature before it truncates: at temperatures above 1 it keeps more
tokens than this does.) Greedy decoding, ``temperature=0``, takes the largest logit after the mask.

**The draw can be reproduced anywhere.** Token ``index`` of a completion (0 is the first generated)
is drawn with one uniform number that depends on nothing but ``(seed, index)``:

1. Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011; cuRAND's
   generator) with key ``(seed mod 2³², seed div 2³²)`` and counter
   ``(index mod 2³², index div 2³², 0, 0)`` gives words ``x0 … x3``.
2. ``u = ((x0 >> 5) · 2²⁶ + (x1 >> 6)) / 2⁵³``, a float64 in [0, 1).
3. The kept tokens, in ascending order of id, have weights ``exp((logit − largest) / temperature)``
   in float32. Their running sums are float64. The token drawn is the first whose running sum
   exceeds ``u`` times the total.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.errors import DeviceError, RequestError

Logits = NDArray[np.float32]

MAX_LOGPROBS = 100
"""Most alternatives a request may ask for at each token."""


class LogitsMask(Protocol):
    """Constrained decoding: says which tokens may come next."""

    def __call__(self, generated: Sequence[int]) -> NDArray[np.bool_]:
        """True for each token of the vocabulary, bool [n_vocab], allowed after ``generated``."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Every value is checked: RequestError names the one out of range.

    temperature: 0 (greedy) to 100.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the fewest likeliest tokens whose probabilities sum to at least top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
    repetition_penalty: for ids among the last ``repeat_last_n`` tokens of prompt and answer (-1:
        all of them, 0: none), positive logits are divided by it, the others multiplied. 1 is off.
    presence_penalty, frequency_penalty: subtracted from the logit of each id generated so far, once
        and once an occurrence (OpenAI's meaning: the prompt does not count). -2 to 2.
    seed: 0 to 2⁶⁴ - 1; None takes a fresh one for each request.
    logprobs: None, or how many alternatives to report at each token (0 … 100), from the model's own
        distribution: before bias, penalties, mask and temperature.
    logit_bias: token id → value added to its logit, -100 to 100.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            self._normalise(name, check_real(name, getattr(self, name), low, high))
        self._normalise("top_k", check_integer("top_k", self.top_k, 0, 2**31 - 1))
        last_n = check_integer("repeat_last_n", self.repeat_last_n, -1, 2**31 - 1)
        self._normalise("repeat_last_n", last_n)
        if self.seed is not None:
            self._normalise("seed", check_integer("seed", self.seed, 0, 2**64 - 1))
        if self.logprobs is not None:
            logprobs = check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
            self._normalise("logprobs", logprobs)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias must map token ids to numbers")
        bias = {
            check_integer("logit_bias: token id", token, 0, 2**31 - 1): check_real(
                f"logit_bias[{token}]", value, -100.0, 100.0
            )
            for token, value in self.logit_bias.items()
        }
        self._normalise("logit_bias", bias)

    def _normalise(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def check_real(name: str, value: object, low: float, high: float) -> float:
    """``value`` as a float within [low, high]; RequestError names it. A bool is not a number."""
    # NaN fails the comparison.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.floating))
        or not (low <= value <= high)
    ):
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, not {_show(value)}")
    return float(value)


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """``value`` as an int within [low, high]; RequestError names it. A bool is not a number."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or not low <= value <= high
    ):
        raise RequestError(
            f"{name} must be a whole number from {low} to {high}, not {_show(value)}"
        )
    return int(value)


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "an enormous number"
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True)
class TokenLogprob:
    """One token's natural-log probability, with the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one completion. Owns what outlives a token: seed and counts."""

    def __init__(self, params: SamplingParams, mask: LogitsMask | None = None) -> None:
        self.params = params
        self.seed = int.from_bytes(os.urandom(8)) if params.seed is None else params.seed
        self._mask = mask
        self._generated: list[int] = []
        self._counts: Counter[int] = Counter()

    @property
    def n_sampled(self) -> int:
        return len(self._generated)

    def sample(self, logits: Logits, prompt: Sequence[int]) -> tuple[int, TokenLogprob | None]:
        """The next token from ``logits`` float32 [n_vocab], and its logprobs when asked for.

        ``logits`` is left as it was. Raises RequestError when the mask allows nothing, and
        DeviceError when the logits are not finite.
        """
        params = self.params
        shaped = self._shape(logits, prompt)
        if params.temperature == 0:
            token = int(shaped.argmax())
            peak = float(shaped[token])
        else:
            peak = float(shaped.max())
            token = -1
        if not math.isfinite(peak):
            raise DeviceError(f"the model's largest logit is {peak}: the weights or cache are bad")
        if token < 0:
            u = uniform(self.seed, len(self._generated))
            token = draw(shaped, truncate(shaped, params), params.temperature, u)
        report = None if params.logprobs is None else logprobs(logits, token, params.logprobs)
        self.accept(token)
        return token, report

    def accept(self, token: int) -> None:
        """Count a token that was chosen, here or on a device."""
        self._generated.append(token)
        self._counts[token] += 1

    def _shape(self, logits: Logits, prompt: Sequence[int]) -> Logits:
        """Bias, penalties and mask, on a copy made only if one of them applies."""
        params = self.params
        recent: set[int] = set()
        if params.repetition_penalty != 1:
            recent = last_tokens(prompt, self._generated, params.repeat_last_n)
        counts = self._counts if params.presence_penalty or params.frequency_penalty else None
        if not (params.logit_bias or recent or counts or self._mask):
            return logits
        shaped = logits.copy()
        add_bias(shaped, params.logit_bias)
        penalise_repetition(shaped, recent, params.repetition_penalty)
        if counts:
            penalise_counts(shaped, counts, params.presence_penalty, params.frequency_penalty)
        if self._mask is not None:
            allowed = self._mask(self._generated)
            if not allowed.any():
                raise RequestError("the constraint allows no token here: it cannot be satisfied")
            shaped[~allowed] = -np.inf
        return shaped


def last_tokens(prompt: Sequence[int], generated: Sequence[int], n: int) -> set[int]:
    """Ids among the last ``n`` tokens of prompt and answer together; -1 means all of them."""
    if n < 0:
        return {*prompt, *generated}
    from_prompt = max(0, n - len(generated))
    return {
        *generated[max(0, len(generated) - n) :],
        *prompt[max(0, len(prompt) - from_prompt) :],
    }


def add_bias(logits: Logits, bias: Mapping[int, float]) -> None:
    for token, value in bias.items():
        logits[token] += value


def penalise_repetition(logits: Logits, tokens: Iterable[int], penalty: float) -> None:
    """In place: positive logits of ``tokens`` divided by ``penalty``, the others multiplied."""
    ids = np.fromiter(tokens, dtype=np.int64)
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / np.float32(penalty), chosen * np.float32(penalty))


def penalise_counts(
    logits: Logits, counts: Mapping[int, int], presence: float, frequency: float
) -> None:
    """In place: ``presence + count * frequency`` off the logit of every counted token."""
    ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    times = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
    logits[ids] -= np.float32(presence) + times * np.float32(frequency)


def truncate(logits: Logits, params: SamplingParams) -> NDArray[np.intp] | None:
    """Ids that top_k, top_p and min_p leave, ascending; None for the whole vocabulary."""
    ids: NDArray[np.intp] | None = None
    values = logits
    if 0 < params.top_k < len(values):
        ids = top_k(values, params.top_k)
        values = logits[ids]
    if params.top_p < 1:
        keep = top_p(values, params.top_p)
        ids = keep if ids is None else ids[keep]
        values = logits[ids]
    if params.min_p > 0:
        keep = min_p(values, params.min_p)
        ids = keep if ids is None else ids[keep]
    return None if ids is None else np.sort(ids)


_BLOCK = 64


def top_k(values: Logits, k: int) -> NDArray[np.intp]:
    """Indices of the ``k`` largest values above -inf, largest first, ties by ascending index."""
    n_blocks = len(values) // _BLOCK
    floor = -np.inf
    if n_blocks > k:  # at least k values reach the k-th largest block maximum, and few others do
        peaks = values[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        floor = np.partition(peaks, n_blocks - k)[n_blocks - k]
    ids = np.flatnonzero(values >= floor if floor > -np.inf else values > -np.inf)
    if len(ids) > k:
        left = values[ids]
        least = np.partition(left, len(left) - k)[len(left) - k]
        above = ids[left > least]
        ids = np.concatenate((above, ids[left == least][: k - len(above)]))
    return ids[np.argsort(-values[ids], kind="stable")]


def top_p(values: Logits, p: float) -> NDArray[np.intp]:
    """Indices of the fewest largest values whose softmax sums to at least ``p``; at least one.

    Of equal values the ones of lower index are kept.
    """
    descending = -np.sort(-values)
    weights = np.exp(descending - descending[0])
    n = 1 + first_reaching(weights, p * float(weights.sum(dtype=np.float64)))
    least = descending[n - 1]
    above = np.flatnonzero(values > least)
    return np.concatenate((above, np.flatnonzero(values == least)[: n - len(above)]))


def min_p(values: Logits, p: float) -> NDArray[np.intp]:
    """Indices of values whose softmax is at least ``p`` times the largest one's."""
    return np.flatnonzero(values >= values.max() + np.float32(math.log(p)))


def draw(logits: Logits, ids: NDArray[np.intp] | None, temperature: float, u: float) -> int:
    """One of ``ids`` (ascending; None: all) by ``u`` in [0, 1), as the module docstring says."""
    values = logits if ids is None else logits[ids]
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to exp(-inf) = 0
        weights = np.exp((values - values.max()) / np.float32(temperature))
    # "Exceeds" is "reaches the next float64 up", and a weightless token is never the first to.
    target = np.nextafter(u * float(weights.sum(dtype=np.float64)), np.inf)
    chosen = first_reaching(weights, float(target))
    return int(chosen if ids is None else ids[chosen])


def first_reaching(weights: Logits, target: float) -> int:
    """The first index whose running sum (float64) is at least ``target``, of non-zero weight.

    When rounding leaves the whole sum short of it, the last index that adds to the sum.
    """
    whole = len(weights) // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    sums = np.append(sums, weights[whole:].sum(dtype=np.float64)).cumsum()
    block = int(np.searchsorted(sums, min(target, sums[-1])))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    rest = target - (sums[block - 1] if block else 0.0)
    return block * _BLOCK + int(np.searchsorted(inside, min(rest, inside[-1])))


def logprobs(logits: Logits, token: int, n: int) -> TokenLogprob:
    """Log-softmax at ``token`` and at the ``n`` likeliest tokens."""
    peak = logits.max()
    log_total = float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    best = top_k(logits, n) if n else ()
    return TokenLogprob(
        token=token,
        logprob=float(logits[token]) - log_total,
        top=tuple((int(i), float(logits[i]) - log_total) for i in best),
    )


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds: four 32-bit words from a counter [4] and a key [2]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that draws token ``index`` under ``seed`` (see the module docstring)."""
    counter = (index & 0xFFFFFFFF, index >> 32, 0, 0)
    x0, x1, _, _ = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return ((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53


def check_vocabulary(params: SamplingParams, n_vocab: int) -> None:
    """RequestError when ``logit_bias`` names an id the model lacks."""
    for token in params.logit_bias:
        if token >= n_vocab:
            raise RequestError(f"logit_bias: token id {token} is not below {n_vocab}")
