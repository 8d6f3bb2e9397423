"""The two inner products of attention over one page of the KV cache, as LLVM kernels.

A page of one KV head holds ``PAGE_SIZE`` positions in half precision: keys transposed
``[head_dim, PAGE_SIZE]``, values ``[PAGE_SIZE, head_stride]``. Both products then run along a
vector of contiguous halves with one broadcast query value or weight, and never sum across lanes.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from headrace.backend import PAGE_SIZE
from headrace.cpu.ir import Value, f32, i64
from headrace.cpu.isa import InstructionSet

SCORES = "attention_scores"
VALUES = "attention_values"
SIGNATURE = ir.FunctionType(ir.VoidType(), [i64] * 6)

_BLOCK = 4
"""Vectors along positions (scores) or the head (values) whose sums stay in registers."""


def _const(value: int) -> Value:
    return ir.Constant(i64, value)


def _product(
    module: ir.Module,
    name: str,
    isa: InstructionSet,
    *,
    accumulate: bool,
    output_row: Callable[[Value], Value],
    input_row: Callable[[Value], Value],
) -> None:
    """``out[r, c] (+)= Σ_i in[r, i] * page[i, c]``, in fp32, halves in the page.

    Arguments: in, page, out, rows, columns (a multiple of 16), inner length; ``in`` and ``out``
    rows are ``input_row(inner)`` and ``output_row(columns)`` floats apart.
    """
    function = ir.Function(module, SIGNATURE, name)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    tile = isa.tile(b)
    source, page, out, n_rows, columns, inner = function.args
    widths = (4, 1) if isa.lanes == 16 else (2, 1)
    vector = 4 * isa.lanes

    def block(row0: Value, n: int, column0: Value, vectors: int) -> None:
        rows = [b.add(row0, _const(r)) for r in range(n)]
        sources = [b.add(source, b.mul(row, b.mul(input_row(inner), _const(4)))) for row in rows]
        targets = [
            b.add(out, b.mul(b.add(b.mul(row, output_row(columns)), column0), _const(4)))
            for row in rows
        ]
        sums = [
            [
                tile.variable(
                    tile.vec(f32),
                    tile.load(tile.at(target, v * vector), tile.vec(f32), 4)
                    if accumulate
                    else tile.floats(0.0),
                )
                for v in range(vectors)
            ]
            for target in targets
        ]
        with tile.loop(_const(0), inner) as i:
            line = b.add(page, b.mul(b.add(b.mul(i, columns), column0), _const(2)))
            halves = [tile.load_halves(tile.at(line, v * vector // 2)) for v in range(vectors)]
            for address, row_sums in zip(sources, sums, strict=True):
                x = tile.splat(tile.load(b.add(address, b.mul(i, _const(4))), f32, 4))
                for slot, half in zip(row_sums, halves, strict=True):
                    b.store(tile.fma(x, half, b.load(slot)), slot)
        for target, row_sums in zip(targets, sums, strict=True):
            for v, slot in enumerate(row_sums):
                tile.store(b.load(slot), tile.at(target, v * vector), 4)

    row_start = _const(0)
    for n in widths:
        row_stop = b.mul(b.sdiv(n_rows, _const(n)), _const(n))
        with tile.loop(row_start, row_stop, n) as row0:
            column_start = _const(0)
            for vectors in (_BLOCK, 1):
                step = vectors * isa.lanes
                column_stop = b.mul(b.sdiv(columns, _const(step)), _const(step))
                with tile.loop(column_start, column_stop, step) as column0:
                    block(row0, n, column0, vectors)
                column_start = column_stop
        row_start = row_stop
    b.ret_void()


def build_module(isa: InstructionSet) -> ir.Module:
    """``attention_scores(q, keys, scores, rows, PAGE_SIZE, head_dim)`` and
    ``attention_values(weights, values, out, rows, head_stride, positions)``.

    q: [rows, head_dim]; scores and weights: [rows, PAGE_SIZE]; out: [rows, head_stride], added to.
    """
    module = ir.Module(name=f"attention_{isa.name}")
    _product(
        module,
        SCORES,
        isa,
        accumulate=False,
        input_row=lambda inner: inner,
        output_row=lambda columns: columns,
    )
    _product(
        module,
        VALUES,
        isa,
        accumulate=True,
        input_row=lambda _: _const(PAGE_SIZE),
        output_row=lambda columns: columns,
    )
    return module
