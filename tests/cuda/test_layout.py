"""Tiles: the kernel that makes them against the NumPy definition."""

from __future__ import annotations

import numpy as np
import pytest
from device_memory import put

from headrace.cuda.device import Device, array
from headrace.cuda.launchers import reorder
from headrace.cuda.layout import PLANES, TileLayout, rotary_rows, tile_block
from headrace.cuda.layout import reorder as reorder_in_numpy
from headrace.errors import DeviceError
from headrace.gguf.types import QuantType


@pytest.mark.parametrize("qtype", list(QuantType))
def test_planes_cover_every_byte_of_a_block_once(qtype: QuantType) -> None:
    covered = sorted(
        byte for offset, size in PLANES[qtype] for byte in range(offset, offset + size)
    )
    assert covered == list(range(tile_block(qtype)[1]))


@pytest.mark.parametrize("qtype", list(QuantType))
@pytest.mark.parametrize(("n", "k"), [(5, 256), (18, 1280), (16, 2048)])
def test_reorder_kernel_matches_its_definition(
    device: Device, qtype: QuantType, n: int, k: int
) -> None:
    rng = np.random.default_rng(n + k)
    data = rng.integers(0, 256, (n, qtype.row_bytes(k)), np.uint8)
    layout = TileLayout(qtype, n, k)
    target = put(device, np.full(layout.n_bytes, 0xFF, np.uint8))
    # In two chunks, as the loader does.
    rows = 4 if n > 4 else n
    for first, count in ((0, rows), (rows, n - rows)):
        source = put(device, data[first : first + count])
        device.launch(
            reorder(layout, source.address, target.address, first, count, head_dim=0, rope_dim=0)
        )
    np.testing.assert_array_equal(device.download(target), reorder_in_numpy(data, layout))


@pytest.mark.parametrize("rope_dim", [32, 16])
def test_reorder_brings_rotary_pairs_together(device: Device, rope_dim: int) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (64, 68), np.uint8)
    layout = TileLayout(QuantType.Q8_0, 64, 64)
    target = array(device.allocate(layout.n_bytes, "test"), (layout.n_bytes,), np.uint8)
    launch = reorder(
        layout, put(device, data).address, target.address, 0, 64, head_dim=32, rope_dim=rope_dim
    )
    device.launch(launch)
    expected = reorder_in_numpy(data[rotary_rows(64, 32, rope_dim)], layout)
    np.testing.assert_array_equal(device.download(target), expected)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(DeviceError, match="multiple of 256"):
        TileLayout(QuantType.Q4_K, 4, 640)
