"""The sampling kernel against ``headrace.sampling``: the same token for every seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from device_memory import put

from headrace.backend import DecodeRow
from headrace.cuda.device import Device
from headrace.cuda.sampling import RING, DeviceSampler, can_sample
from headrace.errors import DeviceError
from headrace.sampling import Sampler, SamplingParams

VOCABULARY = 5003  # no multiple of a sub-block


def row(params: SamplingParams, seed: int, tokens: Sequence[int] = (1,), n_prompt: int = 1):
    return DecodeRow(list(tokens), [0], n_prompt, params, seed)


def expected(logits: np.ndarray, rows: Sequence[DecodeRow]):
    made = []
    for values, one in zip(logits, rows, strict=True):
        sampler = Sampler(one.params)
        sampler.seed = one.seed
        for token in one.tokens[one.n_prompt :]:
            sampler.accept(token)
        made.append(sampler.sample(values, one.tokens[: one.n_prompt]))
    return made


def sampled(device: Device, logits: np.ndarray, rows: Sequence[DecodeRow], steps: int = 1):
    """The choices of ``steps`` steps from the same logits."""
    n_vocab = logits.shape[1]
    sampler = DeviceSampler(device, n_vocab, len(rows), capacity=256)
    inputs = [put(device, np.zeros(len(rows), np.int32)) for _ in range(2)]
    sampler.start(rows, 0)
    launch = sampler.launch(put(device, logits), len(rows), *inputs)
    made = []
    for step in range(1, steps + 1):
        device.launch(launch)
        device.synchronise()
        assert sampler.arrived(step, len(rows))
        made.append(sampler.choices(step, rows))
    tokens, positions = (device.download(array) for array in inputs)
    assert tokens.tolist() == [choice.token for choice in made[-1]]
    assert positions.tolist() == [steps] * len(rows)
    sampler.close()
    return made


def random_logits(rng: np.random.Generator, n_rows: int, n_vocab: int = VOCABULARY) -> np.ndarray:
    return (rng.standard_normal((n_rows, n_vocab)) * 3).astype(np.float32)


TRUNCATIONS = {
    "llama.cpp's defaults": {},
    "all of the vocabulary": {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "top_k": {"top_k": 7, "top_p": 1.0, "min_p": 0.0},
    "a wide top_k": {"top_k": 900, "top_p": 1.0, "min_p": 0.0, "temperature": 3.0},
    "top_p": {"top_k": 0, "top_p": 0.6, "min_p": 0.0},
    "a tiny top_p": {"top_k": 0, "top_p": 0.0, "min_p": 0.0},
    "min_p": {"top_k": 0, "top_p": 1.0, "min_p": 0.2},
    "hot": {"temperature": 50.0},
    "cold": {"temperature": 1e-6},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("name", list(TRUNCATIONS))
def test_truncations_and_draw(device: Device, name: str) -> None:
    rng = np.random.default_rng(len(name))
    params = SamplingParams(**TRUNCATIONS[name])
    logits = random_logits(rng, 6)
    rows = [row(params, int(rng.integers(0, 2**64, dtype=np.uint64))) for _ in range(6)]
    [made] = sampled(device, logits, rows)
    assert [choice.token for choice in made] == [token for token, _ in expected(logits, rows)]


@pytest.mark.parametrize(
    "how", [{"top_k": 5, "top_p": 1.0, "min_p": 0.0}, {"top_k": 0, "top_p": 0.5, "min_p": 0.0}]
)
def test_of_equal_logits_the_lowest_ids_are_kept(device: Device, how: dict) -> None:
    rng = np.random.default_rng(3)
    logits = np.zeros((4, VOCABULARY), np.float32)
    logits[:, rng.choice(VOCABULARY, 40, replace=False)] = 9.0
    logits[:, 70] = 9.5
    rows = [row(SamplingParams(temperature=2.0, **how), seed) for seed in range(4)]
    [made] = sampled(device, logits, rows)
    assert [choice.token for choice in made] == [token for token, _ in expected(logits, rows)]
    greedy = [row(SamplingParams(temperature=0.0), 0)]
    logits[0, 70] = 9.0
    [[choice]] = sampled(device, logits[:1], greedy)
    assert choice.token == int(logits[0].argmax())


def test_penalties_and_bias_look_at_the_history(device: Device) -> None:
    rng = np.random.default_rng(5)
    logits = random_logits(rng, 7)
    top = np.argsort(-logits, axis=1)[:, :6]
    histories = [[*top[i, :4].tolist(), 17, *top[i, 2:5].tolist()] * 2 for i in range(5)]
    # Each of these chooses another token if it looks at what it should not.
    histories.append([9, 9, 9, 9, 9, int(top[5, 0]), 17, 18, 19])  # beyond the last two
    histories.append([int(top[6, 0]), 9, 9, 9, 9, 17, 18])  # of the prompt
    wanted = [
        SamplingParams(repetition_penalty=1.7, repeat_last_n=-1),
        SamplingParams(repetition_penalty=0.6, repeat_last_n=3, temperature=0.0),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.7),
        SamplingParams(frequency_penalty=-0.9, logit_bias={int(top[3, 0]): -100.0, 4999: 7.5}),
        SamplingParams(
            repetition_penalty=1.2, presence_penalty=-0.5, logit_bias={int(top[4, 1]): 2.0}
        ),
        SamplingParams(
            temperature=0.0, repetition_penalty=50.0, repeat_last_n=2, presence_penalty=0.01
        ),
        SamplingParams(
            temperature=0.0, repetition_penalty=1.0001, repeat_last_n=-1, presence_penalty=2.0
        ),
    ]
    rows = [row(params, 40 + i, histories[i], n_prompt=5) for i, params in enumerate(wanted)]
    [made] = sampled(device, logits, rows)
    assert [choice.token for choice in made] == [token for token, _ in expected(logits, rows)]


def test_a_step_remembers_what_the_one_before_chose(device: Device) -> None:
    """The history and the index of the draw move on without the host."""
    rng = np.random.default_rng(6)
    logits = random_logits(rng, 2)
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.4, temperature=1.3)
    rows = [row(params, 11, [3, 4]), row(params, 12, [3, 4, 5, 6], n_prompt=2)]
    steps = RING + 3
    made = sampled(device, logits, rows, steps)
    for i, one in enumerate(rows):
        sampler = Sampler(params)
        sampler.seed = one.seed
        for token in one.tokens[one.n_prompt :]:
            sampler.accept(token)
        ids = [sampler.sample(logits[i], one.tokens[: one.n_prompt])[0] for _ in range(steps)]
        assert [step[i].token for step in made] == ids


@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_log_probabilities_are_the_models_own(device: Device, n: int) -> None:
    rng = np.random.default_rng(7)
    logits = random_logits(rng, 2)
    params = SamplingParams(logprobs=n, presence_penalty=2.0, temperature=2.0)
    rows = [row(params, 1, [1, 2, 3]), row(SamplingParams(), 2)]
    [made] = sampled(device, logits, rows)
    [(token, wanted), _] = expected(logits, rows)
    got = made[0].logprob
    assert made[1].logprob is None
    assert got is not None
    assert wanted is not None
    assert made[0].token == got.token == token
    assert got.logprob == pytest.approx(wanted.logprob, abs=1e-5)
    assert [i for i, _ in got.top] == [i for i, _ in wanted.top]
    np.testing.assert_allclose(
        [v for _, v in got.top], [v for _, v in wanted.top], atol=1e-5, rtol=0
    )


def test_a_small_vocabulary(device: Device) -> None:
    rng = np.random.default_rng(8)
    logits = random_logits(rng, 3, 50)
    rows = [row(SamplingParams(logprobs=100), seed) for seed in range(3)]
    [made] = sampled(device, logits, rows)
    assert [choice.token for choice in made] == [token for token, _ in expected(logits, rows)]
    assert made[0].logprob is not None
    assert len(made[0].logprob.top) == 50


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(device: Device, value: float) -> None:
    logits = random_logits(np.random.default_rng(9), 2)
    logits[1, 4321] = value
    rows = [row(SamplingParams(temperature=t), 0) for t in (0.0, 1.0)]
    with pytest.raises(DeviceError, match="row 1: the model's largest logit is not finite"):
        sampled(device, logits, rows)


def test_what_the_kernel_does_not_do_is_said(device: Device) -> None:
    assert can_sample(SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0)))
    assert not can_sample(SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)))
    sampler = DeviceSampler(device, 100, 2, 64)
    with pytest.raises(DeviceError, match="3 rows for a sampler of 2"):
        sampler.launch(put(device, np.zeros((3, 100), np.float32)), 3, None, None)
    sampler.close()
