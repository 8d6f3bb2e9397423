"""The KV cache on a device, and the arrays in which a step finds its rows: one allocation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from headrace.backend import PAGE_SIZE, Batch
from headrace.checks import check_batch, check_copy
from headrace.cuda.arena import Arena
from headrace.cuda.device import Device, DeviceArray
from headrace.cuda.launchers import CacheShape
from headrace.cuda.steps import Inputs, LayerCache
from headrace.errors import DeviceError


def plan(shapes: Mapping[int, CacheShape], max_rows: int, n_pages: int) -> Arena:
    """Room for ``n_pages`` pages of every layer, and for the rows of a step."""
    arena = Arena("KV cache")
    # One upload brings a step's rows: they lie together, the page table last.
    arena.reserve("inputs", (3 * max_rows + max_rows * n_pages,), np.int32)
    for layer, shape in shapes.items():
        for name in ("keys", "values"):
            arena.reserve(f"{name} {layer}", (n_pages, shape.page_bytes()), np.uint8)
    return arena


class Cache:
    """Raises DeviceMemoryError when there is no room for it."""

    def __init__(
        self, device: Device, shapes: Mapping[int, CacheShape], max_rows: int, n_pages: int
    ) -> None:
        self._device, self._shapes, self.n_pages = device, shapes, n_pages
        self._arena = arena = plan(shapes, max_rows, n_pages)
        arena.allocate(device)
        base = arena["inputs"].address

        def part(start: int, *shape: int) -> DeviceArray:
            return DeviceArray(base + 4 * start, shape, np.dtype(np.int32))

        n = max_rows
        self.inputs = Inputs(part(0, n), part(n, n), part(2 * n, n), part(3 * n, n, n_pages))
        self.layers = {}
        for layer in shapes:
            keys, values = arena[f"keys {layer}"], arena[f"values {layer}"]
            # Positions not yet written are masked, but dims that pad a head are read.
            device.clear(keys.address, keys.n_bytes)
            device.clear(values.address, values.n_bytes)
            self.layers[layer] = LayerCache(keys.address, values.address)

    def bring(self, batch: Batch, n_vocab: int, n_columns: int | None = None) -> None:
        """Rows and the pages of the slots they use, renumbered, to the device in one copy.

        ``n_columns``: pages of each slot to bring; those of the rows' positions alone unless given.
        """
        check_batch(batch, n_vocab, self.n_pages)
        columns = n_columns or int(batch.positions.max()) // PAGE_SIZE + 1
        if columns > self.n_pages:
            raise DeviceError(
                f"step: position {int(batch.positions.max())} lies beyond a cache of "
                f"{self.n_pages} pages of {PAGE_SIZE}"
            )
        n, n_rows = len(batch.tokens), self.inputs.tokens.shape[0]
        used, slots = np.unique(batch.slots, return_inverse=True)
        packed = np.zeros(3 * n_rows + len(used) * self.n_pages, np.int32)
        packed[:n], packed[n_rows : n_rows + n] = batch.tokens, batch.positions
        packed[2 * n_rows : 2 * n_rows + n] = slots
        table = packed[3 * n_rows :].reshape(len(used), self.n_pages)
        table[:, :columns] = batch.page_table[used, :columns]
        self._device.upload(self.inputs.tokens.address, packed)

    def copy_page(self, source: int, target: int) -> None:
        check_copy(source, target, self.n_pages)
        for layer, shape in self._shapes.items():
            for name in ("keys", "values"):
                pages = self._arena[f"{name} {layer}"]
                self._device.copy(pages.row(target), pages.row(source), shape.page_bytes())

    def plan(self) -> list[tuple[str, int]]:
        return self._arena.plan()

    def close(self) -> None:
        self._arena.free(self._device)
