"""What the executor asks of a device. ``gpu.CUDADevice`` is one; ``host.HostDevice`` runs the same
kernels as C++ on the CPU, for tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from headrace.cuda.compile import Specialisation


@dataclass
class Counters:
    """What the device was asked to do since the start."""

    kernel_launches: int = 0
    graph_launches: int = 0
    synchronisations: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0


@dataclass(frozen=True)
class DeviceArray:
    """An address on the device with a shape and a type. It owns nothing: its arena does."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def row(self, index: int) -> int:
        """The address of ``self[index]``."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of {self.shape}")
        return self.address + index * (self.n_bytes // self.shape[0])


@dataclass(frozen=True)
class Launch:
    """A kernel with its shape and its arguments, ready to run. ``arguments`` is one C struct."""

    spec: Specialisation
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: ctypes.Structure


class Graph(Protocol):
    """Launches recorded once, run by one call."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


class Event(Protocol):
    """A point in what the device has to do."""

    def record(self) -> None:
        """Put it after all that is queued now."""

    def wait(self) -> None:
        """Until the device is past it; not at all if it was never recorded. DeviceError if what
        was queued before it failed."""

    def close(self) -> None: ...


class Device(Protocol):
    counters: Counters
    arch: int
    """Ten times the compute capability: 75, 80, …"""
    sm_count: int
    shared_limit: int
    """Most dynamic shared memory of a block, bytes."""

    @property
    def name(self) -> str: ...

    def free_bytes(self) -> int: ...

    def allocate(self, n_bytes: int, purpose: str) -> int:
        """Address of new memory. DeviceMemoryError says the bytes wanted and free."""

    def free(self, address: int) -> None: ...

    def allocate_pinned(self, n_bytes: int) -> tuple[int, NDArray[np.uint8]]:
        """Host memory that kernels may write: its device address, and the host's view."""

    def upload(self, address: int, data: NDArray[Any]) -> None:
        """Copy to the device, in stream order; ``data`` may be reused on return."""

    def upload_pinned(self, address: int, pinned: NDArray[np.uint8]) -> None:
        """The same from memory of :meth:`allocate_pinned`, while the host goes on: it must stay as
        it is until an event recorded afterwards has been waited for."""

    def event(self) -> Event: ...

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Copy to the host and wait for it."""

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Copy on the device, in stream order."""

    def clear(self, address: int, n_bytes: int) -> None:
        """Set to zero, in stream order."""

    def prepare(self, specs: Iterable[Specialisation]) -> None:
        """Compile and load the kernels, in parallel."""

    def launch(self, launch: Launch) -> None: ...

    def capture(self, record: Callable[[], None]) -> Graph:
        """The graph of everything ``record`` launches."""

    def elapsed(self, work: Callable[[], None]) -> float:
        """Seconds between the start and the end of what ``work`` queues; waits for it."""

    def idle(self) -> bool:
        """Has everything queued been done? Does not wait. DeviceError if it failed."""

    def synchronise(self) -> None: ...

    def close(self) -> None: ...


def array(address: int, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
    return DeviceArray(address, shape, np.dtype(dtype))
