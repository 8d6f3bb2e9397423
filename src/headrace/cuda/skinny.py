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
from headrace.cuda.tuning import DEFAULTS, Tuning
from headrace.gguf.types import QuantType
from headrace.model.decoder import Decoder

MOST_ROWS = 16
"""Of one launch."""
_LIGHT = frozenset({QuantType.Q4_0, QuantType.Q4_1, QuantType.Q4_K})
"""Types whose code for eight rows takes few registers: more warps have room."""
_PITCH = 20
"""Floats from one row of sums to the next (kernels/skinny.cu)."""


def takes(decoder: Decoder) -> bool:
    """Are all of a decoder's matrices such as it multiplies by?"""
    linears = (linear for _, linears in products_of(decoder) for linear in linears)
    return all(decoder.weights[linear.weight].qtype not in FLOAT_TYPES for linear in linears)


@dataclass(frozen=True)
class SkinnyShape:
    tokens: int
    areas: int
    warps: int
    stripe_warps: int
    pass_units: int
    grid: int
    shared_bytes: int


def skinny_shape(
    device: Device, matrices: Sequence[Matrix], rows: int, *, paired: bool,
    tuning: Tuning = DEFAULTS,
) -> SkinnyShape:  # fmt: skip
    """Passes as few as the shared memory allows, and as equal. The areas, and so the order of sums,
    depend on the matrices and the device alone; many rows of W leave room for half as many."""
    tokens, stripes = 8 if rows <= 8 else MOST_ROWS, -(-matrices[0].layout.k // 256)
    # On sm_86 they would spill; before sm_90 it is not measured either.
    light = tokens == 8 and device.arch >= 90
    light = light and all(m.layout.qtype in _LIGHT for m in matrices)
    padded = [-(-m.layout.n // PADDED_ROWS) for m in matrices]
    units, both = padded[0] if paired else sum(padded), 2 if paired else 1
    rooms = [
        (device.shared_limit - n * (8 * 512 + 4)) // (n * _PITCH * 4 * both) for n in (8, MOST_ROWS)
    ]
    areas = min(16 if units * both <= 512 else 8, stripes, *(room for room in rooms if room > 0))
    if areas < stripes:  # stripes that share an area are one warp's: its warps' number divides it
        areas = 1 << (areas.bit_length() - 1)
    warps = tuning.skinny_warps if light else 8
    stripe_warps = min(warps, 1 << (areas - 1).bit_length())
    grid = min(device.sm_count, units)
    rest = warps * tokens * 512 + tokens * 4
    unit_bytes = areas * tokens * _PITCH * 4 * both
    share = -(-units // grid)
    passes = -(-share // ((device.shared_limit - rest) // unit_bytes))
    pass_units = -(-share // passes)
    shared = rest + pass_units * unit_bytes
    if device.arch >= 90:  # a multiprocessor's only block, for matvec's reason (tuning.Tuning)
        shared = max(shared, device.shared_limit // 2 + 2048)
    return SkinnyShape(tokens, areas, warps, stripe_warps, pass_units, grid, shared)


def skinny(
    device: Device, matrices: Sequence[Matrix], x: Activations, epilogue: c.Epilogue, n_rows: int,
    *, first_row: int = 0, norm_eps: float | None = None, macros: dict[str, object] | None = None,
    tuning: Tuning = DEFAULTS,
) -> Launch:  # fmt: skip
    """As :func:`~headrace.cuda.products.matvec`, for at most ``MOST_ROWS`` rows of bfloat16 and
    quantised matrices. The third address of a :class:`~headrace.cuda.arguments.Rotary` is that of a
    table of :func:`~headrace.cuda.launchers.rotations`."""
    require(device.arch >= 80, f"bfloat16 on tensor cores needs sm_80, not sm_{device.arch}")
    paired = contract(matrices, x, epilogue, n_rows, first_row, norm_eps)
    require(n_rows <= MOST_ROWS, f"{n_rows} rows, {MOST_ROWS} at most")
    require(x.brain is not None, "tensor cores read bfloat16")
    require(all(m.layout.qtype not in FLOAT_TYPES for m in matrices), "quantised matrices")
    shape = skinny_shape(device, matrices, n_rows, paired=paired, tuning=tuning)
    constants = constants_of(matrices, epilogue, norm_eps) | {
        "UNIT_ROWS": PADDED_ROWS,
        "GRID": shape.grid,
        "TOKENS": shape.tokens,
        "AREAS": shape.areas,
        "WARPS": shape.warps,
        "STRIPE_WARPS": shape.stripe_warps,
        "PASS_UNITS": shape.pass_units,
        "AHEAD": tuning.skinny_ahead // shape.warps,
        "BRAIN": True,
        **(macros or {}),
    }
    arguments = c.skinny_arguments(epilogue)(*pointers(matrices), x.at(first_row), epilogue, n_rows)
    return Launch(
        Specialisation.of("skinny", constants),
        (shape.grid, 1, 1),
        shape.warps * 32,
        shape.shared_bytes,
        arguments,
    )
