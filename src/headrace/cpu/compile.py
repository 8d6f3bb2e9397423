"""Compiles kernel IR to machine code with LLVM, caching the object files on disk."""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite
from llvmlite import binding as llvm

from headrace.cpu import attention, ir, isa, matmul, unpack
from headrace.cpu.isa import InstructionSet
from headrace.gguf.types import QuantType

_MAGIC = b"headrace-object-1\n"


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$HEADRACE_CACHE/kernels`` or the user's cache folder."""
    if root := os.environ.get("HEADRACE_CACHE"):
        return Path(root) / "kernels"
    import platformdirs

    return Path(platformdirs.user_cache_dir("headrace")) / "kernels"


@cache
def _source_digest() -> str:
    """Of everything a kernel's code depends on besides its type and instruction set."""
    digest = hashlib.sha256(f"{llvmlite.__version__} {llvm.llvm_version_info}".encode())
    for module in (ir, isa, matmul, unpack, attention):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


@cache
def _initialise_llvm() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _target_machine(target: InstructionSet) -> llvm.TargetMachine:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=target.cpu,
        features=target.feature_string,
        opt=3,
        reloc="pic",
        codemodel="small",
        jit=True,
    )


def emit_object(module: llvmlite.ir.Module, target: InstructionSet) -> bytes:
    """Optimised machine code (an object file) of a module."""
    _initialise_llvm()
    machine = _target_machine(target)
    parsed = llvm.parse_assembly(str(module))
    parsed.triple = machine.triple
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return bytes(machine.emit_object(parsed))


def _cached_object(
    name: str, target: InstructionSet, build: Callable[[], llvmlite.ir.Module]
) -> bytes:
    """The object from the disk cache, or compiled and put there.

    A file is its magic, the SHA-256 of the code, and the code: a half-written or damaged one is
    compiled again. Writers rename into place, so two processes may compile at once.
    """
    key = f"{_source_digest()} {name} {target.name} {llvm.get_process_triple()}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = cache_directory() / f"{name}-{target.name}-{digest}.o"
    try:
        stored = path.read_bytes()
        code = stored[len(_MAGIC) + 32 :]
        if stored == _MAGIC + hashlib.sha256(code).digest() + code:
            return code
    except OSError:
        pass
    code = emit_object(build(), target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(_MAGIC + hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        pass  # a read-only cache costs compile time at the next start, nothing else
    return code


class Library:
    """A compiled module in memory: addresses of its functions, valid while it lives."""

    def __init__(
        self, name: str, target: InstructionSet, build: Callable[[], llvmlite.ir.Module]
    ) -> None:
        _initialise_llvm()
        self.target = target
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(target))
        code = _cached_object(name, target, build)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, function: str) -> int:
        return int(self._engine.get_function_address(function))


@cache
def matmul_library(qtype: QuantType, k: int, target: InstructionSet) -> Library:
    """The matmul of a weight type on an instruction set, compiled at most once a process."""
    name = matmul.kernel_name(qtype, k)
    return Library(name, target, lambda: matmul.build_module(qtype, k, target))


@cache
def attention_library(target: InstructionSet) -> Library:
    return Library("attention", target, lambda: attention.build_module(target))
