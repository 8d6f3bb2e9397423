"""Instruction sets: how many rows a tile has, and the instruction for its integer dot product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

from llvmlite import binding as llvm
from llvmlite import ir

from headrace.cpu.ir import Tile, Value, declare, i16, i32
from headrace.errors import DeviceError

Vectors = Sequence[Value]
Dot = Callable[[Tile, Vectors, Vectors, int], Value]
"""(tile, weights, activations, largest weight) -> Σ of the byte products of each lane.

Weights are unsigned bytes, activations signed bytes within ±127; both are ``i32`` vectors, as many
of one as of the other.
"""


def _dot_vnni(tile: Tile, weights: Vectors, x: Vectors, largest: int) -> Value:
    kind = tile.vec(i32)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * tile.lanes}"
    fn = declare(tile.b.module, name, ir.FunctionType(kind, [kind] * 3))
    sums = tile.ints(0)
    for w, v in zip(weights, x, strict=True):
        sums = tile.b.call(fn, [sums, w, v])
    return sums


def _dot_avx2(tile: Tile, weights: Vectors, x: Vectors, largest: int) -> Value:
    b, shorts = tile.b, tile.vec(i16, 2 * tile.lanes)
    madd = declare(b.module, "llvm.x86.avx2.pmadd.wd", ir.FunctionType(tile.vec(i32), [shorts] * 2))

    def madd_words(a: Value, c: Value) -> Value:
        return b.call(madd, [b.bitcast(a, shorts), b.bitcast(c, shorts)])

    fit = (2**15 - 1) // (2 * largest * 127)  # sums of two products that 16 bits hold
    if not fit:  # take even and odd bytes apart
        eight = ir.Constant(shorts, [8] * 2 * tile.lanes)
        parts = []
        for w, v in zip(weights, x, strict=True):
            v = b.bitcast(v, shorts)
            even = madd_words(tile.mask(w, 0x00FF00FF), b.ashr(b.shl(v, eight), eight))
            odd = madd_words(tile.mask(tile.shr(w, 8), 0x00FF00FF), b.ashr(v, eight))
            parts.append(b.add(even, odd))
        return reduce(b.add, parts)
    bytes_ = tile.vec(ir.IntType(8), 4 * tile.lanes)
    maddubs = declare(b.module, "llvm.x86.avx2.pmadd.ub.sw", ir.FunctionType(shorts, [bytes_] * 2))
    pairs = [
        b.call(maddubs, [b.bitcast(w, bytes_), b.bitcast(v, bytes_)])
        for w, v in zip(weights, x, strict=True)
    ]
    words = [reduce(b.add, pairs[i : i + fit]) for i in range(0, len(pairs), fit)]
    return reduce(b.add, [madd_words(word, tile.ints(0x00010001)) for word in words])


def _dot_portable(tile: Tile, weights: Vectors, x: Vectors, largest: int) -> Value:
    sums = tile.ints(0)
    for w, v in zip(weights, x, strict=True):
        for byte in range(4):
            weight = tile.mask(tile.shr(w, 8 * byte), 0xFF)
            sums = tile.b.add(sums, tile.b.mul(weight, tile.signed_byte(v, byte)))
    return sums


@dataclass(frozen=True)
class InstructionSet:
    """``features`` must all be present; ``cpu`` is the LLVM processor to compile for."""

    name: str
    lanes: int
    dot: Dot
    features: tuple[str, ...]
    cpu: str
    full_bytes: bool = True

    @property
    def native_half(self) -> bool:
        return "f16c" in self.features

    def tile(self, builder: ir.IRBuilder) -> Tile:
        return Tile(builder, self.lanes, self.native_half, self.full_bytes)

    @property
    def feature_string(self) -> str:
        return ",".join(f"+{f}" for f in self.features)


INSTRUCTION_SETS = (
    InstructionSet(
        "avx512-vnni",
        16,
        _dot_vnni,
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma", "f16c"),
        "cascadelake",
    ),
    InstructionSet("avx2", 8, _dot_avx2, ("avx2", "fma", "f16c"), "haswell", full_bytes=False),
    InstructionSet("portable", 4, _dot_portable, (), ""),
)
"""Best first."""


def supported() -> list[InstructionSet]:
    """The instruction sets this processor runs, best first; the last is always ``portable``."""
    have = llvm.get_host_cpu_features()
    return [s for s in INSTRUCTION_SETS if all(have.get(f, False) for f in s.features)]


def choose(name: str | None = None) -> InstructionSet:
    """The best supported set, or the one named (``HEADRACE_CPU_ISA``)."""
    runnable = supported()
    if name is None:
        return runnable[0]
    for candidate in runnable:
        if candidate.name == name:
            return candidate
    raise DeviceError(
        f"instruction set {name!r} does not run on this processor; "
        f"these do: {', '.join(s.name for s in runnable)}"
    )
