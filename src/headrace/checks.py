"""What every backend refuses before it touches memory: indices are trusted nowhere below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE, Batch
from headrace.errors import DeviceError, DeviceMemoryError


def check_batch(batch: Batch, n_vocab: int, n_pages: int) -> None:
    """DeviceError for rows outside the vocabulary, their page table or the cache."""
    n_rows = len(batch.tokens)
    if not n_rows == len(batch.positions) == len(batch.slots) > 0:
        raise DeviceError("step: tokens, positions and slots must have one length, above 0")
    low, high = _bounds(batch.tokens)
    if low < 0 or high >= n_vocab:
        raise DeviceError(f"step: token ids must be in 0 … {n_vocab - 1}")
    n_slots, max_pages = batch.page_table.shape
    low, high = _bounds(batch.slots)
    if low < 0 or high >= n_slots:
        raise DeviceError(f"step: slots must be in 0 … {n_slots - 1}")
    low, high = _bounds(batch.positions)
    if low < 0 or high >= max_pages * PAGE_SIZE:
        raise DeviceError(f"step: positions must be in 0 … {max_pages * PAGE_SIZE - 1}")
    wanted = batch.logit_rows
    if len(wanted):
        low, last = _bounds(wanted)
        if low < 0 or last >= n_rows:
            raise DeviceError(f"step: logit_rows must be in 0 … {n_rows - 1}")
    # Not np.unique, which imports numpy.ma at its first call: the first token would wait for it.
    for slot in sorted(set(batch.slots.tolist())) if n_rows > 1 else batch.slots:
        if n_rows > 1:
            high = int(batch.positions[batch.slots == slot].max())
        used = batch.page_table[slot, : high // PAGE_SIZE + 1]
        if used.min() < 0 or used.max() >= n_pages:
            raise DeviceError(f"step: slot {slot} uses a page outside 0 … {n_pages - 1}")


def _bounds(values: NDArray[np.int32]) -> tuple[int, int]:
    """The least and the greatest; decoding has one, and no time for a reduction."""
    if len(values) == 1:
        return int(values[0]), int(values[0])
    return int(values.min()), int(values.max())


def check_copy(source: int, target: int, n_pages: int) -> None:
    if not (0 <= source < n_pages and 0 <= target < n_pages):
        raise DeviceError(f"copy_page {source} -> {target}: the cache has {n_pages} pages")


def check_host_memory(purpose: str, wanted: int, advice: str) -> None:
    """DeviceMemoryError if ``wanted`` bytes cannot be had without swapping."""
    free = _free_bytes()
    if free is not None and wanted > free:
        raise DeviceMemoryError(f"{purpose}: {wanted:,} bytes wanted, {free:,} free; {advice}")


def check_cache_memory(n_pages: int, wanted: int) -> None:
    """:func:`check_host_memory` for a KV cache."""
    advice = "ask for a shorter context or fewer sequences"
    check_host_memory(f"KV cache of {n_pages:,} pages", wanted, advice)


def _free_bytes() -> int | None:
    """Host memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next((n * 1024 for n in kib), None)
