"""``gemm``: products on tensor cores straight from the packed tiles, for many rows and for few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cuda import arguments as c
from headrace.cuda.compile import Specialisation
from headrace.cuda.device import Device, Launch
from headrace.cuda.products import (
    Activations,
    Matrix,
    constants_of,
    contract,
    pointers,
    require,
)
from headrace.cuda.tuning import DEFAULTS, Tuning
from headrace.errors import DeviceError


@dataclass(frozen=True)
class GemmShape:
    tokens: int
    splits: int
    stage_steps: int
    stages: int
    grid: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True)
class SplitWork:
    """Where the parts of products that several blocks share meet: addresses, and how many floats
    there is room for. The counters are zero between launches."""

    partial: int
    n_floats: int
    arrived: int


_UNIT = 64
"""Rows of W of four warps; a block has two units at a time."""
TOKENS_AT_ONCE = (8, 16, 32, 64, 128, 256)


def gemm_pairs(sizes: Sequence[int], *, paired: bool, by_tiles: bool) -> int:
    """Blocks' shares of matrices of so many rows. ``by_tiles``: their outputs become activations,
    which lie in four tiles for every 256 (kernels/activations.cuh)."""
    if paired:
        return -(-sizes[0] // 256) * 4
    units = (-(-n // 256) * 4 if by_tiles else -(-n // _UNIT) for n in sizes)
    return -(-sum(units) // 2)


def gemm_splits(device: Device, pairs: int, k: int, tuning: Tuning) -> int:
    """How many blocks share the columns of a matrix that few rows of x meet: as many, each with the
    same number of blocks of 256, as give each multiprocessor ``gemm_fill`` of them on average."""
    blocks = -(-k // 256)
    splits = [n for n in range(1, 9) if blocks % n == 0]
    return next((n for n in splits if pairs * n >= tuning.gemm_fill * device.sm_count), splits[-1])


def _most_tokens(device: Device) -> int:
    """At once: without wgmma, x takes registers, too, and on sm_100 and later more of them."""
    return 256 if device.arch == 90 else 128 if device.arch < 90 else 64


def split_room(
    device: Device, sizes: Sequence[int], k: int, rows: int, *, paired: bool,
    tuning: Tuning = DEFAULTS,
) -> tuple[int, int]:  # fmt: skip
    """(floats, counters) that a product of at most so many rows needs of a :class:`SplitWork`."""
    tokens = min(_most_tokens(device), 128, max(8, 1 << (rows - 1).bit_length()))
    most = (0, 0)
    for by_tiles in (False, True):
        pairs = gemm_pairs(sizes, paired=paired, by_tiles=by_tiles)
        splits = gemm_splits(device, pairs, k, tuning)
        columns = -(-rows // tokens)
        room = columns * pairs * splits * 128 * tokens, columns * pairs
        most = max(most, room) if splits > 1 else most
    return most


def gemm_shape(
    device: Device, matrices: Sequence[Matrix], pairs: int, rows: int, *, few: bool, tuning: Tuning
) -> GemmShape:
    """``few``: rows that are weighed alone (a step of decoding), whose columns may be split. Else
    as many tokens at once as keep the multiprocessors evenly busy."""
    splits = gemm_splits(device, pairs, matrices[0].layout.k, tuning) if few else 1
    most = _most_tokens(device)
    found: list[tuple[int, GemmShape]] = []
    for tokens in TOKENS_AT_ONCE:
        if tokens > most:
            break
        steps = max(1, min(4, 256 // tokens))
        stage, slabs = steps * tokens * 64 * 2, 8 * min(64, tokens) * 20 * 4
        rest = slabs + tokens * 12 + 16
        stages = min(4, (device.shared_limit - rest - 128) // stage)
        if stages < 3 or (few and tokens < min(rows, most, 128)):
            continue
        columns = -(-rows // tokens)
        blocks = pairs if few else min(pairs, max(1, device.sm_count // columns))
        shared = stages * stage + rest + -(-2 * stages * 8 // 16) * 16
        turns = -(-pairs // blocks) * -(-(columns * blocks) // device.sm_count)
        shape = GemmShape(tokens, splits, steps, stages, (columns, blocks, splits), shared)
        found.append((turns * (tokens + tuning.gemm_unpack), shape))
    if not found:
        raise DeviceError(f"no gemm variant fits {device.shared_limit:,} bytes of shared memory")
    return found[0][1] if few else min(found, key=lambda one: one[0])[1]


def gemm(
    device: Device, matrices: Sequence[Matrix], x: Activations, epilogue: c.Epilogue, n_rows: int,
    *, first_row: int = 0, norm_eps: float | None = None, macros: dict[str, object] | None = None,
    work: SplitWork | None = None, tuning: Tuning = DEFAULTS,
) -> Launch:  # fmt: skip
    """As :func:`matvec`, on tensor cores from bfloat16 activations; ``work``: for few rows.

    Rows not from the first on only with a :class:`~headrace.cuda.arguments.Store`: as many as lie
    in a tile of x before ``first_row`` are worked out, too, and not kept. The third address of a
    :class:`~headrace.cuda.arguments.Rotary` is that of a table of :func:`launchers.rotations`.
    """
    require(device.arch >= 80, f"bfloat16 on tensor cores needs sm_80, not sm_{device.arch}")
    paired = contract(matrices, x, epilogue, n_rows, first_row, norm_eps)
    require(x.brain is not None, "tensor cores read bfloat16")
    skip, sizes = first_row % 8, [m.layout.n for m in matrices]
    if first_row % 64 - skip + n_rows + skip > 64:
        skip = first_row % 64
    n_rows += skip
    if skip:
        require(isinstance(epilogue, c.Store), f"row {first_row} begins no tile of 64 rows")
        epilogue = c.Store(epilogue.y - skip * sum(sizes) * 4)
    pairs = gemm_pairs(sizes, paired=paired, by_tiles=isinstance(epilogue, c.Residual))
    shape = gemm_shape(device, matrices, pairs, n_rows, few=work is not None, tuning=tuning)
    if work is not None and shape.splits > 1:
        floats = shape.grid[0] * pairs * shape.splits * 128 * shape.tokens
        require(floats <= work.n_floats, f"{floats} partial sums, room for {work.n_floats}")
    constants = constants_of(matrices, epilogue, norm_eps) | {
        "TOKENS": shape.tokens,
        "SPLITS": shape.splits,
        "STAGE_STEPS": shape.stage_steps,
        "STAGES": shape.stages,
        "BRAIN": True,
        **(macros or {}),
    }
    where = (work.partial, work.arrived) if work else (0, 0)
    arguments = c.gemm_arguments(epilogue)(
        *pointers(matrices), x.at(first_row - skip), epilogue, *where, n_rows, skip
    )
    return Launch(
        Specialisation.of("gemm", constants), shape.grid, 256, shape.shared_bytes, arguments
    )
