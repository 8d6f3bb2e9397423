"""Rows of a step, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.backend import PAGE_SIZE, Batch


def n_pages(length: int) -> int:
    """Pages that ``length`` positions need."""
    return -(-length // PAGE_SIZE)


def one_sequence(
    tokens: Sequence[int],
    start: int = 0,
    logit_rows: Sequence[int] | None = None,
    pages: Sequence[int] | None = None,
) -> Batch:
    """``tokens`` at positions ``start`` … of slot 0; logits of every row unless said."""
    return rows([(0, start + i, token) for i, token in enumerate(tokens)], [pages], logit_rows)


def rows(
    slot_position_token: Sequence[tuple[int, int, int]],
    pages: Sequence[Sequence[int] | None],
    logit_rows: Sequence[int] | None = None,
) -> Batch:
    """A batch of (slot, position, token) rows. ``pages[slot]``: its pages, or None for 0, 1, …"""
    slots, positions, tokens = np.array(slot_position_token, np.int32).reshape(-1, 3).T
    width = max(n_pages(int(positions.max()) + 1), *(len(p or ()) for p in pages), 1)
    table = np.full((len(pages), width), -1, np.int32)  # -1: reading an unused entry shows
    for slot, given in enumerate(pages):
        chosen = list(range(width)) if given is None else list(given)
        table[slot, : len(chosen)] = chosen
    wanted = np.arange(len(tokens)) if logit_rows is None else np.array(list(logit_rows))
    return Batch(
        tokens=np.ascontiguousarray(tokens),
        positions=np.ascontiguousarray(positions),
        slots=np.ascontiguousarray(slots),
        page_table=table,
        logit_rows=wanted.astype(np.int32),
    )
