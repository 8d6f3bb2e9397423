"""A paged KV cache on a device, for tests, and the NumPy twin of its quantisation."""

from __future__ import annotations

import numpy as np
from device_memory import put

from headrace.cuda import arguments as c
from headrace.cuda.device import Device, DeviceArray
from headrace.cuda.launchers import CACHE_GROUP, PAGE_SIZE, CacheShape


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [..., dims] and scales float16 [..., dims / 32] of x float32 [..., dims], as
    kernels/kv_cache.cuh makes them; dims are padded to a multiple of 32."""
    short = -x.shape[-1] % CACHE_GROUP
    x = np.concatenate([x, np.zeros((*x.shape[:-1], short), np.float32)], -1)
    groups = x.reshape(*x.shape[:-1], -1, CACHE_GROUP)
    scales = (np.abs(groups).max(-1) * np.float32(1 / 127)).astype(np.float16)
    d = scales.astype(np.float32)
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d > 0)
    q = np.clip(np.rint(groups * inverse[..., None]), -127, 127)
    return q.astype(np.int8).reshape(x.shape), scales


def dequantise(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 [..., dims]."""
    return q * np.repeat(scales.astype(np.float64), CACHE_GROUP, -1)


class Cache:
    """A cache of random keys and values, some slots long. Where no position lies it is NaN, or in a
    quantised one the scale is; where a quantised head is padded, anything."""

    def __init__(
        self, device: Device, rng: np.random.Generator, shape: CacheShape, lengths: list[int]
    ):
        n_pages = sum(-(-n // PAGE_SIZE) for n in lengths)
        order = rng.permutation(n_pages)
        cached = np.full((2, n_pages, PAGE_SIZE, shape.n_kv_heads, shape.head_dim), np.nan, "f4")
        table = np.full((len(lengths), max(-(-n // PAGE_SIZE) for n in lengths)), -1, np.int32)
        self.shape, self.keys, self.values = shape, [], []
        for slot, n in enumerate(lengths):
            kv = rng.standard_normal((2, n, shape.n_kv_heads, shape.head_dim)).astype(np.float32)
            if shape.quantised:  # scales of many sizes
                kv *= 10 ** rng.uniform(-4, 0.5, (*kv.shape[:3], 1)).astype(np.float32)
                k, v = dequantise(*quantise(kv))[..., : shape.head_dim]
            else:
                k, v = kv.astype(np.float16).astype(np.float64)
            self.keys.append(k)
            self.values.append(v)
            for i in range(-(-n // PAGE_SIZE)):
                page, order = int(order[0]), order[1:]
                table[slot, i] = page
                some = kv[:, i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
                cached[:, page, : some.shape[1]] = some
        keys, values = cached.swapaxes(2, 3)
        self.device_keys = put(device, self._pages(keys, transposed=False))
        self.device_values = put(device, self._pages(values, transposed=True))
        self.table = put(device, table)

    def arguments(self, device: Device, positions: np.ndarray, slots: np.ndarray) -> c.Cache:
        rows = [put(device, a.astype(np.int32)).address for a in (positions, slots)]
        addresses = (self.device_keys.address, self.device_values.address, self.table.address)
        return c.Cache(*addresses, *rows, self.table.shape[1])

    def key(self, device: Device, slot: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """What the device holds: values, or quants, [kv_heads, head_dim], and scales."""
        return self._read(device, self.device_keys, slot, position, transposed=False)

    def value(self, device: Device, slot: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        return self._read(device, self.device_values, slot, position, transposed=True)

    def _pages(self, x: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Bytes [pages, heads, …] of x float32 [pages, heads, PAGE_SIZE, head_dim]."""
        shape, empty = self.shape, np.isnan(x).all(-1)
        if shape.quantised:
            q, scales = quantise(np.nan_to_num(x))
            q[empty], scales[empty] = 127, np.nan
            q[..., shape.head_dim :] = 127
            x = (q + np.int16(128)).astype(np.uint8)
        else:
            x = np.pad(x, ((0, 0),) * 3 + ((0, shape.cache_dim - shape.head_dim),))
            x, scales = x.astype(np.float16), np.empty((*x.shape[:3], 0), np.float16)
        parts = (x.swapaxes(-1, -2) if transposed else x, scales.swapaxes(-1, -2))
        flat = (np.ascontiguousarray(part).reshape(*part.shape[:2], -1) for part in parts)
        return np.concatenate([part.view(np.uint8) for part in flat], -1)

    def _read(
        self, device: Device, pages: DeviceArray, slot: int, position: int, *, transposed: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        shape, at = self.shape, position % PAGE_SIZE
        page = device.download(pages)[device.download(self.table)[slot, position // PAGE_SIZE]]
        kind = np.dtype(np.uint8 if shape.quantised else np.float16)
        n_bytes = PAGE_SIZE * shape.cache_dim * kind.itemsize
        x = np.ascontiguousarray(page[:, :n_bytes]).view(kind).reshape(shape.n_kv_heads, -1)
        if transposed:
            x = x.reshape(shape.n_kv_heads, -1, PAGE_SIZE).swapaxes(-1, -2)
        x = x.reshape(shape.n_kv_heads, PAGE_SIZE, -1)[:, at, : shape.head_dim]
        scales = np.ascontiguousarray(page[:, n_bytes:]).view(np.float16)
        scales = scales.reshape(shape.n_kv_heads, -1, PAGE_SIZE)[..., at]
        return (x.astype(np.int16) - 128 if shape.quantised else x), scales
