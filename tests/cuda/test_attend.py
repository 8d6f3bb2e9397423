"""Attention over the paged cache, and the rotary kernel that fills it, against float64 NumPy: over
the very keys and values that the cache holds, quantised or f16."""

from __future__ import annotations

import numpy as np
import pytest
from device_memory import activations, check_squares, poisoned, put, read_quantised
from kv_cache import Cache, dequantise

from headrace.cuda import arguments as c
from headrace.cuda.device import Device
from headrace.cuda.host import HostDevice
from headrace.cuda.launchers import CacheShape, attend, head_tiles, max_splits, rotary
from headrace.cuda.tuning import ALLOWED, DEFAULTS, Tuning
from headrace.model.operations import Pairing, Rope
from headrace.reference import operations


def run(
    device: Device, shape: CacheShape, rows: list[tuple[int, int]], lengths: list[int], *,
    window: int | None = None, softcap: float | None = None, longest: int | None = None,
    late: bool = False, tuning: Tuning = DEFAULTS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(device, its int8 copy, reference), [rows, heads × dim]; rows are (slot, position)."""
    rng = np.random.default_rng(len(lengths) + shape.n_heads)
    cache = Cache(device, rng, shape, lengths)
    slots, positions = np.array(rows).T
    n, heads, width = len(rows), shape.n_heads, shape.n_heads * shape.head_dim
    q = rng.standard_normal((n, heads, shape.head_dim)).astype(np.float32)
    out = activations(device, n, width)
    most = max_splits(device, shape)
    work = [
        poisoned(device, (n, heads, most, shape.cache_dim)).address,
        poisoned(device, (n, heads, most, 2)).address,
        put(device, np.zeros((n, head_tiles(heads, shape.n_kv_heads)), np.uint32)).address,
    ]
    scale = shape.head_dim**-0.5
    arguments = c.Attend(
        put(device, q).address, cache.arguments(device, positions, slots), out.at(0), *work
    )
    launch = attend(
        device, shape, arguments, n, longest or int(positions.max()) + 1,
        scale=scale, window=window, softcap=softcap, tuning=tuning,
    )  # fmt: skip
    if late:
        assert isinstance(device, HostDevice)
        for array in (cache.device_keys, cache.device_values):
            device.late.append((array.address, device.download(array).reshape(-1).view(np.uint8)))
            device.clear(array.address, array.n_bytes)
    device.launch(launch)
    if not late:
        device.launch(launch)  # the arrival counters are as they were
    wanted = np.concatenate(
        [
            operations.attention(
                q[i : i + 1].astype(np.float64), cache.keys[slot], cache.values[slot],
                np.array([position]), scale, window, softcap,
            ).reshape(1, -1)
            for i, (slot, position) in enumerate(rows)
        ]
    )  # fmt: skip
    values = device.download(out.values)
    check_squares(device, out, values)
    return values, read_quantised(device, out), wanted


def check(got: np.ndarray, quantised: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(got - wanted).max() < 2e-6 * np.abs(wanted).max() * 10
    assert np.linalg.norm(quantised - wanted) < 0.01 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 1, 128), (2, 2, 64), (12, 1, 32), (3, 1, 80), (2, 1, 256), (16, 2, 96)],
)
def test_head_shapes(device: Device, heads: int, kv_heads: int, dim: int, quantised: bool) -> None:
    shape = CacheShape(heads, kv_heads, dim, quantised=quantised)
    check(*run(device, shape, [(0, 0), (0, 40)], [41]))


def test_every_generation_of_instructions(any_device: Device, quantised: bool) -> None:
    check(*run(any_device, CacheShape(4, 1, 64, quantised=quantised), [(0, 300)], [301]))


def test_rows_of_several_slots_over_many_splits(device: Device, quantised: bool) -> None:
    rows = [(0, 129), (1, 5), (2, 700), (2, 701), (0, 63)]
    check(*run(device, CacheShape(4, 2, 32, quantised=quantised), rows, [130, 6, 702]))


@pytest.mark.parametrize("window", [1, 31, 64, 200])
def test_windows(device: Device, window: int, quantised: bool) -> None:
    shape = CacheShape(2, 1, 32, quantised=quantised)
    check(*run(device, shape, [(0, 10), (0, 330)], [331], window=window))


def test_what_a_step_writes_is_read_when_it_is_written(quantised: bool) -> None:
    """Rows of one sequence see each other's keys and values, of this very step."""
    shape = CacheShape(4, 1, 64, quantised=quantised)
    rows = [(0, 300), (0, 299), (0, 40)]
    check(*run(HostDevice(seed=1), shape, rows, [301], late=True))


def test_softcap(device: Device, quantised: bool) -> None:
    shape = CacheShape(2, 1, 64, quantised=quantised)
    check(*run(device, shape, [(0, 200)], [201], softcap=1.5))


def test_a_row_does_not_depend_on_the_grid(device: Device) -> None:
    """A bound on the length that is too small, or far too large, only changes the speed."""
    results = [
        run(device, CacheShape(4, 1, 32), [(0, 500)], [501], longest=longest)[0]
        for longest in (1, 501, 1 << 15)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


CUTS = [
    *((n, 256, 40, None) for n in ALLOWED["attend_warps"]),
    *((8, n, 40, None) for n in ALLOWED["attend_split"] if n != DEFAULTS.attend_split),
    (2, 64, 40, 200),
    (8, 64, 2, 200),
    (2, 1024, 2, None),
]
"""Warps, positions of a split, multiprocessors (a row has no more splits), and window."""


@pytest.mark.parametrize(("warps", "split", "sm_count", "window"), CUTS)
def test_any_warps_and_splits(
    warps: int, split: int, sm_count: int, window: int | None, quantised: bool
) -> None:
    """The last page is full, half full, and begun. A row is the same whatever bound on its length
    the grid was made for, and whoever is beside it."""
    shape = CacheShape(4, 1, 64, quantised=quantised)
    rows, lengths = [(0, 1279), (1, 1055), (2, 64), (2, 0)], [1280, 1056, 65]
    tuning = Tuning(attend_warps=warps, attend_split=split)
    devices = [HostDevice(sm_count=sm_count, seed=seed) for seed in (1, 2, 7)]
    few, many, alone = (
        run(device, shape, some, lengths, longest=longest, window=window, tuning=tuning)
        for device, some, longest in zip(
            devices, (rows, rows, rows[:1]), (1, 1 << 15, 1280), strict=True
        )
    )
    check(*few)
    np.testing.assert_array_equal(many[0], few[0])
    np.testing.assert_array_equal(alone[0], few[0][:1])


def test_the_kernel_cuts_as_it_is_told() -> None:
    """Each way rounds otherwise: the constants arrive."""
    results = [
        run(
            HostDevice(sm_count=40), CacheShape(4, 1, 64), [(0, 1279)], [1280],
            tuning=Tuning(attend_warps=warps, attend_split=split),
        )[0]
        for warps, split in ((8, 256), (4, 256), (8, 64), (8, 128), (8, 512), (8, 1024))
    ]  # fmt: skip
    for i, one in enumerate(results):
        assert not any(np.array_equal(one, other) for other in results[:i]), i


def test_the_order_of_threads_does_not_matter() -> None:
    results = [
        run(HostDevice(seed=seed), CacheShape(4, 1, 64), [(0, 300)], [301])[0] for seed in (3, 77)
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("norms", [(True, True), (False, True)])
def test_rotary_norms_rotates_and_fills_the_cache(
    device: Device, norms: tuple[bool, bool], quantised: bool
) -> None:
    rng = np.random.default_rng(1)
    shape = CacheShape(3, 1, 96, 64, 1.25, quantised)
    rows = [(0, 100_000 % 128), (1, 3)]
    cache = Cache(device, rng, shape, [128, 4])
    slots, positions = np.array(rows).T
    qkv = rng.standard_normal((2, 5, 96)).astype(np.float32)
    gains = rng.uniform(0.5, 2, (2, 96)).astype(np.float32)
    rope = Rope(1e4, 64, Pairing.INTERLEAVED, magnitude=1.25)
    inv_freq = operations.inverse_frequencies(rope, None)
    q = poisoned(device, (2, 3, 96))
    arguments = c.RotaryHeads(
        put(device, qkv).address, put(device, gains[0]).address, put(device, gains[1]).address,
        q.address, cache.arguments(device, positions, slots),
        put(device, inv_freq / (2 * np.pi)).address,
    )  # fmt: skip
    device.launch(rotary(shape, arguments, 2, eps=1e-6, q_norm=norms[0], k_norm=norms[1]))

    heads = qkv.astype(np.float64)
    normed = [
        operations.rms_norm(heads[:, part], gain.astype(np.float64), 1e-6)
        if norm
        else heads[:, part]
        for part, gain, norm in (
            (slice(0, 3), gains[0], norms[0]),
            (slice(3, 4), gains[1], norms[1]),
        )
    ]
    wanted_q, wanted_k = (operations.rotate(x, positions, rope, inv_freq) for x in normed)
    np.testing.assert_allclose(device.download(q), wanted_q, atol=2e-6)
    for i, (slot, position) in enumerate(rows):
        for (got, scales), exact in (
            (cache.key(device, slot, position), wanted_k[i]),
            (cache.value(device, slot, position), qkv[i, 4:]),
        ):
            near = np.abs(exact).max() / 250 if quantised else 1e-3
            got = dequantise(got, scales) if quantised else got
            np.testing.assert_allclose(got, exact, rtol=1e-3, atol=near)
