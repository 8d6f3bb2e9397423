"""What Numba lacks for one compiled call a token: addresses, atomics, calls of LLVM kernels."""

from __future__ import annotations

from typing import Any

import numba as nb
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from headrace.cpu.clock import emit_read

_i64 = ir.IntType(64)


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def _void_pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pointer(builder, args[0], ir.IntType(8))

    return types.voidptr(types.int64), codegen


@nb.njit(inline="always")
def view(address, shape, dtype):
    """The memory at ``address`` as a C-contiguous array of ``shape``."""
    return nb.carray(_void_pointer(address), shape, dtype)


@nb.njit(inline="always")
def floats(address, shape):
    """The memory at ``address`` as a C-contiguous float32 array of ``shape``."""
    return nb.carray(_void_pointer(address), shape, nb.float32)


@intrinsic
def atomic_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at ``address``; returns what it held before. Sequentially consistent."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], _i64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_exchange(typing_context: Any, address: Any, value: Any) -> Any:
    """Store ``value`` at ``address``; returns what it held before. Sequentially consistent."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _pointer(builder, args[0], _i64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """The int64 at ``address``, sequentially consistent."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _i64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at ``address``, to be read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i8p, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [i8p, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        hints = [ir.Constant(i32, v) for v in (0, 3, 1)]  # read, all cache levels, data
        builder.call(function, [_pointer(builder, args[0], ir.IntType(8)), *hints])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def pause(typing_context: Any) -> Any:
    """Leave the core to its other hardware thread for a moment, where there is such a hint."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if builder.module.triple.startswith(("x86", "i386", "i686", "amd64")):
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cycle_count(typing_context: Any) -> Any:
    """The processor's cycle clock (``clock.py``)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_read(builder)

    return types.int64(), codegen


@intrinsic
def float_bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def float_from_bits(typing_context: Any, value: Any) -> Any:
    """The float32 with these int32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def _caller(n: int) -> Any:
    """An intrinsic that calls the function at an address with ``n`` int64 arguments."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_i64] * n)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (n + 1)), codegen


@intrinsic
def call4(typing_context: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Call the function at ``address`` with four int64 arguments."""
    return _caller(4)


@intrinsic
def call6(typing_context: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    """Call the function at ``address`` with six int64 arguments."""
    return _caller(6)


sched_yield = types.ExternalFunction("sched_yield", types.int32())
"""Give the core to another thread (POSIX)."""
