"""The CUDA kernels as C++ on the CPU: the executor's device in tests, and under AddressSanitizer.

Device memory is NumPy memory, poisoned with 0xFF bytes (NaN) when allocated. What is queued is done
at once, or with ``asynchronous`` as late as it may be: when something waits for it. ``seed`` orders
the threads (kernels/host_primitives.hpp).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.cuda.compile import Specialisation, host_library
from headrace.cuda.device import Counters, DeviceArray, Event, Graph, Launch
from headrace.errors import DeviceError, DeviceMemoryError


class HostGraph:
    def __init__(self, device: HostDevice, steps: list[Callable[[], None]]) -> None:
        self._device, self._steps = device, steps

    def launch(self) -> None:
        self._device.counters.graph_launches += 1
        for step in self._steps:
            self._device.queue(step)

    def close(self) -> None:
        self._steps = []


class HostEvent:
    def __init__(self, device: HostDevice) -> None:
        self._device, self._after = device, 0

    def record(self) -> None:
        self._after = self._device.n_queued

    def wait(self) -> None:
        self._device.run_queued(self._after)

    def close(self) -> None:
        pass


class HostDevice:
    """See :class:`headrace.cuda.device.Device`. ``memory_limit`` makes running out testable,
    ``asynchronous`` what is changed or freed before the device has read it."""

    def __init__(
        self,
        arch: int = 90,
        sm_count: int = 3,
        seed: int = 1,
        memory_limit: int = 1 << 32,
        *,
        asynchronous: bool = False,
    ) -> None:
        self.arch, self.sm_count, self.seed = arch, sm_count, seed
        self.shared_limit = {75: 64 << 10, 80: 163 << 10}.get(arch, 227 << 10)
        self.counters = Counters()
        self.sanitise = bool(os.environ.get("HEADRACE_SANITISE"))
        self._limit = memory_limit
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._libraries: dict[Specialisation, ctypes.CDLL] = {}
        self._recording: list[Callable[[], None]] | None = None
        self._asynchronous = asynchronous
        self._queue: deque[Callable[[], None]] = deque()
        self.n_queued = 0
        """Since the start."""
        self.late: list[tuple[int, NDArray[np.uint8]]] = []
        """(address, bytes), four at most, that arrive while the next kernel already runs: when it
        waits for the kernel before it."""

    @property
    def name(self) -> str:
        return f"host build of sm_{self.arch}"

    def free_bytes(self) -> int:
        return self._limit - sum(block.size for block in self._memory.values())

    def allocate(self, n_bytes: int, purpose: str) -> int:
        free = self.free_bytes()
        if n_bytes > free:
            raise DeviceMemoryError(f"{purpose}: {n_bytes:,} bytes wanted, {free:,} free")
        block = np.full(n_bytes + 256, 0xFF, np.uint8)
        address = -(-block.ctypes.data // 256) * 256
        self._memory[address] = block
        self._guard("__asan_poison_memory_region", address, n_bytes)
        return address

    def _guard(self, function: str, address: int, n_bytes: int) -> None:
        """Under AddressSanitizer: forbid (or allow) what lies between the array and its end."""
        if self.sanitise:
            block = self._memory[address]
            slack = block.ctypes.data + block.size - address - n_bytes
            call = getattr(ctypes.CDLL(None), function)
            call(ctypes.c_void_p(address + n_bytes), ctypes.c_size_t(slack))

    def free(self, address: int) -> None:
        if self._queue:
            raise DeviceError(f"memory is freed while {len(self._queue)} pieces of work may use it")
        self._guard("__asan_unpoison_memory_region", address, 0)
        del self._memory[address]

    def allocate_pinned(self, n_bytes: int) -> tuple[int, NDArray[np.uint8]]:
        address = self.allocate(n_bytes, "pinned")
        view = self._view(address, n_bytes)
        view[:] = 0
        return address, view

    @staticmethod
    def _view(address: int, n_bytes: int) -> NDArray[np.uint8]:
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))

    def queue(self, step: Callable[[], None]) -> None:
        """Into the graph that is being captured, or after what is queued."""
        if self._recording is not None:
            self._recording.append(step)
            return
        self._queue.append(step)
        self.n_queued += 1
        if not self._asynchronous:
            self.run_queued()

    def run_queued(self, until: int | None = None) -> None:
        """What was queued first, up to as many as ``until`` since the start; all unless given."""
        n_left = 0 if until is None else self.n_queued - until
        try:
            while len(self._queue) > n_left:
                self._queue.popleft()()
        except BaseException:
            self._queue.clear()
            raise

    def upload(self, address: int, data: NDArray[Any]) -> None:
        self.upload_pinned(address, np.array(data).reshape(-1).view(np.uint8))

    def upload_pinned(self, address: int, pinned: NDArray[np.uint8]) -> None:
        self.counters.bytes_to_device += pinned.size

        def step() -> None:
            self._view(address, pinned.size)[:] = pinned

        self.queue(step)

    def event(self) -> Event:
        return HostEvent(self)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        self.run_queued()
        self.counters.bytes_to_host += array.n_bytes
        self.counters.synchronisations += 1
        raw = self._view(array.address, array.n_bytes).copy()
        return raw.view(array.dtype).reshape(array.shape)

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        def step() -> None:
            ctypes.memmove(target, source, n_bytes)

        self.queue(step)

    def clear(self, address: int, n_bytes: int) -> None:
        def step() -> None:
            ctypes.memset(address, 0, n_bytes)

        self.queue(step)

    def prepare(self, specs: Iterable[Specialisation]) -> None:
        missing = [spec for spec in dict.fromkeys(specs) if spec not in self._libraries]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            paths = pool.map(lambda s: host_library(s, self.arch, sanitise=self.sanitise), missing)
            for spec, path in zip(missing, paths, strict=True):
                library = ctypes.CDLL(str(path))
                library.host_args_size.restype = ctypes.c_size_t
                library.host_late.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
                library.host_launch.restype = ctypes.c_char_p
                library.host_launch.argtypes = [
                    ctypes.c_void_p,
                    *[ctypes.c_uint32] * 5,
                    ctypes.c_uint64,
                ]
                self._libraries[spec] = library

    def launch(self, launch: Launch) -> None:
        if launch.spec not in self._libraries:
            self.prepare([launch.spec])
        library = self._libraries[launch.spec]
        expected = library.host_args_size()
        if expected != ctypes.sizeof(launch.arguments):
            raise DeviceError(
                f"{launch.spec.name}: arguments of {ctypes.sizeof(launch.arguments)} bytes for a "
                f"kernel that takes {expected}"
            )
        if launch.shared_bytes > self.shared_limit:
            raise DeviceError(f"{launch.spec.name}: {launch.shared_bytes:,} bytes of shared memory")

        arguments = type(launch.arguments).from_buffer_copy(launch.arguments)

        def run() -> None:
            self.seed += 1
            late, self.late = self.late, []
            for address, data in late:
                library.host_late(address, data.ctypes.data, data.size)
            fault = library.host_launch(
                ctypes.addressof(arguments),
                *launch.grid,
                launch.threads,
                launch.shared_bytes,
                self.seed,
            )
            if fault:
                raise DeviceError(f"{launch.spec.name} {launch.grid}: {fault.decode()}")

        if self._recording is None:
            self.counters.kernel_launches += 1
        self.queue(run)

    def capture(self, record: Callable[[], None]) -> Graph:
        self._recording = []
        try:
            record()
            return HostGraph(self, self._recording)
        finally:
            self._recording = None

    def elapsed(self, work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - start

    def idle(self) -> bool:
        self.run_queued()
        return True

    def synchronise(self) -> None:
        self.run_queued()
        self.counters.synchronisations += 1

    def close(self) -> None:
        self.run_queued()
        for address in list(self._memory):
            self.free(address)
