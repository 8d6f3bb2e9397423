"""Kernels that multiply by a matrix: their launchers, contracts and shapes (``gemm.py`` has one
more)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, c_void_p
from dataclasses import dataclass

from headrace.cuda import arguments as c
from headrace.cuda.compile import Specialisation
from headrace.cuda.device import Device, DeviceArray, Launch
from headrace.cuda.layout import (
    FLOAT_TYPES,
    PADDED_ROWS,
    TILE_COLUMNS,
    TILE_ROWS,
    TileLayout,
    tile_block,
)
from headrace.cuda.tuning import DEFAULTS, Tuning
from headrace.errors import DeviceError

GROUP = 16
"""Columns of activations that are stored together."""
_PARTIAL_LIMIT = 48 << 10
"""Shared memory for the row sums of one pass, at most: more rows take more passes."""

PLAIN: dict[str, object] = {"LOGIT_SCALE": 1.0, "SOFTCAP": 0.0}
"""Macros of a product that is only stored."""


@dataclass(frozen=True)
class Matrix:
    """A matrix on the device, in tiles; ``bias`` is an address (0: none)."""

    address: int
    layout: TileLayout
    bias: int = 0


@dataclass(frozen=True)
class Activations:
    """Rows ``[rows, width]`` in the forms that readers want (kernels/activations.cuh): floats, int8
    groups with their scales, bfloat16 (``brain``); and the sums of squares of each 16."""

    width: int
    rows: int
    values: DeviceArray | None
    quants: DeviceArray | None
    scales: DeviceArray | None
    squares: DeviceArray | None
    brain: DeviceArray | None = None

    def at(self, row: int) -> c.Rows:
        """The C struct of the rows from ``row`` on."""
        require(0 <= row < self.rows, f"row {row} of {self.rows}")
        parts = (self.values, self.quants, self.scales, self.squares, self.brain)
        return c.Rows(*(part.address if part else 0 for part in parts), row)


def padded(k: int) -> int:
    return -(-k // 1024) * 1024


def brain_shape(rows: int, width: int) -> tuple[int, int, int]:
    """Of bfloat16 rows in tiles of 64 x 64 values (kernels/activations.cuh); zero it once."""
    return -(-rows // 64), -(-width // 256) * 4, 64 * 64


@dataclass(frozen=True)
class MatvecShape:
    rows: int
    warps: int
    stages: int
    early: int
    pass_units: int
    grid: int
    shared_bytes: int


def matvec_shape(
    device: Device, matrices: Sequence[Matrix], rows: int, *, paired: bool, unit_rows: int,
    floats: bool, tuning: Tuning,
) -> MatvecShape:  # fmt: skip
    """The variant that fits the shared memory: most warps first, then rows, then stages.

    How deep a ring pays depends on how many tiles a warp takes (docs/decisions/012): two stages if
    there are few, at most half of them if there are many, and the last is not asked for early.
    """
    k = matrices[0].layout.k
    stage = max(m.layout.max_tile_bytes for m in matrices)
    padded_rows = [m.layout.groups * TILE_ROWS for m in matrices]
    units = (padded_rows[0] if paired else sum(padded_rows)) // unit_rows
    grid = min(device.sm_count, units)
    # Code for several types, or for blocks of 256, holds too many registers for eight rows.
    types = {m.layout.qtype for m in matrices}
    most = 8 if len(types) == 1 and tile_block(types.pop())[0] == 32 else 4
    at_once = 1 if floats else min(most, 1 << (rows - 1).bit_length())
    slices = -(-k // TILE_COLUMNS)
    unit_bytes = unit_rows * (2 if paired else 1) * (slices | 1) * 4
    tiles = -(-units // grid) * unit_rows // TILE_ROWS * (2 if paired else 1) * slices

    def tiles_of(warps: int) -> int:  # of the warp that has most
        return -(-tiles // warps)

    options = (
        (w, s, r) for w in (32, 24, 16, 12, 8, 4, 2, 1) for r in (8, 4, 2, 1) for s in (4, 3, 2, 1)
    )
    for warps, stages, r in options:
        most_stages = min(tuning.matvec_stages, max(2, tiles_of(warps) // 2))
        if warps > tuning.matvec_warps or stages > most_stages or r > at_once:
            continue
        if r > warps:  # a warp sums the squares of a row (kernels/dots.cuh)
            continue
        # A block's share can exceed the average by one unit, of the cheapest matrix by more.
        pass_units = max(1, min(_PARTIAL_LIMIT // (unit_bytes * r), -(-units // grid) + 1))
        x_bytes = r * k * 4 if floats else r * padded(k) // GROUP * 24
        barriers = -(-warps * stages * 8 // 16) * 16
        shared = warps * stages * stage + barriers + x_bytes + r * pass_units * unit_bytes + r * 4
        if shared <= device.shared_limit:
            if tuning.matvec_exclusive and device.arch >= 90:
                shared = max(shared, device.shared_limit // 2 + 2048)
            early = min(tuning.matvec_early, stages, max(1, tiles_of(warps) - 1))
            return MatvecShape(r, warps, stages, early, pass_units, grid, shared)
    raise DeviceError(
        f"no matvec variant for K = {k} fits {device.shared_limit:,} bytes of shared memory"
    )


def matvec(
    device: Device,
    matrices: Sequence[Matrix],
    x: Activations,
    epilogue: c.Epilogue,
    n_rows: int,
    *,
    first_row: int = 0,
    norm_eps: float | None = None,
    in_gain: int = 0,
    floats: bool = False,
    macros: dict[str, object] | None = None,
    tuning: Tuning = DEFAULTS,
) -> Launch:
    """``y = W x`` for one to three matrices over rows ``first_row …`` of x.

    ``norm_eps``: x was stored times the norm's weight, with its squares; divide by its RMS.
    ``floats``: read x's float values (times ``in_gain`` if there is a norm), not its int8 groups.
    """
    paired = contract(matrices, x, epilogue, n_rows, first_row, norm_eps)
    quantises = isinstance(epilogue, c.Product | c.Residual)
    floats = floats or any(m.layout.qtype in FLOAT_TYPES for m in matrices)
    require(not floats or x.values is not None, "float activations need x's values")
    unit_rows = PADDED_ROWS if quantises else TILE_ROWS
    if isinstance(epilogue, c.Rotary) and macros and macros["CACHE_Q8"]:
        unit_rows = 32  # a group of the cache is one warp's
    shape = matvec_shape(
        device, matrices, n_rows, paired=paired, unit_rows=unit_rows, floats=floats, tuning=tuning
    )
    constants = constants_of(matrices, epilogue, norm_eps) | {
        "UNIT_ROWS": unit_rows,
        "ROWS": shape.rows,
        "FLOAT_ACTIVATIONS": floats,
        "WARPS": shape.warps,
        "STAGES": shape.stages,
        "EARLY": shape.early,
        "PASS_UNITS": shape.pass_units,
        "GRID": shape.grid,
        **(macros or {}),
    }
    arguments = c.matvec_arguments(epilogue)(
        *pointers(matrices), x.at(first_row), in_gain, epilogue, n_rows
    )
    grid = (shape.grid, -(-n_rows // shape.rows), 1)
    return Launch(
        Specialisation.of("matvec", constants),
        grid,
        shape.warps * 32,
        shape.shared_bytes,
        arguments,
    )


def contract(
    matrices: Sequence[Matrix], x: Activations, epilogue: c.Epilogue,
    n_rows: int, first_row: int, norm_eps: float | None,
) -> bool:  # fmt: skip
    """What they take for granted, checked; whether the matrices are a pair."""
    paired, k = isinstance(epilogue, c.Product), matrices[0].layout.k
    require(
        1 <= len(matrices) <= 3 and (not paired or len(matrices) == 2),
        "one to three matrices, or a pair",
    )
    require(all(m.layout.k == k for m in matrices), "matrices that share x have the same K")
    require(x.width == k, f"x has {x.width} columns, the matrix {k}")
    require(n_rows > 0 and first_row + n_rows <= x.rows, f"rows {first_row} + {n_rows} of {x.rows}")
    require(all(m.address % 16 == 0 for m in matrices), "matrices lie on 16-byte boundaries")
    require(
        not paired or matrices[0].layout.n == matrices[1].layout.n, "gate and up have equal rows"
    )
    require(norm_eps is None or x.squares is not None, "a norm needs x's squares")
    return paired


def constants_of(
    matrices: Sequence[Matrix], epilogue: c.Epilogue, norm_eps: float | None
) -> dict[str, object]:
    """Macros of all of them."""
    missing = 3 - len(matrices)
    types = [m.layout.qtype.name for m in matrices] + ["NONE"] * missing
    sizes = [m.layout.n for m in matrices] + [0] * missing
    written = getattr(epilogue, "x", None) or getattr(epilogue, "hidden", None)
    return {
        "K": matrices[0].layout.k,
        **{f"TYPE{i}": types[i] for i in range(3)},
        **{f"N{i}": sizes[i] for i in range(3)},
        "PAIRED": isinstance(epilogue, c.Product),
        "NORM": norm_eps is not None,
        "EPS": float(norm_eps or 0.0),
        "EPILOGUE": c.EPILOGUES[type(epilogue)],
        **({} if written is None else brain(written)),
    }


def pointers(matrices: Sequence[Matrix]) -> tuple[Array[c_void_p], Array[c_void_p]]:
    """Of the weights and of the biases, as the kernels' structs begin."""
    missing = [0] * (3 - len(matrices))
    kind = c_void_p * 3
    return kind(*(m.address for m in matrices), *missing), kind(
        *(m.bias for m in matrices), *missing
    )


def brain(rows: c.Rows) -> dict[str, object]:
    """Activations are written as bfloat16 where there is a place for them."""
    return {"BRAIN": True} if rows.brain else {}


def require(condition: bool, contract: str) -> None:
    if not condition:
        raise DeviceError(f"launch contract broken: {contract}")
