"""Attention of prompts, many rows of a slot at once, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from device_memory import activations, from_brain, put, untiled
from kv_cache import Cache

from headrace.cuda import arguments as c
from headrace.cuda.device import Device
from headrace.cuda.host import HostDevice
from headrace.cuda.launchers import CacheShape, prompt_attend
from headrace.errors import DeviceError
from headrace.reference import operations

ROUNDED = 3e-3
"""Relative: q, the probabilities and the result have 11, 11 and 8 bits."""


def run(
    device: Device, shape: CacheShape, runs: list[range], *, window: int | None = None,
    softcap: float | None = None, only: slice = slice(None),
) -> np.ndarray:  # fmt: skip
    """Rows of slot i at positions ``runs[i]``: the device's result [rows, heads × dim], compared.
    ``only`` some of the rows are given to the device."""
    rng = np.random.default_rng(shape.n_heads)
    cache = Cache(device, rng, shape, [run.stop for run in runs])
    rows = [(slot, position) for slot, run in enumerate(runs) for position in run]
    q = rng.standard_normal((len(rows), shape.n_heads, shape.head_dim)).astype(np.float32)[only]
    rows = rows[only]
    slots, positions = np.array(rows).T
    n, width, scale = len(rows), shape.n_heads * shape.head_dim, shape.head_dim**-0.5
    out = activations(device, n, width, brain=True)
    arguments = c.PromptAttend(
        put(device, q).address, cache.arguments(device, positions, slots), out.at(0), n
    )
    device.launch(
        prompt_attend(device, shape, arguments, scale=scale, window=window, softcap=softcap)
    )
    got = from_brain(untiled(device.download(out.brain), n, width))
    wanted = [
        operations.attention(
            q[i : i + 1].astype(np.float64), cache.keys[slot], cache.values[slot],
            np.array([position]), scale, window, softcap,
        ).reshape(-1)
        for i, (slot, position) in enumerate(rows)
    ]  # fmt: skip
    for row, exact in zip(got, wanted, strict=True):
        assert np.linalg.norm(row - exact) < ROUNDED * np.linalg.norm(exact)
    return got


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 1, 128), (4, 2, 64), (12, 1, 32), (3, 1, 80), (2, 1, 256), (5, 1, 48), (8, 1, 96)],
)
def test_head_shapes(device: Device, heads: int, kv_heads: int, dim: int, quantised: bool) -> None:
    run(device, CacheShape(heads, kv_heads, dim, quantised=quantised), [range(45)])


def test_every_generation_of_instructions(tensor_device: Device, quantised: bool) -> None:
    run(tensor_device, CacheShape(4, 1, 64, quantised=quantised), [range(130, 250)])


def test_rows_of_several_slots(device: Device, quantised: bool) -> None:
    shape = CacheShape(8, 2, 32, quantised=quantised)
    run(device, shape, [range(3), range(60, 71), range(20), range(128, 130)])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_more_steps_than_stages(device: Device, dim: int, quantised: bool) -> None:
    run(device, CacheShape(2, 1, dim, quantised=quantised), [range(580, 600)])


@pytest.mark.parametrize("window", [1, 31, 64, 100])
def test_windows(device: Device, window: int, quantised: bool) -> None:
    run(device, CacheShape(2, 1, 32, quantised=quantised), [range(70, 170)], window=window)


def test_softcap(device: Device, quantised: bool) -> None:
    run(device, CacheShape(2, 1, 64, quantised=quantised), [range(20, 60)], softcap=1.5)


def test_a_row_is_the_same_in_any_chunk(device: Device, quantised: bool) -> None:
    shape, positions = CacheShape(4, 2, 64, quantised=quantised), [range(10, 150)]
    whole = run(device, shape, positions, window=90)
    for some in (slice(0, 33), slice(33, 100), slice(139, 140)):
        np.testing.assert_array_equal(
            run(device, shape, positions, window=90, only=some), whole[some]
        )


def test_the_order_of_threads_does_not_matter() -> None:
    results = [run(HostDevice(seed=seed), CacheShape(4, 1, 64), [range(90)]) for seed in (3, 77)]
    np.testing.assert_array_equal(*results)


def test_a_device_without_tensor_cores_is_refused() -> None:
    with pytest.raises(DeviceError, match="needs sm_80, not sm_75"):
        run(HostDevice(arch=75), CacheShape(2, 1, 64), [range(4)])
