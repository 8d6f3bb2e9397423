"""Weights to the device: threads read them into pinned memory, piece by piece, and see that they
are finite, while the device fetches the pieces before.

The driver copies from pageable memory by one thread, and the one that asks waits for it. From
pinned memory the device's own engine copies at the speed of the bus, but to pin all of the file
would take longer than to read it: a few slots serve all pieces in turn.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.cuda.device import Device, Launch
from headrace.gguf.quants import check_rows_finite
from headrace.gguf.reader import read_into
from headrace.gguf.types import Tensor

SLOT_BYTES = 8 << 20
"""A piece, about: large enough that queueing it is little of what copying it takes."""

_SLOTS = 8
"""Pinning takes time for each."""

_READING = 6
"""Pieces that threads copy while the device fetches the others; of the threads themselves there are
no more than cores."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor, and the kernel that takes them from an address of the device."""

    tensor: Tensor
    first: int
    n_rows: int
    kernel: Callable[[int], Launch]

    @property
    def data(self) -> NDArray[np.uint8]:
        return self.tensor.data[self.first : self.first + self.n_rows]


class _Slot:
    """Pinned memory, and the event after the last copy from it."""

    def __init__(self, device: Device, n_bytes: int, undo: ExitStack) -> None:
        address, self.memory = device.allocate_pinned(n_bytes)
        undo.callback(device.free, address)
        self.copied = device.event()
        undo.callback(self.copied.close)

    def fill(self, piece: Piece) -> None:
        data = piece.data
        memory = self._part(data.size).reshape(data.shape)
        read_into(memory, data)
        check_rows_finite(piece.tensor, piece.first, memory)

    def send(self, device: Device, address: int, n_bytes: int) -> None:
        device.upload_pinned(address, self._part(n_bytes))
        self.copied.record()

    def _part(self, n_bytes: int) -> NDArray[np.uint8]:
        return self.memory[:n_bytes]


def upload(
    device: Device, pieces: Iterable[Piece], most_bytes: int, progress: Progress | None = None
) -> None:
    """Copy every piece of up to ``most_bytes`` to the device and run its kernel, one after the
    other; wait for the last. ``progress`` is told the bytes of each piece.

    It takes ``most_bytes`` on the device meanwhile. However it ends, nothing runs on and no memory
    is kept. Raises DeviceError, GGUFError for weights that are not finite or no longer there, and
    what ``pieces`` and ``progress`` raise.
    """
    with ExitStack() as memory:
        staging = device.allocate(most_bytes, "staging for weights")
        memory.callback(device.free, staging)
        # Threads and device have done with the memory before it goes: this is undone first.
        with ExitStack() as work:
            work.callback(device.synchronise)
            n_threads = min(_READING, os.cpu_count() or 1)
            threads = work.enter_context(ThreadPoolExecutor(n_threads, "headrace-weights"))
            slots: list[_Slot] = []
            reading: deque[tuple[Piece, _Slot, Future[None]]] = deque()

            def send() -> None:
                piece, slot, filled = reading.popleft()
                filled.result()
                slot.send(device, staging, piece.data.size)
                device.launch(piece.kernel(staging))
                if progress:
                    progress(piece.data.size)

            for i, piece in enumerate(pieces):
                if len(reading) == _READING:
                    send()
                if i < _SLOTS:  # one at a time: the threads begin with the first
                    slots.append(_Slot(device, most_bytes, memory))
                slot = slots[i % _SLOTS]
                slot.copied.wait()
                reading.append((piece, slot, threads.submit(slot.fill, piece)))
            while reading:
                send()
