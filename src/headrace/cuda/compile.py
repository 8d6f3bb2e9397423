"""Kernels are ``kernels/*.cu``, specialised by macros, compiled at run time and cached on disk.

A cache entry's name is a hash of everything that could change the result: every source file, every
macro, the architecture, the compiler and its options. Entries are written atomically and carry a
digest; a damaged one is compiled again.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from headrace.cuda import bindings
from headrace.errors import DeviceError

KERNELS = Path(__file__).parent / "kernels"


@dataclass(frozen=True)
class Specialisation:
    """One kernel of one file with every constant baked in. ``macros`` are (name, C text) pairs."""

    name: str
    macros: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, macros: Mapping[str, object]) -> Specialisation:
        return cls(name, tuple(sorted((key, c_literal(value)) for key, value in macros.items())))

    @property
    def source(self) -> Path:
        return KERNELS / f"{self.name}.cu"


def c_literal(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return (
            f"{value!r}f" if value == value and abs(value) != float("inf") else _no_literal(value)
        )
    return str(value)


def _no_literal(value: float) -> str:
    raise DeviceError(f"a kernel constant must be finite, not {value}")


@dataclass(frozen=True)
class Resources:
    """What ptxas reported for one kernel."""

    registers: int
    spill_bytes: int
    serialised: bool
    """Asynchronous products (wgmma) are waited for one by one."""


def cache_folder() -> Path:
    from platformdirs import user_cache_path

    root = os.environ.get("HEADRACE_CACHE")
    return (Path(root) if root else user_cache_path("headrace", appauthor=False)) / "kernels"


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(KERNELS.iterdir()):
        if path.suffix in (".cu", ".cuh", ".hpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _cached(key_parts: Iterable[object], suffix: str, build: Callable[[], bytes]) -> Path:
    """The path of the cached result of ``build``, built now if absent or damaged."""
    text = "\0".join(str(part) for part in (_sources_digest(), *key_parts))
    folder = cache_folder()
    path = folder / (hashlib.sha256(text.encode()).hexdigest()[:40] + suffix)
    digest = path.with_suffix(".sha256")
    try:
        if digest.read_text() == hashlib.sha256(path.read_bytes()).hexdigest():
            return path
    except (OSError, UnicodeDecodeError):
        pass
    payload = build()
    folder.mkdir(parents=True, exist_ok=True)
    for target, content in (
        (path, payload),
        (digest, hashlib.sha256(payload).hexdigest().encode()),
    ):
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(target)
    return path


def nvrtc(spec: Specialisation, arch: str) -> tuple[bytes, str]:
    """Compile for ``arch`` ("75" … "90a", "120") with NVRTC, which needs no GPU: machine code, and
    the compiler's log."""
    core = bindings.core()
    number = int("".join(c for c in arch if c.isdigit()))
    options = core.ProgramOptions(
        std="c++17",
        arch=f"sm_{arch}",
        include_path=str(KERNELS),
        define_macro=[f"{name}={text}" for name, text in (*spec.macros, ("ARCH", str(number)))],
        ptxas_options=["-v"],
        device_as_default_execution_space=True,  # generic lambdas are host code to NVRTC 13.0
        no_cache=True,  # we have our own, and from NVRTC's no log comes
    )
    log = io.StringIO()
    try:
        program = core.Program(spec.source.read_text(), code_type="c++", options=options)
        code = bytes(program.compile("cubin", logs=log).code)
    except Exception as cause:
        raise DeviceError(
            f"compiling {spec.name} for sm_{arch} failed: {cause}\n{log.getvalue()}"
        ) from cause
    return code, log.getvalue()


def resources(spec: Specialisation, arch: str) -> Resources:
    """Compile, and say what the kernel takes."""
    log = nvrtc(spec, arch)[1]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    if not registers:
        raise DeviceError(f"the compiler's log names no registers: {log!r}")
    return Resources(
        max(registers), sum(spills), "wgmma.mma_async instructions are serialized" in log
    )


@cache
def compiler_version() -> str:
    """NVRTC's and cuda-core's. DeviceError without the Python packages.

    ``cuda.core`` is not imported for it, which takes long, and is of no use where all is cached.
    """
    from importlib import metadata

    try:
        compiler = bindings.nvrtc().nvrtcVersion()[1:]
        return f"{compiler} cuda-core {metadata.version('cuda-core')}"
    except (ImportError, RuntimeError) as cause:  # RuntimeError: there is no library to bind to
        raise bindings.not_installed() from cause


def cubin(spec: Specialisation, arch: str) -> bytes:
    """As :func:`nvrtc`, through the disk cache."""
    key = ("cubin", spec.name, spec.macros, arch, compiler_version())
    return _cached(key, ".cubin", lambda: nvrtc(spec, arch)[0]).read_bytes()


def cubins(specs: Iterable[Specialisation], arch: str) -> dict[Specialisation, bytes]:
    """Many at once, on all cores."""
    wanted = list(dict.fromkeys(specs))
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(wanted, pool.map(lambda spec: cubin(spec, arch), wanted), strict=True))


HOST_FLAGS = ("-O1", "-std=c++17", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-w")


def host_library(spec: Specialisation, arch: int, *, sanitise: bool = False) -> Path:
    """Compile the kernel as C++ (kernels/host_primitives.hpp), for tests without a GPU.

    ``arch`` picks the primitives' code path: 75, 80 or 90.
    """
    compiler = os.environ.get("CXX", "g++")
    # What is not aligned to its type is slow here, and a fault on a GPU.
    checks = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-g"]
    flags = [*HOST_FLAGS, *(checks if sanitise else [])]
    macros = [f"-D{name}={text}" for name, text in (*spec.macros, ("ARCH", str(arch)))]

    def build() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "kernel.so"
            command = [
                compiler,
                *flags,
                *macros,
                "-DHEADRACE_HOST",
                "-x",
                "c++",
                str(spec.source),
                "-o",
                str(output),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DeviceError(
                    f"compiling {spec.name} for the host failed:\n{done.stderr[-4000:]}"
                )
            return output.read_bytes()

    return _cached(("host", compiler, flags, spec.name, macros), ".so", build)
