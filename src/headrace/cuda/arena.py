"""One device allocation for many arrays, planned before it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from headrace.cuda.device import Device, DeviceArray
from headrace.errors import DeviceError

_ALIGNMENT = 256


@dataclass
class Arena:
    """Reserve arrays by name, then :meth:`allocate` once; ``arena["x"]`` is then on the device."""

    purpose: str
    n_bytes: int = 0
    _planned: dict[str, tuple[int, tuple[int, ...], np.dtype[np.generic]]] = field(
        default_factory=dict
    )
    _base: int | None = None

    def reserve(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        if name in self._planned:
            raise DeviceError(f"{self.purpose}: {name!r} is reserved twice")
        self._planned[name] = (self.n_bytes, shape, np.dtype(dtype))
        size = prod(shape) * np.dtype(dtype).itemsize
        self.n_bytes += -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT

    def allocate(self, device: Device) -> None:
        self._base = device.allocate(max(self.n_bytes, _ALIGNMENT), self.purpose)

    def free(self, device: Device) -> None:
        if self._base is not None:
            device.free(self._base)
            self._base = None

    def get(self, name: str) -> DeviceArray | None:
        """The array, or None if none of this name was reserved."""
        return self[name] if name in self._planned else None

    def __getitem__(self, name: str) -> DeviceArray:
        if self._base is None:
            raise DeviceError(f"{self.purpose}: not allocated")
        offset, shape, dtype = self._planned[name]
        return DeviceArray(self._base + offset, shape, dtype)

    def plan(self) -> list[tuple[str, int]]:
        """(name, bytes) of every array, in order."""
        return [
            (name, prod(shape) * dtype.itemsize)
            for name, (_, shape, dtype) in self._planned.items()
        ]
