"""Cosines and sines of rotary angles, computed once for each position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.model.operations import Rope

_FIRST = 256


class Angles:
    """``ropes`` with the angle per position of each of their pairs, float64 [dim / 2].

    The tables double when a position lies beyond them: 8 bytes a pair and position.
    """

    def __init__(self, ropes: Sequence[Rope], inv_freq: Sequence[NDArray[np.float64]]) -> None:
        self._ropes = list(zip(ropes, inv_freq, strict=True))
        self._n = 0
        self._tables: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def fill(
        self,
        positions: NDArray[np.int32],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
    ) -> None:
        """Into ``cos`` and ``sin`` float32 [n_ropes, rows, pairs], times the ropes' magnitudes."""
        n = len(positions)
        rows = positions if n > 1 else int(positions[0])
        if (last := int(positions[-1] if n == 1 else positions.max())) >= self._n:
            self._extend(last + 1)
        for i, (table_cos, table_sin) in enumerate(self._tables):
            half = table_cos.shape[1]
            cos[i, :n, :half] = table_cos[rows]
            sin[i, :n, :half] = table_sin[rows]

    def _extend(self, n: int) -> None:
        self._n = max(_FIRST, 1 << (n - 1).bit_length())
        positions = np.arange(self._n)[:, None]
        self._tables = []
        for rope, frequencies in self._ropes:
            angles = positions * frequencies  # float64: positions are large, float32 is not
            self._tables.append(
                (
                    (rope.magnitude * np.cos(angles)).astype(np.float32),
                    (rope.magnitude * np.sin(angles)).astype(np.float32),
                )
            )
