"""A small vocabulary over llvmlite's IR builder for the matmul kernels.

A kernel works on a *tile*: ``lanes`` consecutive rows of a weight matrix, one row to a vector lane
(16 with AVX-512, 8 with AVX2, 4 elsewhere). The rows lie interleaved (``tiles.py``), so that a
vector load brings the same four bytes of every row: the integer dot product then needs no
horizontal sum, and decode and prefill add up in the same order, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from llvmlite import ir

i1, i8, i16, i32, i64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
f16, f32 = ir.HalfType(), ir.FloatType()
Value: TypeAlias = Any
"""An ``llvmlite.ir.Value``: the library has no type hints."""


@dataclass(frozen=True)
class Tile:
    """Emits code for one tile: ``b`` the builder, ``lanes`` the rows it holds.

    ``native_half``: the processor converts half precision. ``full_bytes``: its dot product takes
    any unsigned byte at full speed, not only small ones.
    """

    b: ir.IRBuilder
    lanes: int
    native_half: bool = True
    full_bytes: bool = True

    # Types and constants

    def vec(self, element: ir.Type, n: int | None = None) -> ir.VectorType:
        return ir.VectorType(element, n or self.lanes)

    def ints(self, value: int) -> Value:
        """``i32`` vector with ``value`` (taken modulo 2^32) in each lane."""
        return ir.Constant(self.vec(i32), [value & 0xFFFFFFFF] * self.lanes)

    def floats(self, value: float) -> Value:
        """``f32`` vector with ``value`` in each lane."""
        return ir.Constant(self.vec(f32), [value] * self.lanes)

    # Memory

    def at(self, address: Value, offset: int | Value = 0) -> Value:
        """``address + offset``, both ``i64``."""
        if isinstance(offset, int):
            if offset == 0:
                return address
            offset = ir.Constant(i64, offset)
        return self.b.add(address, offset)

    def load(self, address: Value, kind: ir.Type, align: int = 1) -> Value:
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Value, address: Value, align: int = 1) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def splat(self, scalar: Value) -> Value:
        kind = self.vec(scalar.type)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(i32, 0))
        return self.shuffle(one, one, [0] * self.lanes)

    def shuffle(self, a: Value, c: Value, mask: Sequence[int]) -> Value:
        return self.b.shuffle_vector(a, c, ir.Constant(self.vec(i32, len(mask)), list(mask)))

    def dword(self, block: Value, offset: int) -> Value:
        """The four bytes at ``offset`` of every row's block, from an interleaved ``block``."""
        return self.load(self.at(block, self.lanes * offset), self.vec(i32))

    def dwords(self, block: Value, offset: int, n: int) -> list[Value]:
        """``n`` of them, one after the other."""
        return [self.dword(block, offset + 4 * j) for j in range(n)]

    def halves(self, block: Value, offset: int) -> Value:
        """The half-precision number at ``offset`` of every row's block, as ``f32``."""
        return self.load_halves(self.at(block, self.lanes * offset))

    # Arithmetic

    def shr(self, v: Value, bits: int) -> Value:
        return v if bits == 0 else self.b.lshr(v, self.ints(bits))

    def shl(self, v: Value, bits: int) -> Value:
        return v if bits == 0 else self.b.shl(v, self.ints(bits))

    def mask(self, v: Value, bits: int) -> Value:
        return self.b.and_(v, self.ints(bits))

    def half(self, v: Value, high: bool = False) -> Value:
        """The low or high 16 bits of each dword, read as an IEEE half, as ``f32``."""
        return self._widen(self.b.trunc(self.shr(v, 16 if high else 0), self.vec(i16)))

    def load_halves(self, address: Value) -> Value:
        """``lanes`` consecutive halves as ``f32``."""
        return self._widen(self.load(address, self.vec(i16), 2))

    def _widen(self, bits: Value) -> Value:
        b = self.b
        if self.native_half:
            return b.fpext(b.bitcast(bits, self.vec(f16)), self.vec(f32))
        # Without the instruction LLVM would call a library routine a JIT cannot count on. Exponent
        # and mantissa moved into place read as value * 2^-112, subnormals too; blocks are finite.
        bits = b.zext(bits, self.vec(i32))
        magnitude = b.bitcast(self.shl(self.mask(bits, 0x7FFF), 13), self.vec(f32))
        scaled = b.fmul(magnitude, self.floats(2.0**112))
        sign = self.shl(self.mask(bits, 0x8000), 16)
        return b.bitcast(b.or_(b.bitcast(scaled, self.vec(i32)), sign), self.vec(f32))

    def to_float(self, v: Value) -> Value:
        return self.b.sitofp(v, self.vec(f32))

    def signed_byte(self, v: Value, index: int) -> Value:
        """Byte ``index`` of each dword as a signed ``i32``."""
        return self.b.ashr(self.shl(v, 24 - 8 * index), self.ints(24))

    def fma(self, a: Value, c: Value, d: Value) -> Value:
        kind = self.vec(f32)
        name = f"llvm.fma.v{self.lanes}f32"
        fn = declare(self.b.module, name, ir.FunctionType(kind, [kind] * 3))
        return self.b.call(fn, [a, c, d])

    def prefetch(self, address: Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        fn = declare(self.b.module, "llvm.prefetch.p0i8", kind)
        arguments = [ir.Constant(i32, v) for v in (0, 3, 1)]  # read, keep in all caches, data
        self.b.call(fn, [self.b.inttoptr(address, i8.as_pointer()), *arguments])

    # Control

    @contextmanager
    def loop(self, start: Value, stop: Value, step: int | Value = 1) -> Iterator[Value]:
        """``for i in range(start, stop, step)`` over ``i64``; yields ``i``."""
        b = self.b
        if isinstance(step, int):
            step = ir.Constant(i64, step)
        entry = b.block
        head = b.append_basic_block("loop")
        body = b.append_basic_block("body")
        done = b.append_basic_block("done")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(i64)
        index.add_incoming(start, entry)
        b.cbranch(b.icmp_signed("<", index, stop), body, done)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, step), b.block)
        b.branch(head)
        b.position_at_end(done)

    def variable(self, kind: ir.Type, initial: Value | None = None) -> Value:
        """A mutable local: an alloca in the entry block, promoted to a register by LLVM."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(kind)
        if initial is not None:
            self.b.store(initial, slot)
        return slot


def declare(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, kind, name)
