"""Atomic operations for the Python side of a team, as LLVM functions."""

from __future__ import annotations

from llvmlite import ir

from headrace.cpu.ir import i64


def build_module() -> ir.Module:
    """``atomic_add`` and ``atomic_exchange``: (address, value) -> what the int64 held before."""
    module = ir.Module(name="team")
    for name, operation in (("atomic_add", "add"), ("atomic_exchange", "xchg")):
        function = ir.Function(module, ir.FunctionType(i64, [i64, i64]), name)
        b = ir.IRBuilder(function.append_basic_block("entry"))
        address, value = function.args
        b.ret(b.atomic_rmw(operation, b.inttoptr(address, i64.as_pointer()), value, "seq_cst"))
    return module
