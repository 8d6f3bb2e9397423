"""The small protocol that the three backends (reference, cpu, cuda) offer.

A step takes rows. A row is one token of one sequence: (token id, position, slot). A prompt chunk is
T rows of one slot, a decode step one row, a continuous batch one row from each of many slots: the
same step with different rows. Keys and values live in pages; ``page_table`` maps a slot's
positions to pages, and the engine owns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.model.decoder import Decoder

PAGE_SIZE = 64
"""Positions in one KV page."""


@dataclass(frozen=True)
class Batch:
    """The rows of one step.

    tokens, positions, slots: int32 [T]. Rows of a slot appear in ascending, consecutive positions,
    and every earlier position of that slot is already in the cache. Position ``p`` of slot ``s``
    lives in page ``page_table[s, p // PAGE_SIZE]`` at offset ``p % PAGE_SIZE``.
    page_table: int32 [n_slots, max_pages]; entries beyond a slot's length are ignored.
    logit_rows: int32 [R], the rows whose logits are wanted, ascending.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    page_table: NDArray[np.int32]
    logit_rows: NDArray[np.int32]


class Runner(Protocol):
    """A decoder loaded on a device, with its KV cache."""

    decoder: Decoder

    @property
    def device_name(self) -> str: ...

    def allocate_cache(self, n_pages: int) -> None:
        """Make room for ``n_pages`` pages of every layer, dropping what was cached.

        Raises DeviceMemoryError with the bytes wanted and free.
        """

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Run all operations over the rows; returns logits float32 [R, n_vocab] (a fresh array).

        Keys and values of every row are written to the cache.
        """

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        """As :meth:`step`, but returns the final normed hidden states float32 [R, d_model]."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of every layer (a shared page is copied before it is written)."""

    def close(self) -> None:
        """Release the device memory. Idempotent."""
