"""What the processor's arithmetic can do at most: the instructions the kernels use, and no memory.

The integer dot product of ``isa.py`` and the fused multiply-add, in loops whose operands are in
registers and the L1 cache, on all threads at once. Nothing built from these instructions is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.typing import DTypeLike

from headrace.cpu.compile import Library, kernel_target
from headrace.cpu.ir import Tile, Value, f32, i32, i64
from headrace.cpu.isa import InstructionSet

DOTS, FMAS = "int8 dot", "float32 FMA"
"""The two kinds of arithmetic; also the names of their kernels' results."""

_WEIGHTS = 4
"""Vectors of weights, in registers throughout."""

_SUMS = {DOTS: 4, FMAS: 10}
"""Independent sums: enough to hide the latency of an addition or an FMA, and few enough for the
16 registers of AVX2."""

_WINDOW = 4096
"""Bytes of activations that a loop reads, again and again: an eighth of an L1 cache or less."""

_LARGEST = 15
"""Of the weights: four bits, as most quantised weights have."""

_SECONDS = 0.005
_PASSES = 16


def flops_per_second(isa: InstructionSet, n_threads: int) -> dict[str, float]:
    """The best of some passes, by kind. A multiplication and an addition are two."""
    library = _library(isa)
    return {
        DOTS: _best(library.function("dots", 3), np.int8, _flops_of_round(isa, DOTS), n_threads),
        FMAS: _best(library.function("fmas", 3), np.float32, _flops_of_round(isa, FMAS), n_threads),
    }


@cache
def _library(isa: InstructionSet) -> Library:
    return Library("ceilings", kernel_target(isa), ["dots", "fmas"], lambda: str(build_module(isa)))


def _best(kernel: Callable[..., int], dtype: DTypeLike, flops: int, n_threads: int) -> float:
    data = [np.ones(2 * _WINDOW, dtype) for _ in range(n_threads)]
    results = [np.zeros(4096, np.uint8) for _ in range(n_threads)]

    def run(member: int, rounds: int) -> None:
        kernel(rounds, data[member].ctypes.data, results[member].ctypes.data)

    rounds = 10_000
    with ThreadPoolExecutor(n_threads) as pool:

        def seconds() -> float:
            start = time.perf_counter()
            list(pool.map(run, range(n_threads), [rounds] * n_threads))
            return time.perf_counter() - start

        while min(seconds() for _ in range(3)) < _SECONDS / 2:  # one may have been interrupted
            rounds *= 2
        best = min(seconds() for _ in range(_PASSES))
    return n_threads * rounds * flops / best


def _flops_of_round(isa: InstructionSet, kind: str) -> int:
    """A dot product of four vectors has four multiplications and additions in each of 4 bytes."""
    return _SUMS[kind] * isa.lanes * (2 * 4 * _WEIGHTS if kind == DOTS else 2)


def build_module(isa: InstructionSet) -> ir.Module:
    """``dots`` and ``fmas``: (rounds, address of data, address for the sums) -> 0."""
    module = ir.Module(name="ceilings")
    for name, kind in (("dots", DOTS), ("fmas", FMAS)):
        function = ir.Function(module, ir.FunctionType(i64, [i64, i64, i64]), name)
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        _emit_loop(isa, isa.tile(builder), kind, *function.args)
    return module


def _emit_loop(
    isa: InstructionSet, tile: Tile, kind: str, rounds: Value, data: Value, out: Value
) -> None:
    b, scalar = tile.b, i32 if kind == DOTS else f32
    vector = tile.vec(scalar)
    weights = [tile.load(tile.at(data, 64 * j), vector, 4) for j in range(_WEIGHTS)]
    sums = [
        tile.variable(vector, tile.load(tile.at(out, 64 * i), vector, 4))
        for i in range(_SUMS[kind])
    ]
    # Other activations every round: a product is not a constant of the loop.
    with tile.loop(_const(0), rounds) as i:
        at = b.add(data, b.and_(b.mul(i, _const(64)), _const(_WINDOW - 1)))
        for n, total in enumerate(sums):
            if kind == DOTS:
                xs = [_broadcast(tile, at, _WEIGHTS * n + j, i32) for j in range(_WEIGHTS)]
                value = b.add(b.load(total), isa.dot(tile, weights, xs, _LARGEST))
            else:
                x = _broadcast(tile, at, n // _WEIGHTS, f32)
                value = tile.fma(weights[n % _WEIGHTS], x, b.load(total))
            b.store(value, total)
    for n, total in enumerate(sums):
        tile.store(b.load(total), tile.at(out, 64 * n), 4)
    b.ret(_const(0))


def _broadcast(tile: Tile, at: Value, index: int, kind: ir.Type) -> Value:
    """The ``index``-th four bytes at ``at`` in every lane."""
    return tile.splat(tile.load(tile.at(at, 4 * index), kind, 4))


def _const(value: int) -> ir.Constant:
    return ir.Constant(i64, value)
