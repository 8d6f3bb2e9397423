"""Dequantised weights for the reference, kept while they fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from headrace.gguf.quants import dequantize
from headrace.gguf.types import Tensor

ROW_BLOCK_BYTES = 64 << 20
"""Dequantised bytes at a time of a matrix that is not kept."""


class DequantisedWeights:
    """Float copies of tensors, made on first use and kept up to ``budget`` bytes in all.

    A matrix beyond the budget is dequantised again, in blocks of rows, each time it is used: slow,
    but a model of any size runs.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: DTypeLike, budget: int) -> None:
        self._tensors = tensors
        self._dtype = np.dtype(dtype)
        self._free = budget
        self._kept: dict[str, NDArray[Any]] = {}

    def vector(self, name: str) -> NDArray[Any]:
        """A norm's weight, a bias or frequency factors: [n]."""
        if name not in self._kept:
            tensor = self._tensors[name]
            self._kept[name] = dequantize(tensor.data, tensor.qtype)[0].astype(self._dtype)
        return self._kept[name]

    def rows(self, name: str, ids: NDArray[np.int32]) -> NDArray[Any]:
        """Rows ``ids`` [T] of a matrix: [T, k]. Only those are dequantised."""
        tensor = self._tensors[name]
        return dequantize(tensor.data[ids], tensor.qtype).astype(self._dtype)

    def row_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The matrix [n, k] as consecutive blocks of rows; one block if it is kept."""
        if name in self._kept:
            yield self._kept[name]
            return
        tensor = self._tensors[name]
        n_bytes = tensor.n_rows * tensor.k * self._dtype.itemsize
        if n_bytes <= self._free:
            self._free -= n_bytes
            self._kept[name] = dequantize(tensor.data, tensor.qtype).astype(self._dtype, copy=False)
            yield self._kept[name]
            return
        rows = max(1, ROW_BLOCK_BYTES // (tensor.k * self._dtype.itemsize))
        for start in range(0, tensor.n_rows, rows):
            block = dequantize(tensor.data[start : start + rows], tensor.qtype)
            yield block.astype(self._dtype, copy=False)
