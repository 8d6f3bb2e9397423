"""The matmul kernels alone, through their addresses: every type on every instruction set."""

from __future__ import annotations

import ctypes
import mmap
import os
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from headrace.cpu import isa, matmul
from headrace.cpu.compile import matmul_library
from headrace.cpu.tiles import interleaved
from headrace.cpu.unpack import UNPACKERS
from headrace.gguf.quants import dequantize
from headrace.gguf.random_blocks import random_weights
from headrace.gguf.types import QuantType

FLOATS = tuple(t for t in QuantType if t not in UNPACKERS)
T_MAX = 13
GUARD = np.float32(12345.0)  # where y must not be written
POISON = 0xA5  # what scratch holds before


def row_lengths(qtype: QuantType) -> list[int]:
    """One block (of what a load takes, for floats), and several."""
    if qtype in FLOATS:
        one = 16 // qtype.block_bytes
        return [one, 9 * one]
    # 256 weights are unpacked at a time: 576 leaves a part of that.
    return [32, 576] if qtype.block_size == 32 else [256, 768]


def every_case() -> list:
    best, *others = isa.supported()
    cases = [(best, qtype, k) for qtype in QuantType for k in row_lengths(qtype)]
    cases += [(best, QuantType.Q4_K, 14336)]
    cases += [(other, qtype, row_lengths(qtype)[1]) for other in others for qtype in QuantType]
    return [pytest.param(*case, id=f"{case[0].name}-{case[1].name}-{case[2]}") for case in cases]


class Case:
    """A kernel with random weights [n, k] and activations [T_MAX, k], and the exact products."""

    def __init__(self, target: isa.InstructionSet, qtype: QuantType, k: int, n: int) -> None:
        self.target, self.qtype, self.k, self.n = target, qtype, k, n
        rng = np.random.default_rng(zlib.crc32(f"{qtype.name} {k} {n}".encode()))
        packed = np.concatenate(list(random_weights(rng, qtype, n * k, 1.0)))
        self.weights = packed.view(np.uint8).reshape(n, qtype.row_bytes(k))
        w = dequantize(self.weights, qtype).astype(np.float64)
        x = rng.standard_normal((T_MAX, k)).astype(np.float32)
        x *= np.exp(rng.standard_normal((T_MAX, k // 4)).repeat(4, 1))  # groups of unlike size
        self.x, self.records = (x, np.zeros(1)) if qtype in FLOATS else quantised(x)
        used = x if qtype in FLOATS else self.x * self.records["scale"].repeat(16, 1)
        self.exact = used.astype(np.float64) @ w.T
        self.unquantised = x.astype(np.float64) @ w.T
        self.magnitude = np.abs(used) @ np.abs(w).T
        library = matmul_library(qtype, k, target)
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
        self._kernel = kind(library.address(matmul.kernel_name(qtype, k)))

    @property
    def n_tiles(self) -> int:
        return -(-self.n // self.target.lanes)

    def run(
        self,
        rows: slice,
        tiles: range | None = None,
        add_to: np.ndarray | None = None,
        place: Callable[[np.ndarray], np.ndarray] = np.copy,
    ) -> np.ndarray:
        """y [t, n] of some rows of x; with guards around y and after the scratch.

        ``place`` puts an input where it wants it.
        """
        tiles = tiles if tiles is not None else range(self.n_tiles)
        tiles_ = interleaved(self.weights, self.qtype, self.target.lanes)
        weights, x, records = place(tiles_), place(self.x[rows]), self.records
        if self.qtype in UNPACKERS:
            records = place(self.records[rows])
        t, stride = len(x), self.n + 5
        y = np.full((t + 2, stride), GUARD)
        y[1:-1, 2 : 2 + self.n] = np.nan if add_to is None else add_to
        size = matmul.scratch_bytes(t)
        scratch = np.full(size + 256, POISON, np.uint8)
        arguments = np.zeros(len(matmul.ARGUMENTS), np.int64)
        values = {
            "weights": weights.ctypes.data,
            "n": self.n,
            "x": x.ctypes.data,
            "records": records.ctypes.data,
            "t": t,
            "y": y[1:, 2:].ctypes.data,
            "y_stride": 4 * stride,
            "accumulate": add_to is not None,
        }
        for name, value in values.items():
            arguments[matmul.ARGUMENTS.index(name)] = value
        self._kernel(arguments.ctypes.data, tiles.start, tiles.stop, scratch.ctypes.data)
        assert (scratch[size:] == POISON).all(), "wrote past its scratch"
        result = y[1:-1, 2 : 2 + self.n].copy()
        y[1:-1, 2 : 2 + self.n] = GUARD
        assert (y == GUARD).all(), "wrote outside y"
        return result

    def check(self, y: np.ndarray, add_to: np.ndarray | float = 0.0) -> None:
        t = len(y)
        error = np.abs(y - add_to - self.exact[:t])
        assert (error <= 1e-6 * (self.magnitude[:t] + np.abs(add_to))).all()
        loose = np.sqrt(np.mean(np.square(y - add_to - self.unquantised[:t])))
        assert loose <= 1e-2 * np.sqrt(np.mean(np.square(self.unquantised[:t])))


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and records of x [t, k], as ``quantise_row`` makes them."""
    groups = x.reshape(len(x), -1, 16)
    step = np.abs(groups).max(-1) / np.float32(127)
    q = np.rint(groups / step[..., None]).astype(np.int8)
    scale = (groups * q).sum(-1) / np.square(q.astype(np.float32)).sum(-1)
    records = np.full(scale.shape, np.nan, matmul.GROUP_RECORD)  # "unused" stays NaN
    records["scale"] = scale
    records["sum"] = scale * q.sum(-1, dtype=np.int32)
    pairs = records["sum"].reshape(len(x), -1, 2).sum(-1)
    records["pair_sum"] = pairs.repeat(2, 1)
    return q.reshape(x.shape), records


@pytest.mark.parametrize(("target", "qtype", "k"), every_case())
def test_products(target, qtype, k):
    lanes = target.lanes
    for n in (lanes, lanes + 1, 37):
        case = Case(target, qtype, k, n)
        whole = case.run(slice(0, T_MAX))
        case.check(whole)
        for t in (1, 2, 3, 8):
            assert (case.run(slice(0, t)) == whole[:t]).all(), f"{t} rows differ from {T_MAX}"
        for row in range(1, T_MAX):
            assert (case.run(slice(row, row + 1)) == whole[row]).all(), "alone and beside others"


@pytest.mark.parametrize("target", isa.supported(), ids=lambda s: s.name)
@pytest.mark.parametrize("qtype", [QuantType.Q4_K, QuantType.Q8_0, QuantType.BF16])
@pytest.mark.parametrize("t", [1, T_MAX])
def test_adds_to_what_is_there(target, qtype, t):
    case = Case(target, qtype, row_lengths(qtype)[1], 37)
    before = np.random.default_rng(1).standard_normal((t, 37)).astype(np.float32) * 100
    case.check(case.run(slice(0, t), add_to=before), before)


@pytest.mark.parametrize("target", isa.supported(), ids=lambda s: s.name)
@pytest.mark.parametrize("qtype", [QuantType.Q6_K, QuantType.F16])
def test_members_share_the_tiles(target, qtype):
    """Any division of the tiles writes each row once: the last tile overlaps the one before."""
    case = Case(target, qtype, row_lengths(qtype)[1], 37)
    add_to = np.zeros((3, 37), np.float32)
    whole = case.run(slice(0, 3), add_to=add_to)
    for tile in range(case.n_tiles):
        rows = slice(tile * target.lanes, (tile + 1) * target.lanes)
        part = case.run(slice(0, 3), range(tile, tile + 1), add_to=add_to)
        assert (part[:, rows] == whole[:, rows]).all()
        part[:, rows] = 0
        assert not part.any(), "touched rows of another tile"
    assert np.isnan(case.run(slice(0, 3), range(1, 1))).all()


def test_instruction_sets_agree_bit_for_bit():
    """Lanes never meet, so every instruction set adds up in the same order."""
    for qtype in QuantType:
        k = row_lengths(qtype)[1]
        results = [Case(s, qtype, k, 37).run(slice(0, 3)) for s in isa.supported()]
        for result in results[1:]:
            assert (result == results[0]).all(), qtype.name


def test_extreme_codes_do_not_overflow():
    """Largest codes against ±127 activations: 16-bit sums of pairs would saturate on AVX2."""
    for target in isa.supported():
        for qtype in UNPACKERS:
            case = Case(target, qtype, row_lengths(qtype)[1], 37)
            blocks = case.weights.reshape(-1, qtype.block_bytes)
            # Q8_0's codes are signed, and shifted by 128 to become unsigned.
            blocks[:, _code_bytes(qtype)] = 0x7F if qtype is QuantType.Q8_0 else 0xFF
            x = np.where(np.arange(case.k) % 2, np.float32(-3), np.float32(3))
            x = np.stack([np.full(case.k, np.float32(3)), -np.full(case.k, np.float32(3)), x])
            case.x, case.records = quantised(x)
            assert set(np.unique(case.x)) == {-127, 127}
            w = dequantize(case.weights, qtype).astype(np.float64)
            used = (case.x * case.records["scale"].repeat(16, 1)).astype(np.float64)
            case.exact, case.magnitude = used @ w.T, np.abs(used) @ np.abs(w).T
            y = case.run(slice(0, 3))
            assert (np.abs(y - case.exact) <= 1e-6 * case.magnitude).all(), qtype.name


def _code_bytes(qtype: QuantType) -> slice:
    """The bytes of a block that hold codes only (ggml-common.h)."""
    return {
        QuantType.Q4_0: slice(2, None),
        QuantType.Q4_1: slice(4, None),
        QuantType.Q5_0: slice(2, None),
        QuantType.Q5_1: slice(4, None),
        QuantType.Q8_0: slice(2, None),
        QuantType.Q2_K: slice(16, 80),
        QuantType.Q3_K: slice(0, 96),
        QuantType.Q4_K: slice(16, None),
        QuantType.Q5_K: slice(16, None),
        QuantType.Q6_K: slice(0, 192),
    }[qtype]


class Fence:
    """Copies of arrays whose neighbour page may not be touched, after (or before) them."""

    def __init__(self, before: bool) -> None:
        self._before = before
        self._maps: list[mmap.mmap] = []

    def __call__(self, array: np.ndarray) -> np.ndarray:
        page = mmap.PAGESIZE
        size = -(-array.nbytes // page) * page
        self._maps.append(mmap.mmap(-1, size + page))
        memory = np.frombuffer(self._maps[-1], np.uint8)
        fence, start = (0, page) if self._before else (size, size - array.nbytes)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert protect(memory.ctypes.data + fence, page, 0) == 0  # PROT_NONE
        copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[:] = array
        return copy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fault must end another process")
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_reads_nothing_but_its_inputs(before):
    """A file's last tensor may end at the end of the mapping."""
    target = isa.supported()[0]
    for qtype in QuantType:
        case = Case(target, qtype, row_lengths(qtype)[0], target.lanes)
        child = os.fork()
        if child == 0:
            try:
                for t in (1, 3):
                    case.run(slice(0, t), place=Fence(before))
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, qtype.name
