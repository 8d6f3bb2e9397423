"""The processor's cycle clock: one instruction, readable inside compiled code.

x86-64 has the time-stamp counter, ARM64 its virtual counter. Both run at a fixed rate whatever the
core's frequency, and alike on all cores.
"""

from __future__ import annotations

from llvmlite import binding as llvm
from llvmlite import ir

from headrace.cpu.ir import Value, declare, i64

_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")


def architecture() -> str:
    return str(llvm.get_process_triple()).split("-", 1)[0]


def is_known() -> bool:
    return architecture() in _X86 + _ARM


def emit_read(builder: ir.IRBuilder, processor: str | None = None) -> Value:
    """The clock as ``i64``; 0 on processors without one that programs may read."""
    processor = processor or architecture()
    if processor in _X86:
        kind = ir.FunctionType(i64, [])
        return builder.call(declare(builder.module, "llvm.readcyclecounter", kind), [])
    if processor in _ARM:  # what LLVM reads for readcyclecounter is closed to programs there
        kind = ir.FunctionType(i64, [ir.MetaDataType()])
        read = declare(builder.module, "llvm.read_volatile_register.i64", kind)
        return builder.call(read, [builder.module.add_metadata(["cntvct_el0"])])
    return ir.Constant(i64, 0)


def build_module() -> ir.Module:
    """``clock``: () -> its count."""
    module = ir.Module(name="clock")
    function = ir.Function(module, ir.FunctionType(i64, []), "clock")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    builder.ret(emit_read(builder))
    return module
