"""The executor's operations, each on its own, against float64 arithmetic on random weights.

``pytest tests/cuda/test_executor.py -s`` prints the largest error of each: docs/executor.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import batches
import numpy as np
import pytest

from headrace.backend import PAGE_SIZE
from headrace.cuda.device import Device
from headrace.cuda.executor import Executor
from headrace.cuda.host import HostDevice
from headrace.errors import DeviceError, DeviceMemoryError, ModelError
from headrace.gguf.quants import dequantize
from headrace.gguf.reader import open_gguf
from headrace.gguf.types import QuantType, Tensor
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.model.operations import Activation, FeedForwardOut, ProjectQKV
from headrace.reference import operations as ops
from headrace.reference.runner import ReferenceRunner
from headrace.synth import Shape, write_synthetic

LIMITS = {True: 1e-3, False: 1e-2}
"""Relative errors, with float and with int8 activations."""

ERRORS: dict[tuple[str, bool], float] = {}
TOKENS = [5, 9, 301, 44, 17, 260, 3, 128, 77, 410]
WIDE = Shape("llama", 1, 1280, 9216, 10, 2, 128, 512, 2048, 5e5, 1e-5, False)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory):
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(shape: str | Shape, recipe: str) -> Decoder:
        name = shape if isinstance(shape, str) else "wide"
        if (name, recipe) not in made:
            path = folder / f"{name}-{recipe}.gguf"
            write_synthetic(path, shape, recipe)
            made[name, recipe] = load_decoder(open_gguf(path))
        return made[name, recipe]

    return get


@pytest.fixture(params=[True, False], ids=["float activations", "int8 activations"])
def floats(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    for (what, floats), error in ERRORS.items():
        print(f"\n{what:34} {'float' if floats else 'int8 '} activations {error:.1e}", end="")


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def check(what: str, floats: bool, got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    error = relative(got, wanted)
    ERRORS[what, floats] = max(ERRORS.get((what, floats), 0.0), error)
    assert error <= LIMITS[floats]  # NaN is not


def matrix(decoder: Decoder, name: str) -> np.ndarray:
    tensor = decoder.weights[name]
    return dequantize(tensor.data, tensor.qtype).reshape(tensor.shape).astype(np.float64)


def feed_forward(decoder: Decoder, x: np.ndarray, layer: int) -> np.ndarray:
    gate, up, down = (
        matrix(decoder, f"blk.{layer}.ffn_{name}.weight") for name in ("gate", "up", "down")
    )
    x = x.astype(np.float64)
    return (ops.activate(x @ gate.T, Activation.SILU) * (x @ up.T)) @ down.T


def with_unit_embedding(decoder: Decoder) -> Decoder:
    """Embeddings of the size a residual stream has: layers add to it, they do not make it up."""
    tensor = decoder.weights["token_embd.weight"]
    values = np.random.default_rng(0).standard_normal(tensor.shape).astype(np.float32)
    data = values.view(np.uint8).reshape(len(values), -1)
    embedding = Tensor(tensor.name, QuantType.F32, tensor.shape, data)
    return replace(decoder, weights={**decoder.weights, tensor.name: embedding})


def rows(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    return rng.standard_normal((n, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "recipe", "n"), [("llama-tiny", "Q4_K_M", 1), (WIDE, "Q4_K_M", 3), (WIDE, "Q8_0", 1)]
)
def test_feed_forward_by_name_by_index_and_from_the_host(
    device: Device, decoders, floats: bool, shape: str | Shape, recipe: str, n: int
) -> None:
    decoder = decoders(shape, recipe)
    executor = Executor(decoder, device, max_rows=4)
    x = rows(np.random.default_rng(n), n, decoder.config.d_model)
    wanted = feed_forward(decoder, x, 0)
    names = [f"blk.0.ffn_{name}.weight" for name in ("gate", "up", "down")]
    before = replace(executor.counters)
    by_name = executor.feed_forward_by_name(executor.upload(x), *names, float_activations=floats)
    assert [ran.kernel for ran in executor.ran] == ["quantise", "matvec", "matvec"]
    assert executor.ran[1].constants["FLOAT_ACTIVATIONS"] == str(int(floats))
    assert executor.counters.synchronisations == before.synchronisations
    assert executor.counters.bytes_to_host == before.bytes_to_host
    by_name_values = executor.download(by_name)
    check("feed-forward by name", floats, by_name_values, wanted)
    index = executor.index[0]
    assert index.gate.layout.qtype is decoder.weights[names[0]].qtype
    for _ in range(2):  # the second time from what the first one prepared
        y = executor.feed_forward(executor.upload(x), 0, float_activations=floats)
        np.testing.assert_array_equal(executor.download(y), by_name_values)
    before = replace(executor.counters)
    y = executor.run_feed_forward(x, 0, float_activations=floats)
    np.testing.assert_array_equal(y, by_name_values)
    assert executor.counters.synchronisations == before.synchronisations + 1
    assert executor.counters.bytes_to_device == before.bytes_to_device + x.nbytes
    assert executor.counters.bytes_to_host == before.bytes_to_host + y.nbytes
    executor.close()


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.0.attn_v.weight", "output.weight"])
def test_matvec_by_name(device: Device, decoders, floats: bool, name: str) -> None:
    decoder = decoders(WIDE, "Q4_K_M")  # K of 9,216 and of 1,280
    executor = Executor(decoder, device, max_rows=2)
    weights = matrix(decoder, name)
    x = rows(np.random.default_rng(4), 2, weights.shape[1])
    y = executor.matvec(executor.upload(x), name, float_activations=floats)
    check("matvec", floats, executor.download(y), x.astype(np.float64) @ weights.T)
    executor.close()


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        ("llama-tiny", "Q4_K_M"),
        ("qwen2-tiny", "Q5_K_M"),
        ("qwen3-tiny", "Q6_K"),
        ("gemma3-tiny", "Q8_0"),
    ],
)
def test_layers_chain(device: Device, decoders, floats: bool, shape: str, recipe: str) -> None:
    """Two chunks of rows through two layers; then rows alone, from the same cache."""
    decoder = with_unit_embedding(decoders(shape, recipe))
    seen: dict[object, np.ndarray] = {}
    reference = ReferenceRunner(decoder, np.float64, observe=lambda op, out: seen.update({op: out}))
    reference.allocate_cache(2)
    executor = Executor(decoder, device, max_rows=8, float_activations=floats)
    executor.allocate_cache(2)
    start = 0
    for length in (6, 1, 3):
        batch = batches.one_sequence(TOKENS[start : start + length], start, pages=[1, 0])
        reference.step(batch)
        embedded = seen[decoder.operations[0]].astype(np.float32)
        outs = [op for op in decoder.operations if isinstance(op, FeedForwardOut)]
        first, second = seen[outs[0]], seen[outs[1]]
        executor.bring(batch)
        before = executor.counters.synchronisations
        chained = executor.layer(executor.layer(executor.upload(embedded), 0), 1)
        assert executor.counters.synchronisations == before
        chained = executor.download(chained)
        assert relative(chained, second) <= 2 * LIMITS[floats]
        x = executor.download(executor.layer(executor.upload(embedded), 0))
        check("layer", floats, x, first)
        again = executor.download(executor.layer(executor.upload(x), 1))
        np.testing.assert_array_equal(again, chained)
        start += length
    executor.close()


@pytest.mark.parametrize("length", [3, 63, 130])
def test_incremental_attention(device: Device, decoders, floats: bool, length: int) -> None:
    """A cache filled in one go, then a row at a time; q, k and v from the layer's projection."""
    decoder = decoders("llama-tiny", "Q4_K_M")
    op = next(op for op in decoder.operations if isinstance(op, ProjectQKV))
    executor = Executor(decoder, device, max_rows=length, float_activations=floats)
    executor.allocate_cache(3)
    pages, rng = [2, 0, 1], np.random.default_rng(length)
    x = rows(rng, length + 2, decoder.config.d_model)
    weights = [matrix(decoder, f"blk.0.attn_{name}.weight") for name in "qkv"]
    shapes = [(op.n_heads, 64), (op.n_kv_heads, 64), (op.n_kv_heads, 64)]
    q, k, v = (
        (x.astype(np.float64) @ w.T).reshape(-1, *s) for w, s in zip(weights, shapes, strict=True)
    )
    positions = np.arange(length + 2, dtype=np.int32)
    factors = matrix(decoder, "rope_freqs.weight")
    frequencies = ops.inverse_frequencies(op.rope, factors)
    q, k = (ops.rotate(part, positions, op.rope, frequencies) for part in (q, k))
    wanted = ops.attention(q, k, v, positions, 1 / 8).reshape(length + 2, -1)
    got = []
    for start, stop in ((0, length), (length, length + 1), (length + 1, length + 2)):
        executor.bring(batches.one_sequence([0] * (stop - start), start, pages=pages))
        qkv = executor.project_qkv(executor.upload(x[start:stop]), 0)
        got.append(executor.download(executor.attend(qkv, 0)))
    check("attention, with its projection", floats, np.concatenate(got), wanted)
    executor.close()


def test_what_goes_wrong_is_named(decoders) -> None:
    executor = Executor(decoders("qwen2-tiny", "Q5_K_M"), HostDevice(), max_rows=4)
    x = executor.upload(np.zeros((2, 256), np.float32))
    with pytest.raises(ModelError, match=r"no matrix 'blk\.9\.ffn_up\.weight'"):
        executor.matvec(x, "blk.9.ffn_up.weight")
    with pytest.raises(ModelError, match=r"blk\.0\.attn_norm\.weight is a vector"):
        executor.matvec(x, "blk.0.attn_norm.weight")
    with pytest.raises(ModelError, match=r"rotary order: use Executor\.project_qkv"):
        executor.matvec(x, "blk.0.attn_q.weight")
    with pytest.raises(DeviceError, match=r"shape \(2, 256\) where \[1 … 4, 512\] is expected"):
        executor.matvec(x, "blk.0.ffn_down.weight")
    with pytest.raises(DeviceError, match=r"\[1 … 4, width\] expected"):
        executor.upload(np.zeros((5, 256), np.float32))
    with pytest.raises(ModelError, match="layer 3 of a model of 3"):
        executor.feed_forward(x, 3)
    with pytest.raises(DeviceError, match="no KV cache yet"):
        executor.bring(batches.one_sequence([1]))
    executor.allocate_cache(1)
    with pytest.raises(DeviceError, match="no rows yet: call bring"):
        executor.layer(x, 0)
    with pytest.raises(DeviceError, match=f"position {PAGE_SIZE} lies beyond a cache of 1 pages"):
        executor.bring(batches.one_sequence([1], PAGE_SIZE, pages=[0, 0]))
    executor.bring(batches.one_sequence([1, 2]))
    with pytest.raises(DeviceError, match=r"shape \(2, 256\) where \(2, 512\) is expected"):
        executor.attend(x, 0)
    with pytest.raises(DeviceMemoryError, match="KV cache"):
        executor.allocate_cache(1 << 20)
    executor.allocate_cache(1)  # and it goes on
    executor.bring(batches.one_sequence([1, 2]))
    assert executor.layer(x, 0).shape == (2, 256)
    executor.close()
