"""Compiles kernel IR to machine code with LLVM, caching the object files on disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import llvmlite
from llvmlite import binding as llvm

from headrace.cpu import atomics, attention, matmul
from headrace.cpu.isa import InstructionSet
from headrace.gguf.types import QuantType

_MAGIC = b"headrace-object-1\n"


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$HEADRACE_CACHE/kernels`` or the user's cache folder."""
    if root := os.environ.get("HEADRACE_CACHE"):
        return Path(root) / "kernels"
    import platformdirs

    return Path(platformdirs.user_cache_dir("headrace")) / "kernels"


@dataclass(frozen=True)
class Target:
    """A processor to compile for: LLVM's name for it, and features to add or leave out."""

    name: str
    cpu: str
    features: str

    def machine(self) -> llvm.TargetMachine:
        return llvm.Target.from_default_triple().create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="pic", codemodel="small", jit=True
        )


def kernel_target(isa: InstructionSet) -> Target:
    return Target(isa.name, isa.cpu, isa.feature_string)


@cache
def host_target() -> Target:
    """This very processor: what Numba compiles for."""
    features = llvm.get_host_cpu_features().flatten()
    return Target("host", llvm.get_host_cpu_name(), features)


@cache
def _source_digest() -> str:
    """Of everything compiled code depends on besides its parameters and its target."""
    versions = f"{llvmlite.__version__} {llvm.llvm_version_info} numba {version('numba')}"
    digest = hashlib.sha256(versions.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _initialise_llvm() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def emit_object(assembly: str, target: Target, exports: Sequence[str]) -> bytes:
    """Optimised machine code (an object file) of a module in LLVM's textual form."""
    _initialise_llvm()
    machine = target.machine()
    module = llvm.parse_assembly(assembly)
    module.triple = machine.triple
    module.verify()
    for function in module.functions:
        if not function.is_declaration and function.name not in exports:
            function.linkage = "internal"  # dropped if nothing calls it
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def _cached_object(
    name: str, target: Target, exports: Sequence[str], build: Callable[[], str]
) -> bytes:
    """The object from the disk cache, or compiled and put there.

    A file is its magic, the SHA-256 of the code, and the code: a half-written or damaged one is
    compiled again. Writers rename into place, so two processes may compile at once.
    """
    key = f"{_source_digest()} {name} {target} {llvm.get_process_triple()}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = cache_directory() / f"{name}-{target.name}-{digest}.o"
    try:
        stored = path.read_bytes()
        code = stored[len(_MAGIC) + 32 :]
        if stored == _MAGIC + hashlib.sha256(code).digest() + code:
            return code
    except OSError:
        pass
    code = emit_object(build(), target, exports)
    with suppress(OSError):  # a read-only cache costs compile time at the next start, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, _MAGIC + hashlib.sha256(code).digest() + code)
    return code


def _write_atomically(path: Path, contents: bytes) -> None:
    file = tempfile.NamedTemporaryFile(dir=path.parent, delete=False)  # noqa: SIM115
    try:
        with file:
            file.write(contents)
        os.replace(file.name, path)
    except OSError:
        Path(file.name).unlink(missing_ok=True)
        raise


class Library:
    """A compiled module in memory: addresses of its functions, valid while it lives."""

    def __init__(
        self, name: str, target: Target, exports: Sequence[str], build: Callable[[], str]
    ) -> None:
        _initialise_llvm()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target.machine())
        code = _cached_object(name, target, exports, build)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, function: str) -> int:
        return int(self._engine.get_function_address(function))

    def function(self, name: str, n_arguments: int) -> Callable[..., int]:
        """A function of int64 arguments that returns an int64; a call releases the GIL."""
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * n_arguments)
        return kind(self.address(name))


@cache
def matmul_library(qtype: QuantType, k: int, isa: InstructionSet) -> Library:
    """The matmul of rows of ``k`` weights of one type; compiled at most once a process."""
    name = matmul.kernel_name(qtype, k)
    return Library(
        name, kernel_target(isa), [name], lambda: str(matmul.build_module(qtype, k, isa))
    )


@cache
def attention_library(isa: InstructionSet) -> Library:
    return Library(
        "attention",
        kernel_target(isa),
        [attention.SCORES, attention.VALUES],
        lambda: str(attention.build_module(isa)),
    )


@cache
def team_library() -> Library:
    """``atomic_add`` and ``atomic_exchange`` (address, value) -> what was there before."""
    return Library(
        "team",
        host_target(),
        ["atomic_add", "atomic_exchange"],
        lambda: str(atomics.build_module()),
    )


@cache
def step_library() -> Library:
    """``take_part`` of ``step.py``. Numba is loaded only when it has to be compiled."""

    def build() -> str:
        from headrace.cpu import ahead_of_time

        return ahead_of_time.step_assembly()

    return Library("step", host_target(), ["take_part"], build)


@cache
def interleave_library() -> Library:
    """``interleave`` of ``interleave.py``; Numba as for the step."""

    def build() -> str:
        from headrace.cpu import ahead_of_time

        return ahead_of_time.interleave_assembly()

    return Library("interleave", host_target(), ["interleave"], build)
