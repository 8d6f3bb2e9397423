"""What a step is, and where it finds its rows and its cache on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cuda.device import DeviceArray


@dataclass(frozen=True)
class Inputs:
    """Where a step finds its rows: int32 arrays on the device."""

    tokens: DeviceArray
    positions: DeviceArray
    slots: DeviceArray
    page_table: DeviceArray


@dataclass(frozen=True)
class LayerCache:
    keys: int
    values: int


@dataclass(frozen=True)
class Step:
    """What a step's launches depend on. ``longest``: a bound on position + 1 of its rows;
    ``logit_runs``: (first row, rows) of each run of consecutive rows whose logits are wanted.
    ``prompt``: the rows are a prompt's, for the kernels made for many of them."""

    n_rows: int
    longest: int
    logit_runs: tuple[tuple[int, int], ...]
    prompt: bool = False


def runs(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending row numbers as (first, count) of consecutive ones."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and sum(found[-1]) == row:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((int(row), 1))
    return tuple(found)
