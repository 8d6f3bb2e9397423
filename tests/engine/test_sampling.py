"""Sampling against the definitions, spelt out token by token in float64."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from headrace.errors import DeviceError, RequestError
from headrace.sampling import (
    Sampler,
    SamplingParams,
    draw,
    logprobs,
    philox4x32,
    top_k,
    top_p,
    truncate,
    uniform,
)

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def random_logits(n: int, seed: int = 0, *, ties: bool = False) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 3, n)
    return (np.round(logits) if ties else logits).astype(np.float32)


def naive_kept(logits: np.ndarray, k: int, p: float, least: float) -> set[int]:
    """llama.cpp's chain: each stage on the softmax of what the one before left."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if k:
        order = order[:k]
    weights = [math.exp(float(logits[i]) - float(logits[order[0]])) for i in order]
    total, running, kept = math.fsum(weights), 0.0, []
    for i, weight in zip(order, weights, strict=True):
        kept.append(i)
        running += weight
        if running >= p * total and p < 1:
            break
    best = weights[0]
    return {i for i, w in zip(kept, weights, strict=False) if w >= least * best}


@pytest.mark.parametrize("n", [5, 64, 300, 5000])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [0, 1, 4, 40, 299, 10_000])
@pytest.mark.parametrize(("p", "least"), [(1, 0), (0.9, 0), (1, 0.1), (0.95, 0.05), (0, 0), (1, 1)])
def test_truncation_keeps_what_the_definition_keeps(n, ties, k, p, least) -> None:
    logits = random_logits(n, seed=n + k, ties=ties)
    params = SamplingParams(top_k=k, top_p=p, min_p=least)
    ids = truncate(logits, params)
    kept = range(n) if ids is None else ids.tolist()
    assert set(kept) == naive_kept(logits, k, p, least)
    assert list(kept) == sorted(kept)


def test_top_k_is_in_order_with_ties_by_id() -> None:
    logits = random_logits(10_000, ties=True)
    want = sorted(range(10_000), key=lambda i: (-logits[i], i))
    for k in (1, 50, 155, 156, 157, 9_999, 10_000, 20_000):
        assert top_k(logits, k).tolist() == want[:k]


def test_what_a_mask_forbids_is_never_kept() -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[17, 4000]] = [1.0, 2.0]
    assert top_k(logits, 40).tolist() == [4000, 17]
    assert sorted(top_p(logits, 0.999).tolist()) == [17, 4000]
    for u in (0.0, 0.2, 0.5, 1 - 2**-53):
        assert draw(logits, None, 1.0, u) in (17, 4000)


def test_draw_is_the_first_whose_running_sum_exceeds_u() -> None:
    logits = random_logits(700, seed=3)
    for temperature in (0.3, 1.0, 5.0):
        weights = np.exp((logits - logits.max()) / np.float32(temperature)).tolist()
        total = math.fsum(weights)
        rng = random.Random(0)
        assert weights[draw(logits, None, temperature, 1 - 2**-53)] > 0
        for u in [0.0, *(rng.random() for _ in range(300))]:
            running, want = 0.0, None
            for i, weight in enumerate(weights):
                running += weight
                if running > u * total:
                    want = i
                    break
            assert draw(logits, None, temperature, u) == want


@pytest.mark.parametrize("temperature", [1e-9, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(1000)
    for seed in range(20):
        params = SamplingParams(**{**OFF, "temperature": temperature}, seed=seed)
        assert Sampler(params).sample(logits, [])[0] == logits.argmax()


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([1, 2, 3, 4], np.float32))
    sampler = Sampler(SamplingParams(**OFF, seed=1))
    counts = Counter(sampler.sample(logits, [])[0] for _ in range(20_000))
    for token in range(4):
        assert counts[token] / 20_000 == pytest.approx((token + 1) / 10, abs=0.015)


class TestRandomNumbers:
    @pytest.mark.parametrize(
        ("counter", "key", "words"),
        [  # the known answers published with Random123 (kat_vectors)
            ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                "d16cfe09 94fdcceb 5001e420 24126ea1",
            ),
        ],
    )
    def test_philox_known_answers(self, counter, key, words) -> None:
        assert philox4x32(counter, key) == tuple(int(word, 16) for word in words.split())

    def test_uniform_is_exact_and_depends_on_all_of_seed_and_index(self) -> None:
        x0, x1, _, _ = philox4x32((5, 0, 0, 0), (7, 1))
        want = Fraction((x0 >> 5) * 2**26 + (x1 >> 6), 2**53)
        assert Fraction(uniform(2**32 + 7, 5)) == want
        values = {uniform(seed, i) for seed in (0, 1, 2**32, 2**63) for i in (0, 1, 2**32)}
        assert len(values) == 12
        assert all(0 <= value < 1 for value in values)

    def test_same_seed_same_tokens_and_none_is_fresh(self) -> None:
        logits = random_logits(500)

        def tokens(seed: int | None) -> list[int]:
            sampler = Sampler(SamplingParams(**OFF, seed=seed))
            return [sampler.sample(logits, [])[0] for _ in range(20)]

        assert tokens(3) == tokens(3) != tokens(4)
        assert tokens(None) != tokens(None)


@pytest.mark.parametrize("last_n", [0, 1, 3, 8, 64, -1])
@pytest.mark.parametrize("repetition", [1.0, 1.3, 0.5])
@pytest.mark.parametrize(("presence", "frequency"), [(0, 0), (0.7, 0), (0, 0.4), (-1, 1.5)])
def test_penalties_against_the_definition(last_n, repetition, presence, frequency) -> None:
    prompt = [1, 2, 3, 3, 9]
    bias = {4: 2.0, 9: -1.0}
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        repeat_last_n=last_n,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    sampler = Sampler(params)
    generated: list[int] = []
    for i in range(12):
        logits = random_logits(12, seed=i)
        before = logits.copy()
        token, _ = sampler.sample(logits, prompt)
        np.testing.assert_array_equal(logits, before)
        want = [float(value) + bias.get(t, 0) for t, value in enumerate(logits)]
        history = prompt + generated
        for t in set(history if last_n < 0 else history[-last_n:] if last_n else []):
            want[t] = want[t] / repetition if want[t] > 0 else want[t] * repetition
        for t, count in Counter(generated).items():
            want[t] -= presence + count * frequency
        assert token == max(range(12), key=want.__getitem__)
        generated.append(token)


class TestLogprobs:
    def test_sum_to_one_and_are_right(self) -> None:
        logits = random_logits(90, seed=5)
        report = logprobs(logits, 7, 90)
        assert math.fsum(math.exp(p) for _, p in report.top) == pytest.approx(1, abs=1e-6)
        exact = logits.astype(np.float64)
        exact -= math.log(math.fsum(np.exp(exact)))
        assert report.logprob == pytest.approx(exact[7], abs=1e-6)
        assert [p for _, p in report.top] == pytest.approx(sorted(exact, reverse=True), abs=1e-6)
        assert logprobs(logits, 7, 0).top == ()

    def test_are_untouched_by_how_tokens_are_chosen(self) -> None:
        logits = random_logits(90, seed=6)
        plain = logprobs(logits, int(logits.argmin()), 2)
        params = SamplingParams(
            logprobs=2, seed=1, temperature=0.1, logit_bias={int(logits.argmin()): 100}
        )
        assert Sampler(params).sample(logits, [])[1] == plain


class TestMask:
    def test_only_what_is_allowed(self) -> None:
        def even(generated):
            return np.arange(300) % 2 == len(generated) % 2

        for params in (SamplingParams(temperature=0), SamplingParams(**{**OFF, "temperature": 3})):
            sampler = Sampler(params, even)
            for i in range(30):
                assert sampler.sample(random_logits(300, seed=i), [])[0] % 2 == i % 2

    def test_nothing_allowed(self) -> None:
        sampler = Sampler(SamplingParams(), lambda generated: np.zeros(10, bool))
        with pytest.raises(RequestError, match="cannot be satisfied"):
            sampler.sample(random_logits(10), [])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits = random_logits(100)
    logits[50] = bad
    with pytest.raises(DeviceError, match="largest logit"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits, [])


HUGE = 10**5000
BAD = {
    "temperature": [-0.1, 101, math.nan, math.inf, HUGE, True, "1", None],
    "top_k": [-1, 2**31, 1.5, True, None, HUGE],
    "top_p": [-0.01, 1.01, math.nan, False],
    "min_p": [-0.01, 1.01, math.nan, "0"],
    "repetition_penalty": [0, -1, math.nan, 1e9],
    "repeat_last_n": [-2, 1.0, True],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.inf],
    "seed": [-1, 2**64, 1.0, True, HUGE],
    "logprobs": [-1, 101, 10**9, True, 1.0],
    "logit_bias": [{-1: 0}, {2**31: 0}, {"a": 0}, {True: 0}, {5: 101}, {5: math.nan}, [1], None],
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises(RequestError, match=name) as error:
            SamplingParams(**{name: value})
        assert len(str(error.value)) < 200


def test_numpy_numbers_and_the_ends_of_ranges_are_accepted() -> None:
    params = SamplingParams(
        temperature=np.float32(100), top_k=np.int64(5), top_p=0, min_p=1, seed=2**64 - 1
    )
    assert (params.temperature, params.top_k, params.seed) == (100.0, 5, 2**64 - 1)
    assert type(params.temperature) is float
    assert hash(params) == hash(SamplingParams(**vars(params)))
