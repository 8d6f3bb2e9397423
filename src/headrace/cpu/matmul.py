"""The matmul kernels: packed weights × rows of activations, for any number of rows.

One generator for every quantised format: unpack a tile's blocks, then let every activation row pass
over them. A single row (decode) uses the unpacked vectors straight from registers; more rows
(prefill, batches) read them back from a scratch buffer that stays in the L1 cache. The sums are
formed in the same order either way, so a row's result does not depend on its neighbours.

Activations are int8 in groups of 16 with one float scale (see ``quantise_row`` in ``ops.py``), each
group described by :data:`GROUP_RECORD`. Float weights (F32, F16, BF16) multiply float activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from llvmlite import ir

from headrace.cpu.ir import Value, f32, i32, i64
from headrace.cpu.isa import InstructionSet
from headrace.cpu.tiles import PLAIN_BLOCK, block_bytes
from headrace.cpu.unpack import UNPACKERS, Group, Unpacker
from headrace.gguf.types import QuantType

GROUP = 16
"""Activations that share a scale. Half llama.cpp's 32: about half the error (docs/decisions)."""

GROUP_RECORD = np.dtype(
    [
        ("scale", np.float32),
        ("sum", np.float32),  # scale × sum of the 16 int8 values
        ("pair_sum", np.float32),  # sum of this group and its neighbour in 32
        ("unused", np.float32),
    ]
)
"""What a matmul needs to know of 16 activations besides their int8 values: as many bytes."""

ARGUMENTS = ("weights", "n", "x", "records", "t", "y", "y_stride", "accumulate")
"""The int64 fields of a kernel's argument array; addresses and strides in bytes.

weights: packed [n, k] in tiles (``tiles.py``);
x: int8 [t, k] (float32 for float weights); records: [t, k/16]; y: float32 with row stride
``y_stride``; accumulate: 1 to add to y.
"""

SIGNATURE = ir.FunctionType(ir.VoidType(), [i64, i64, i64, i64])
"""kernel(arguments, first tile, last tile + 1, scratch)."""

_FIELD = {"scale": 0, "sum": 4, "pair_sum": 8}
"""Byte offsets in a record."""

_BATCH = 256
"""Weights of a row unpacked at a time when several activation rows share them."""

_AHEAD = 4096
"""Bytes of weights asked for before they are needed."""

_WIDTHS = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 2, 1)}
"""Activation rows that pass together, by lanes: as many as their sums fit in registers."""


def scratch_bytes(t: int) -> int:
    """Scratch one thread needs for ``t`` activation rows."""
    vector = 64
    return _BATCH // 4 * vector + 2 * _BATCH // 16 * vector + t * vector


def _const(value: int) -> Value:
    return ir.Constant(i64, value)


class _Kernel:
    """Emits one kernel. The sums of row ``i`` live at ``totals + i * vector`` between batches."""

    def __init__(
        self, module: ir.Module, name: str, qtype: QuantType, k: int, isa: InstructionSet
    ) -> None:
        self.qtype, self.isa, self.k = qtype, isa, k
        self.row_bytes = qtype.row_bytes(k)
        function = ir.Function(module, SIGNATURE, name)
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.tile = isa.tile(self.b)
        self.vector = 4 * isa.lanes
        arguments, self.first, self.last, self.scratch = function.args
        fields = [
            self.tile.load(self.tile.at(arguments, 8 * i), i64, 8) for i in range(len(ARGUMENTS))
        ]
        self.weights, self.n, self.x, self.records = fields[:4]
        self.t, self.y, self.y_stride, self.accumulate = fields[4:]
        self.scales = self.tile.at(self.scratch, _BATCH // 4 * self.vector)
        self.shifts = self.tile.at(self.scales, _BATCH // 16 * self.vector)
        self.totals = self.tile.at(self.shifts, _BATCH // 16 * self.vector)

    def emit(self) -> None:
        b = self.b
        float_weights = self.qtype not in UNPACKERS
        with self.tile.loop(self.first, self.last) as index:
            # The last tile ends at the last row: it may repeat rows of the one before it.
            wanted = b.mul(index, _const(self.isa.lanes))
            last_start = b.sub(self.n, _const(self.isa.lanes))
            first_row = b.select(b.icmp_signed("<", wanted, last_start), wanted, last_start)
            start = b.add(self.weights, b.mul(wanted, _const(self.row_bytes)))
            single = b.icmp_signed("==", self.t, _const(1))
            with b.if_else(single) as (one, many):
                with one:
                    if float_weights:
                        self._float_pass(start, _const(0), 1)
                    else:
                        self._one_row(start, UNPACKERS[self.qtype])
                with many:
                    if float_weights:
                        self._by_width(_const(0), lambda t0, w: self._float_pass(start, t0, w))
                    else:
                        self._many_rows(start, UNPACKERS[self.qtype])
            self._store_tile(wanted, first_row)
        b.ret_void()

    # One activation row

    def _one_row(self, weights: Value, unpacker: Unpacker) -> None:
        b, tile = self.b, self.tile
        total = tile.variable(tile.vec(f32), tile.floats(0.0))
        block = self.qtype.block_size
        with tile.loop(_const(0), _const(self.k // block)) as i:
            start = b.mul(i, _const(block))
            x = b.add(self.x, start)
            records = b.add(self.records, start)  # 16 bytes for 16 activations
            here = self._block(weights, i)
            lines = self._prefetches(here, block // unpacker.group)
            for j, group in enumerate(unpacker.unpack(tile, here)):
                at = j * unpacker.group
                next(lines)
                value = self._add_group(
                    unpacker, b.load(total), group, tile.at(x, at), tile.at(records, at)
                )
                b.store(value, total)
        tile.store(b.load(total), self.totals, 4)

    def _prefetches(self, block: Value, groups: int) -> Iterator[None]:
        """Ask for what lies ``_AHEAD`` after this block, a part each time the iterator is advanced.

        A block's fields are read in turn, not in order: to the hardware that is no stream.
        """
        lines = range(_AHEAD, _AHEAD + self.isa.lanes * block_bytes(self.qtype), 64)
        for g in range(groups):
            for line in lines[len(lines) * g // groups : len(lines) * (g + 1) // groups]:
                self.tile.prefetch(self.tile.at(block, line))
            yield

    def _block(self, weights: Value, index: Value) -> Value:
        """The address of block ``index`` of the tile at ``weights``."""
        return self.b.add(
            weights, self.b.mul(index, _const(self.isa.lanes * block_bytes(self.qtype)))
        )

    def _add_group(
        self, unpacker: Unpacker, total: Value, group: Group, x: Value, records: Value
    ) -> Value:
        """total + Σ weight · activation over one group of weights."""
        tile, b = self.tile, self.b
        product = None
        for half in range(unpacker.group // GROUP):
            record = tile.at(records, half * GROUP)
            q = group.q[4 * half : 4 * half + 4]
            sums = tile.to_float(self._dots(unpacker, q, tile.at(x, half * GROUP)))
            scale = tile.splat(tile.load(record, f32, 4))
            product = b.fmul(sums, scale) if product is None else tile.fma(sums, scale, product)
        field = "pair_sum" if unpacker.group == 32 else "sum"
        if unpacker.offset:
            x_sum = tile.splat(tile.load(tile.at(records, _FIELD[field]), f32, 4))
            product = tile.fma(x_sum, tile.floats(-unpacker.offset), product)
        total = tile.fma(product, group.scale, total)
        if group.shift is not None:
            x_sum = tile.splat(tile.load(tile.at(records, _FIELD[field]), f32, 4))
            total = tile.fma(group.shift, x_sum, total)
        return total

    def _dots(self, unpacker: Unpacker, q: Sequence[Value], x: Value) -> Value:
        """Integer sums Σ q x over 16 activations."""
        tile = self.tile
        activations = [tile.splat(tile.load(tile.at(x, 4 * j), i32)) for j in range(len(q))]
        return self.isa.dot(tile, q, activations, unpacker.largest)

    # Several activation rows

    def _many_rows(self, weights: Value, unpacker: Unpacker) -> None:
        b, tile = self.b, self.tile
        block = self.qtype.block_size
        with tile.loop(_const(0), self.t) as i:
            tile.store(tile.floats(0.0), self._total(i), 4)
        with tile.loop(_const(0), _const(self.k), _BATCH) as start:
            left = b.sub(_const(self.k), start)
            count = b.select(b.icmp_signed("<", left, _const(_BATCH)), left, _const(_BATCH))
            with tile.loop(_const(0), count, block) as inside:
                index = b.sdiv(b.add(start, inside), _const(block))
                self._unpack_to_scratch(unpacker, self._block(weights, index), inside)
            groups = b.sdiv(count, _const(unpacker.group))
            self._by_width(
                _const(0), lambda t0, width: self._pass(unpacker, t0, width, start, groups)
            )

    def _unpack_to_scratch(self, unpacker: Unpacker, block: Value, start: Value) -> None:
        b, tile, vector = self.b, self.tile, self.vector
        q_at = b.add(self.scratch, b.mul(start, _const(vector // 4)))
        slot = b.mul(b.sdiv(start, _const(unpacker.group)), _const(vector))
        scales, shifts = b.add(self.scales, slot), b.add(self.shifts, slot)
        j = 0
        for g, group in enumerate(unpacker.unpack(tile, block)):
            for v in group.q:
                tile.store(v, tile.at(q_at, j * vector), 4)
                j += 1
            tile.store(group.scale, tile.at(scales, g * vector), 4)
            if group.shift is not None:
                tile.store(group.shift, tile.at(shifts, g * vector), 4)

    def _pass(self, unpacker: Unpacker, t0: Value, width: int, start: Value, groups: Value) -> None:
        """Rows t0 … t0 + width - 1 over the unpacked batch."""
        b, tile, vector = self.b, self.tile, self.vector
        rows = [b.add(t0, _const(i)) for i in range(width)]
        xs = [b.add(self.x, b.add(b.mul(row, _const(self.k)), start)) for row in rows]
        records = [b.add(self.records, b.add(b.mul(row, _const(self.k)), start)) for row in rows]
        totals = [
            tile.variable(tile.vec(f32), tile.load(self._total(row), tile.vec(f32), 4))
            for row in rows
        ]
        size = unpacker.group
        with tile.loop(_const(0), groups) as g:
            here = b.mul(g, _const(size))
            slot = b.mul(g, _const(vector))
            q_at = b.add(self.scratch, b.mul(here, _const(vector // 4)))
            shift = b.add(self.shifts, slot)
            group = Group(
                [tile.load(tile.at(q_at, j * vector), tile.vec(i32), 4) for j in range(size // 4)],
                tile.load(b.add(self.scales, slot), tile.vec(f32), 4),
                tile.load(shift, tile.vec(f32), 4) if unpacker.has_shift else None,
            )
            for x, r, total in zip(xs, records, totals, strict=True):
                value = self._add_group(
                    unpacker, b.load(total), group, b.add(x, here), b.add(r, here)
                )
                b.store(value, total)
        for row, total in zip(rows, totals, strict=True):
            tile.store(b.load(total), self._total(row), 4)

    def _by_width(self, start: Value, emit: Callable[[Value, int], None]) -> None:
        """Cover all activation rows with passes of the widths that fit the registers."""
        b, tile = self.b, self.tile
        for width in _WIDTHS[self.isa.lanes]:
            whole = b.add(start, b.mul(b.sdiv(b.sub(self.t, start), _const(width)), _const(width)))
            with tile.loop(start, whole, width) as t0:
                emit(t0, width)
            start = whole

    # Float weights

    def _float_pass(self, tile_start: Value, t0: Value, width: int) -> None:
        b, tile = self.b, self.tile
        xs = [b.add(self.x, b.mul(b.add(t0, _const(i)), _const(4 * self.k))) for i in range(width)]
        totals = [tile.variable(tile.vec(f32), tile.floats(0.0)) for _ in range(width)]
        per_load = PLAIN_BLOCK // self.qtype.block_bytes
        with tile.loop(_const(0), _const(self.k), per_load) as at:
            block = self._block(tile_start, b.sdiv(at, _const(per_load)))
            weights = self._as_floats(tile.dwords(block, 0, 4))
            for x, total in zip(xs, totals, strict=True):
                address = b.add(x, b.mul(at, _const(4)))
                value = b.load(total)
                for j, w in enumerate(weights):
                    value = tile.fma(
                        w, tile.splat(tile.load(tile.at(address, 4 * j), f32, 4)), value
                    )
                b.store(value, total)
        for i, total in enumerate(totals):
            tile.store(b.load(total), self._total(b.add(t0, _const(i))), 4)

    def _as_floats(self, dwords: Sequence[Value]) -> list[Value]:
        tile, b = self.tile, self.b
        kind = tile.vec(f32)
        if self.qtype is QuantType.F32:
            return [b.bitcast(v, kind) for v in dwords]
        if self.qtype is QuantType.F16:
            return [tile.half(v, high) for v in dwords for high in (False, True)]
        pairs = ((tile.shl(v, 16), tile.mask(v, 0xFFFF0000)) for v in dwords)
        return [b.bitcast(bits, kind) for pair in pairs for bits in pair]

    # Results

    def _total(self, row: Value) -> Value:
        return self.b.add(self.totals, self.b.mul(row, _const(self.vector)))

    def _store_tile(self, wanted: Value, first_row: Value) -> None:
        """y[t, first_row …] = totals[t] (or +=), without the rows another tile stores."""
        b, tile, lanes = self.b, self.tile, self.isa.lanes
        add = b.icmp_signed("!=", self.accumulate, _const(0))
        skip = b.sub(wanted, first_row)
        whole = b.icmp_signed("==", skip, _const(0))
        with tile.loop(_const(0), self.t) as i:
            source = self._total(i)
            target = b.add(self.y, b.add(b.mul(i, self.y_stride), b.mul(first_row, _const(4))))
            with b.if_else(whole) as (all_lanes, some_lanes):
                with all_lanes:
                    old = b.select(add, tile.load(target, tile.vec(f32), 4), tile.floats(0.0))
                    tile.store(b.fadd(old, tile.load(source, tile.vec(f32), 4)), target, 4)
                with some_lanes, tile.loop(skip, _const(lanes)) as lane:
                    here = b.mul(lane, _const(4))
                    single = b.add(target, here)
                    old = b.select(add, tile.load(single, f32, 4), ir.Constant(f32, 0.0))
                    tile.store(b.fadd(old, tile.load(b.add(source, here), f32, 4)), single, 4)


def kernel_name(qtype: QuantType, k: int) -> str:
    return f"matmul_{qtype.name.lower()}_{k}"


def build_module(qtype: QuantType, k: int, isa: InstructionSet) -> ir.Module:
    """The IR of the kernel for rows of ``k`` weights of one type on one instruction set."""
    name = kernel_name(qtype, k)
    module = ir.Module(name=f"{name}_{isa.name}")
    _Kernel(module, name, qtype, k, isa).emit()
    return module
