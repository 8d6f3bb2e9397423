"""The matrices of a model in the kernels' order (``tiles.py``), in one allocation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np

from headrace.checks import check_host_memory
from headrace.cpu.compile import interleave_library
from headrace.cpu.tiles import HALF_AT, block_bytes, n_tiles
from headrace.gguf.reader import let_go
from headrace.gguf.types import Tensor

_ALIGNMENT = 64
_PART_BYTES = 8 << 20
"""What a thread interleaves at a time, about."""


class Weights:
    """Reserve every matrix, then :meth:`load` them all."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._offsets: dict[str, int] = {}
        self._tensors: list[Tensor] = []
        self._n_bytes = 0
        self._memory: mmap | None = None
        self._base = 0

    def reserve(self, tensor: Tensor) -> None:
        """Plan room for a matrix; one that was reserved already (a tied head) has it."""
        if tensor.name in self._offsets:
            return
        self._offsets[tensor.name] = self._n_bytes
        self._tensors.append(tensor)
        n_bytes = n_tiles(tensor.n_rows, self._lanes) * self._lanes * tensor.data.shape[1]
        self._n_bytes += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT

    def load(self, threads: int) -> None:
        """Bring every matrix into its place. DeviceMemoryError when there is no room for them."""
        check_host_memory("weights", self._n_bytes, "use a smaller model or quantisation")
        # Private: shared memory, mmap's default, gets no huge pages.
        self._memory = mmap(-1, max(self._n_bytes, 1), MAP_PRIVATE | MAP_ANONYMOUS)
        self._memory.madvise(MADV_HUGEPAGE)
        self._base = np.frombuffer(self._memory, np.uint8).ctypes.data
        run = interleave_library().function("interleave", 9)

        def move(part: tuple[Tensor, int, int]) -> None:
            tensor, first, last = part
            size = block_bytes(tensor.qtype)
            row_bytes = tensor.data.shape[1]
            run(
                tensor.data.ctypes.data, self.address(tensor.name), tensor.n_rows,
                row_bytes, size, HALF_AT.get(tensor.qtype, size), self._lanes, first, last,
            )  # fmt: skip
            let_go(tensor.data[first * self._lanes : last * self._lanes])

        with ThreadPoolExecutor(threads, "headrace-weights") as pool:
            for _ in pool.map(move, self._parts()):
                pass

    def _parts(self) -> Iterator[tuple[Tensor, int, int]]:
        """Runs of tiles: (tensor, first, last + 1)."""
        for tensor in self._tensors:
            total = n_tiles(tensor.n_rows, self._lanes)
            run = max(1, _PART_BYTES // (self._lanes * tensor.data.shape[1]))
            for first in range(0, total, run):
                yield tensor, first, min(first + run, total)

    def address(self, name: str) -> int:
        """Of the first tile of the matrix ``name``."""
        return self._base + self._offsets[name]
