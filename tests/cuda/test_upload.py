"""Weights on their way to the device: as the file has them, whatever runs beside, and no trace of a
way that ended early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from headrace.cuda import upload, weights
from headrace.cuda.device import Device, DeviceArray
from headrace.cuda.host import HostDevice
from headrace.cuda.layout import reorder, rotary_rows
from headrace.cuda.weights import WeightIndex
from headrace.errors import DeviceError, DeviceMemoryError, GGUFError
from headrace.gguf.quants import BLOCK_DTYPES, dequantize
from headrace.gguf.reader import open_gguf
from headrace.gguf.types import QuantType
from headrace.model.decoder import Decoder
from headrace.model.loader import load_decoder
from headrace.synth import write_synthetic

LIMIT = 64 << 20
PIECE = 1 << 14


@pytest.fixture(scope="module", params=["llama-tiny", "qwen2-tiny"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_synthetic(path, request.param, "Q4_K_M")
    return load_decoder(open_gguf(path))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every slot is used many times."""
    monkeypatch.setattr(weights, "SLOT_BYTES", PIECE)


def check(index: WeightIndex, decoder: Decoder, device: Device) -> None:
    for (name, order), layout in index._layouts.items():
        tensor, address = decoder.weights[name], index.matrix(name, order).address
        data = tensor.data
        if order.rope_dim:
            data = data[rotary_rows(tensor.n_rows, order.head_dim, order.rope_dim)]
        got = device.download(DeviceArray(address, (layout.n_bytes,), np.dtype(np.uint8)))
        np.testing.assert_array_equal(got, reorder(data, layout), err_msg=name)
    for (name, order), size in index._vectors.items():
        tensor = decoder.weights[name]
        values = order.apply(dequantize(tensor.data, tensor.qtype).reshape(-1))
        address = index.vector(name, order)
        got = device.download(DeviceArray(address, (size,), np.dtype(np.float32)))
        np.testing.assert_array_equal(got, values, err_msg=name)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_weights_arrive_whenever_the_device_takes_them(
    decoder: Decoder, asynchronous: bool
) -> None:
    device = HostDevice(asynchronous=asynchronous, memory_limit=LIMIT)
    index = WeightIndex(decoder)
    told: list[int] = []
    index.load(device, told.append)
    check(index, decoder, device)
    assert len(told) > 4 * upload._SLOTS
    assert max(told) == index.staging_bytes <= PIECE
    assert sum(told) == sum(decoder.weights[name].data.nbytes for name, _ in index._layouts)
    index.close(device)
    assert device.free_bytes() == LIMIT


@pytest.mark.gpu
def test_weights_arrive_on_a_gpu(decoder: Decoder) -> None:
    from headrace.cuda.gpu import CUDADevice

    device = CUDADevice()
    index = WeightIndex(decoder)
    index.load(device)
    check(index, decoder, device)
    index.close(device)
    device.close()


def ends_early(decoder: Decoder, device: HostDevice, told: Callable[[int], None]) -> None:
    """The load raises; all it took is free again, and its threads have ended."""
    index = WeightIndex(decoder)
    try:
        index.load(device, told)
    finally:
        index.close(device)
        assert device.free_bytes() == LIMIT
        assert not [t for t in threading.enumerate() if t.name.startswith("headrace-weights")]


class _Stop:
    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("after", [1, 2, 30])
def test_ctrl_c_while_loading_leaves_nothing(
    decoder: Decoder, asynchronous: bool, after: int
) -> None:
    device = HostDevice(asynchronous=asynchronous, memory_limit=LIMIT)
    with pytest.raises(KeyboardInterrupt):
        ends_early(decoder, device, _Stop(KeyboardInterrupt(), after))


@pytest.mark.parametrize("after", [1, 7, 30])
def test_a_thread_that_fails_ends_the_load(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder, after: int
) -> None:
    monkeypatch.setattr(upload._Slot, "fill", _Stop(OSError("the disk has gone"), after))
    with pytest.raises(OSError, match="the disk has gone"):
        ends_early(decoder, HostDevice(memory_limit=LIMIT), lambda _: None)


@pytest.mark.parametrize("after", [1, 7, 30])
def test_a_device_that_fails_ends_the_load(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder, after: int
) -> None:
    device = HostDevice(memory_limit=LIMIT)
    monkeypatch.setattr(device, "launch", _Stop(DeviceError("the device has gone"), after))
    with pytest.raises(DeviceError, match="the device has gone"):
        ends_early(decoder, device, lambda _: None)


@pytest.mark.parametrize("slots", [0, 1, 5])
def test_no_room_for_slots_ends_the_load(decoder: Decoder, slots: int) -> None:
    index = WeightIndex(decoder)
    device = HostDevice(memory_limit=LIMIT)
    taken = index.n_bytes + 512 + (1 + slots) * (index.staging_bytes + 256)
    spare = device.allocate(LIMIT - 256 - taken, "what others hold")
    with pytest.raises(DeviceMemoryError, match=r"pinned: [\d,]+ bytes wanted, [\d,]+ free"):
        index.load(device)
    index.close(device)
    device.free(spare)
    assert device.free_bytes() == LIMIT


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_norm.weight"])
def test_weights_that_are_not_finite_are_found_on_the_way(decoder: Decoder, name: str) -> None:
    tensor = decoder.weights[name]
    data = tensor.data.copy()
    row = tensor.n_rows - 1
    if tensor.qtype is QuantType.F32:
        data[row].view("<f4")[-1] = np.inf
    else:
        blocks = data[row].view(BLOCK_DTYPES[tensor.qtype])
        blocks["d"][-1] = np.nan
    damaged = replace(decoder, weights={**decoder.weights, name: replace(tensor, data=data)})
    with pytest.raises(GGUFError, match=rf"'{name}' .*NaN or infinite .* in row {row};"):
        ends_early(damaged, HostDevice(memory_limit=LIMIT), lambda _: None)
