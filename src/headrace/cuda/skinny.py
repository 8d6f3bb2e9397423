"""``skinny``: products for a few rows on tensor cores, bound by the weights' bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cuda import arguments as c
from headrace.cuda.compile import Specialisation
from headrace.cuda.device import Device, Launch
from headrace.cuda.layout import FLOAT_TYPES, PADDED_ROWS
from headrace.cuda.model_shapes import products_of
from headrace.cuda.products import (
    Activations,
    Matrix,
    constants_of,
    contract,
    pointers,
    require,
)
from headrace.model.decoder import Decoder

MOST_ROWS = 16
"""Of one launch."""
_WARPS = 8
"""Of a block, which has a multiprocessor's registers to itself."""
_AHEAD = 6
"""Tiles of 16 x 256 that each warp has asked L2 for: 110 KB of Q4_K a multiprocessor."""
_PITCH = 20
"""Floats from one row of sums to the next (kernels/skinny.cu)."""


def takes(decoder: Decoder) -> bool:
    """Are all of a decoder's matrices such as it multiplies by?"""
    linears = (linear for _, linears in products_of(decoder) for linear in linears)
    return all(decoder.weights[linear.weight].qtype not in FLOAT_TYPES for linear in linears)


@dataclass(frozen=True)
class SkinnyShape:
    tokens: int
    stripe_warps: int
    pass_units: int
    grid: int
    shared_bytes: int


def skinny_shape(
    device: Device, matrices: Sequence[Matrix], rows: int, *, paired: bool
) -> SkinnyShape:
    """Passes as few as the shared memory allows, and as equal."""
    tokens, stripes = 8 if rows <= 8 else MOST_ROWS, -(-matrices[0].layout.k // 256)
    stripe_warps = min(_WARPS, 1 << (stripes - 1).bit_length())
    padded = [-(-m.layout.n // PADDED_ROWS) for m in matrices]
    units = padded[0] if paired else sum(padded)
    grid = min(device.sm_count, units)
    rest = _WARPS * tokens * 512 + tokens * 4
    unit_bytes = min(stripe_warps, stripes) * tokens * _PITCH * 4 * (2 if paired else 1)
    room = (device.shared_limit - rest) // unit_bytes
    share = -(-units // grid)
    pass_units = -(-share // -(-share // room))
    return SkinnyShape(tokens, stripe_warps, pass_units, grid, rest + pass_units * unit_bytes)


def skinny(
    device: Device, matrices: Sequence[Matrix], x: Activations, epilogue: c.Epilogue, n_rows: int,
    *, first_row: int = 0, norm_eps: float | None = None, macros: dict[str, object] | None = None,
) -> Launch:  # fmt: skip
    """As :func:`~headrace.cuda.products.matvec`, for at most ``MOST_ROWS`` rows of bfloat16 and
    quantised matrices. The third address of a :class:`~headrace.cuda.arguments.Rotary` is that of a
    table of :func:`~headrace.cuda.launchers.rotations`."""
    require(device.arch >= 80, f"bfloat16 on tensor cores needs sm_80, not sm_{device.arch}")
    paired = contract(matrices, x, epilogue, n_rows, first_row, norm_eps)
    require(n_rows <= MOST_ROWS, f"{n_rows} rows, {MOST_ROWS} at most")
    require(x.brain is not None, "tensor cores read bfloat16")
    require(all(m.layout.qtype not in FLOAT_TYPES for m in matrices), "quantised matrices")
    shape = skinny_shape(device, matrices, n_rows, paired=paired)
    constants = constants_of(matrices, epilogue, norm_eps) | {
        "UNIT_ROWS": PADDED_ROWS,
        "GRID": shape.grid,
        "TOKENS": shape.tokens,
        "WARPS": _WARPS,
        "STRIPE_WARPS": shape.stripe_warps,
        "PASS_UNITS": shape.pass_units,
        "AHEAD": _AHEAD,
        "BRAIN": True,
        **(macros or {}),
    }
    arguments = c.skinny_arguments(epilogue)(*pointers(matrices), x.at(first_row), epilogue, n_rows)
    return Launch(
        Specialisation.of("skinny", constants),
        (shape.grid, 1, 1),
        _WARPS * 32,
        shape.shared_bytes,
        arguments,
    )
