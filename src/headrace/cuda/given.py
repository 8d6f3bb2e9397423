"""Launches of single operations on rows that come from outside a step (``executor.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from headrace.cuda import arguments as c
from headrace.cuda import launchers, products
from headrace.cuda.device import DeviceArray, Launch
from headrace.cuda.launchers import ACTIVATIONS
from headrace.cuda.lowering import Lowering
from headrace.cuda.products import PLAIN, Activations, Matrix
from headrace.errors import DeviceError
from headrace.model.operations import Activation

FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class FeedForwardIndex:
    """A layer's feed-forward weights, resolved at load: addresses, layouts and biases."""

    gate: Matrix
    up: Matrix
    down: Matrix
    activation: Activation
    launches: dict[tuple[int, bool], list[Launch]] = field(default_factory=dict, compare=False)
    """Made once for each (number of rows, float activations)."""


class Given:
    """Over the places for rows from outside, and for results, of a lowering's arena."""

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering

    def product(
        self, matrices: Sequence[Matrix], x: DeviceArray, floats: bool
    ) -> tuple[list[Launch], DeviceArray]:
        """``W x`` side by side for matrices that share x [rows, k]: launches, and the result."""
        begin, source = self._quantised(x, matrices[0].layout.k)
        y = self._result(x.shape[0], sum(matrix.layout.n for matrix in matrices))
        return [begin, self._matvec(matrices, source, c.Store(y.address), x, floats, PLAIN)], y

    def feed_forward(
        self, index: FeedForwardIndex, x: DeviceArray, floats: bool
    ) -> tuple[list[Launch], DeviceArray]:
        """Its three kernels for x [rows, d], remembered for the next x of as many rows."""
        y = self._result(x.shape[0], index.down.layout.n)
        key = x.shape[0], floats
        launches = index.launches.get(key)
        if launches is None:
            launches = index.launches[key] = self._feed_forward(index, x, y, floats)
        elif x.shape[1] != index.gate.layout.k:
            raise DeviceError(f"rows of {x.shape[1]} values, {index.gate.layout.k} expected")
        launches[0].arguments.source = x.address
        return launches, y

    def _feed_forward(
        self, index: FeedForwardIndex, x: DeviceArray, y: DeviceArray, floats: bool
    ) -> list[Launch]:
        begin, source = self._quantised(x, index.gate.layout.k)
        hidden = self._lowering.activations("given hidden", width=index.down.layout.k)
        pair, product = [index.gate, index.up], c.Product(hidden.at(0))
        macros: dict[str, object] = {"ACTIVATION": ACTIVATIONS[index.activation]}
        return [
            begin,
            self._matvec(pair, source, product, x, floats, macros),
            self._matvec([index.down], hidden, c.Store(y.address), x, floats, PLAIN),
        ]

    def _quantised(self, x: DeviceArray, k: int) -> tuple[Launch, Activations]:
        """x as a matvec reads it, and the launch that makes it so."""
        most = self._lowering.max_rows
        if len(x.shape) != 2 or x.shape[1] != k or not 0 < x.shape[0] <= most:
            raise DeviceError(f"rows of shape {x.shape} where [1 … {most}, {k}] is expected")
        given = self._lowering.activations("given", width=k)
        return launchers.quantise(k, c.Quantise(x.address, 0, given.at(0)), x.shape[0]), given

    def _result(self, rows: int, width: int) -> DeviceArray:
        arena = self._lowering.arena
        name = "result" if width <= arena["result"].shape[1] else "logits"
        return DeviceArray(arena[name].address, (rows, width), FLOAT)

    def _matvec(
        self,
        matrices: Sequence[Matrix],
        source: Activations,
        epilogue: c.Epilogue,
        x: DeviceArray,
        floats: bool,
        macros: dict[str, object],
    ) -> Launch:
        return products.matvec(
            self._lowering.device, matrices, source, epilogue, x.shape[0],
            floats=floats, macros=macros, tuning=self._lowering.tuning,
        )  # fmt: skip
