"""Whole tiny models on the CUDA backend, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import batches
import numpy as np
import pytest

from headrace.backend import DecodeRow
from headrace.cuda.device import Device
from headrace.cuda.host import HostDevice
from headrace.cuda.runner import CUDARunner, best_options
from headrace.errors import ContextOverflowError, DeviceError
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.reference.runner import ReferenceRunner
from headrace.sampling import SamplingParams
from headrace.synth import SHAPES, Shape, write_synthetic

TOKENS = [5, 9, 301, 44, 17, 260, 3, 128, 77, 410, 8, 8, 96, 201, 33]


def decoder_of(path: Path):
    return load_decoder(open_gguf(path))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory):
    folder, made = tmp_path_factory.mktemp("synthetic"), {}

    def get(shape: str, recipe: str):
        if (shape, recipe) not in made:
            path = folder / f"{shape}-{recipe}.gguf"
            write_synthetic(path, shape, recipe)
            made[shape, recipe] = decoder_of(path)
        return made[shape, recipe]

    return get


def logits_of(runner, tokens=TOKENS, chunks=(15,), pages: int = 2) -> np.ndarray:
    """Logits at every position, the tokens in chunks of these lengths."""
    runner.allocate_cache(pages)
    out, start = [], 0
    for length in chunks:
        out.append(runner.step(batches.one_sequence(tokens[start : start + length], start)))
        start += length
    return np.concatenate(out)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        ("llama-tiny", "Q4_K_M"),
        ("qwen2-tiny", "Q5_K_M"),
        ("qwen3-tiny", "Q3_K_M"),
        ("gemma3-tiny", "Q4_0"),
    ],
)
def test_families_with_float_activations(
    device: Device, synthetic, shape: str, recipe: str
) -> None:
    """What is left is the f16 cache and the order of sums."""
    decoder = synthetic(shape, recipe)
    wanted = logits_of(ReferenceRunner(decoder))
    runner = CUDARunner(decoder, device, float_activations=True, max_rows=8)
    got = logits_of(runner)
    assert relative(got, wanted) < 1e-3
    runner.close()


def test_int8_activations_one_token_at_a_time(device: Device, synthetic) -> None:
    decoder = synthetic("llama-tiny", "Q4_K_M")
    wanted = logits_of(ReferenceRunner(decoder))
    runner = CUDARunner(decoder, device, max_rows=4)
    got = logits_of(runner, chunks=[1] * len(TOKENS))
    assert relative(got, wanted) < 0.04
    # Chunks of any length, and passes over a long one, are the same step with other rows.
    np.testing.assert_array_equal(logits_of(runner, chunks=(7, 1, 2, 5)), got)
    runner.close()


GREEDY = SamplingParams(temperature=0.0)


def decode_row(tokens: list[int], pages: list[int], params=GREEDY, seed: int = 0) -> DecodeRow:
    return DecodeRow(tokens, pages, len(tokens) - 1, params, seed)


@pytest.mark.parametrize("shape", ["llama-tiny", "qwen3-tiny", "gemma3-tiny"])
def test_tensor_cores(device: Device, synthetic, shape: str) -> None:
    """Closer than int8 activations; a row is the same alone, in chunks, and beside others."""
    decoder, tokens = synthetic(shape, "Q4_K_M"), TOKENS[:9]
    wanted = logits_of(ReferenceRunner(decoder), tokens, (9,))
    runner = CUDARunner(decoder, device, max_rows=16, tensor_rows=1)
    got = logits_of(runner, tokens, (9,))
    assert relative(got, wanted) < 0.02
    np.testing.assert_array_equal(logits_of(runner, tokens, (8, 1)), got)
    reference = ReferenceRunner(decoder)
    reference.allocate_cache(1)
    batch = batches.one_sequence(tokens[:3], 0, [1, 2])
    assert relative(runner.hidden(batch), reference.hidden(batch)) < 0.02
    runner.close()


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [("llama-tiny", "Q4_K_M"), ("qwen3-tiny", "Q3_K_M"), ("gemma3-tiny", "Q4_0")],
)
def test_few_rows(device: Device, synthetic, shape: str, recipe: str) -> None:
    """Closer than int8 activations; two to sixteen rows of a step are the same, and one is not."""
    decoder, tokens = synthetic(shape, recipe), (TOKENS * 2)[:17]
    wanted = logits_of(ReferenceRunner(decoder), tokens, (17,))
    runner = CUDARunner(decoder, device, max_rows=16, few_rows=range(2, 17))
    got = logits_of(runner, tokens, (16, 1))
    assert {one.kernel for one in runner.executor.ran} >= {"matvec", "attend"}
    assert relative(got[:16], wanted[:16]) < 0.02
    assert 0 < relative(got[16:], wanted[16:]) < 0.04
    np.testing.assert_array_equal(logits_of(runner, tokens, (5, 2, 9)), got[:16])
    assert "matvec" not in {one.kernel for one in runner.executor.ran}
    # The vocabulary for some of the rows.
    few = runner.step(batches.one_sequence(tokens[:9], 0, [2, 4, 5]))
    np.testing.assert_array_equal(few, got[[2, 4, 5]])
    assert [one.kernel for one in runner.executor.ran].count("skinny") >= 2
    runner.close()


def test_few_rows_of_a_model_with_unquantised_matrices_go_the_way_of_one(
    device: Device, synthetic
) -> None:
    runner = CUDARunner(synthetic("llama-tiny", "F16"), device, max_rows=4, few_rows=range(2, 5))
    assert runner.executor.lowering.few_rows == range(0)
    logits_of(runner, TOKENS[:4], (4,))
    assert "skinny" not in {one.kernel for one in runner.executor.ran}
    runner.close()
    with pytest.raises(DeviceError, match="within 2 to 16 expected"):
        CUDARunner(synthetic("llama-tiny", "F16"), device, few_rows=range(2, 18))


UNEVEN = Shape("llama", 2, 256, 512, 4, 2, 48, 512, 2048, 1e4)
"""Heads that are no whole groups of a quantised cache."""


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("llama-tiny", {"float_activations": True}),
        ("llama-tiny", {"tensor_rows": 1}),
        ("llama-tiny", {"few_rows": range(2, 17)}),
        ("llama-tiny", {"prompt_rows": 80}),
        ("qwen3-tiny", {"prompt_rows": 80}),
        ("uneven", {"tensor_rows": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_quantised_cache(
    device: Device, synthetic, shape: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reference rounds it, where heads lie in the same order; a row is the same in any
    chunk, beside others, and after a page was copied."""
    monkeypatch.setitem(SHAPES, "uneven", UNEVEN)
    decoder, tokens = synthetic(shape, "Q8_0"), (TOKENS * 5)[:70]
    exact = logits_of(ReferenceRunner(decoder), tokens, (70,))
    wanted = logits_of(ReferenceRunner(decoder, cache_type="q8_0"), tokens, (70,))
    runner = CUDARunner(decoder, device, max_rows=16, cache_type="q8_0", **options)
    got = logits_of(runner, tokens, (70,))
    assert relative(got, wanted) < (1e-3 if "float_activations" in options else 0.03)
    assert relative(got, exact) > 2e-3
    np.testing.assert_array_equal(logits_of(runner, tokens, (3, 60, 7)), got)
    runner.allocate_cache(4)
    runner.step(batches.one_sequence(tokens[:66], 0, [0], [3, 1]))
    runner.copy_page(1, 2)
    beside = [(1, i, token) for i, token in enumerate(TOKENS[:9])]
    last = [(0, i, tokens[i]) for i in range(66, 70)]
    together = runner.step(batches.rows(last + beside, [[3, 2], [0]], range(4)))
    np.testing.assert_array_equal(together, got[66:])
    runner.close()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_sequence_is_the_same_beside_any_number_if_asked_for(
    device: Device, synthetic, batch_invariant: bool
) -> None:
    decoder, n = synthetic("llama-tiny", "Q4_K_M"), 9
    options = best_options(device, batch_invariant=batch_invariant)
    runner = CUDARunner(decoder, device, max_rows=16, **options)
    runner.allocate_cache(n)
    table = np.arange(n)[:, None].tolist()
    together = batches.rows([(i, 0, TOKENS[i]) for i in range(n)], table, range(n))
    alone = batches.rows([(n - 1, 0, TOKENS[n - 1])], table, [0])
    # Nine rows are enough for tensor cores, one is not.
    equal = np.array_equal(runner.step(together)[-1:], runner.step(alone))
    assert equal == batch_invariant
    runner.close()


def test_without_tensor_cores_for_bfloat16_there_is_one_way() -> None:
    assert best_options(HostDevice(arch=75), batch_invariant=True) == {}


@pytest.mark.parametrize("shape", ["llama-tiny", "qwen3-tiny", "gemma3-tiny"])
def test_prompts(device: Device, synthetic, shape: str) -> None:
    """Rows of prompts are the same in chunks of any length above one, and beside other sequences;
    a token alone goes the way of decoding."""
    decoder, tokens = synthetic(shape, "Q4_K_M"), (TOKENS * 2)[:22]
    wanted = logits_of(ReferenceRunner(decoder), tokens, (22,))
    runner = CUDARunner(decoder, device, max_rows=4, prompt_rows=20)
    got = logits_of(runner, tokens, (22,))
    assert runner.executor.ran[-1].kernel == "gemm"  # the vocabulary
    assert relative(got, wanted) < 0.02
    np.testing.assert_array_equal(logits_of(runner, tokens, (7, 2, 13)), got)
    runner.step(batches.one_sequence(tokens[:9], 0, [8]))
    assert {one.kernel for one in runner.executor.ran} >= {"gemm", "prompt_attend"}

    decoded = logits_of(runner, tokens, (21, 1))
    np.testing.assert_array_equal(decoded[:21], got[:21])
    assert 0 < relative(decoded[21:], wanted[21:]) < 0.04

    runner.step(batches.one_sequence(tokens[:9], 0, [8], [0]))
    prompt = [(1, i, token) for i, token in enumerate(tokens)]
    both = batches.rows([(0, 9, tokens[9]), *prompt], [[0], [1]], [0, 4, 22])
    together = runner.step(both)
    np.testing.assert_array_equal(together[1:], got[[3, 21]])
    assert relative(together[:1], wanted[9:10]) < 0.04
    hidden = runner.hidden(both)
    reference = ReferenceRunner(decoder)
    reference.allocate_cache(2)
    reference.step(batches.one_sequence(tokens[:9], 0, [8], [0]))
    assert relative(hidden, reference.hidden(both)) < 0.04
    runner.close()


def test_graph_decoding_is_stepwise_decoding(device: Device, synthetic) -> None:
    decoder = synthetic("llama-tiny", "Q4_K_M")
    runner = CUDARunner(decoder, device, max_rows=16)
    runner.allocate_cache(4)
    pages, prompt = [3, 1], (TOKENS * 4)[:58]  # soon on its second page

    def stepwise(count: int) -> list[int]:
        ids: list[int] = []
        tokens, start = prompt, 0
        while len(ids) < count:
            batch = batches.one_sequence(tokens, start, [len(tokens) - 1], pages)
            start += len(tokens)
            tokens = [int(runner.step(batch)[0].argmax())]
            ids += tokens
        return ids

    wanted = stepwise(12)
    runner.step(batches.one_sequence(prompt, 0, [57], pages))
    row = decode_row([*prompt, wanted[0]], pages)
    burst = runner.decode([row], 11)
    before = replace(runner.counters)
    got = [choices[0].token for choices in burst]
    assert got == wanted[1:]
    after = runner.counters
    assert after.graph_launches - before.graph_launches == 11
    assert after.synchronisations == before.synchronisations
    assert after.bytes_to_host == before.bytes_to_host

    # Stopped after a few: those under way still come, and no more.
    burst = runner.decode([row], 11)
    got = [next(burst)[0].token for _ in range(3)]
    burst.stop()
    got += [choices[0].token for choices in burst]
    assert 3 < len(got) < 11
    assert got == wanted[1 : 1 + len(got)]
    # Abandoned, then something else, then again from the start: the same tokens.
    burst = runner.decode([row], 11)
    next(burst)
    runner.step(batches.one_sequence(TOKENS, 0, [0], [0, 2]))
    with pytest.raises(DeviceError, match="another step ran on this runner"):
        next(burst)
    assert [c[0].token for c in runner.decode([row], 8)] == wanted[1:9]
    with pytest.raises(ContextOverflowError, match="71 tokens after 59 do not fit 2 pages"):
        runner.decode([row], 71)
    with pytest.raises(DeviceError, match="17 rows in a burst of 1 to 16"):
        runner.decode([row] * 17, 1)
    runner.close()


def test_rows_of_a_burst_go_their_own_ways(device: Device, synthetic) -> None:
    """Sequences of unlike length and sampling, together, make the tokens they make alone."""
    runner = CUDARunner(synthetic("llama-tiny", "Q4_K_M"), device, max_rows=16)
    runner.allocate_cache(8)
    params = [
        GREEDY,
        SamplingParams(temperature=1.5, top_k=0, min_p=0.0),
        SamplingParams(temperature=1.0, repetition_penalty=1.4, presence_penalty=0.5),
    ]
    rows = []
    for i, length in enumerate((61, 9, 15)):
        tokens, pages = (TOKENS * 5)[i : i + length], [2 * i, 2 * i + 1]
        runner.step(batches.one_sequence(tokens[:-1], 0, [0], pages))
        rows.append(decode_row(tokens, pages, params[i], seed=i))
    together = [[choice.token for choice in step] for step in runner.decode(rows, 9)]
    for i, row in enumerate(rows):
        alone = [step[0].token for step in runner.decode([row], 9)]
        assert alone == [step[i] for step in together]
    runner.close()
