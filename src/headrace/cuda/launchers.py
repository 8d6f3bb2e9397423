"""One thin launcher for each kernel: its contract, checked, and its shape.

Which kernel runs for what:

====================  ==========================================================================
``matvec``            every matrix; ROWS (1, 2, 4 or 8 rows of activations at once) from the step's
                      rows and the shared memory; int8 activations, or float ones when asked for
                      or when a matrix is F32, F16 or BF16
``matmul``            every matrix instead, where the executor was told to use tensor cores; ROWS (8,
                      16 or 32) likewise
``rotary``            q and k norms, rotary, cache write, where the family norms q or k; elsewhere
                      the projection's own epilogue does it
``attend``            all attention
``post_norm``         families with a norm after a projection
``embed``, ``sample`` the ends of a step
``quantise``          rows given from outside a step (executor.py)
``read``, ``peak``    the ceilings of bandwidth and of arithmetic
``reorder``           once per matrix, at load
====================  ==========================================================================

The weight copies pick their instruction by architecture: bulk copies with mbarriers from sm_90,
cp.async from sm_80, plain loads before (``Ring`` in kernels/primitives.cuh).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass, field, replace

from headrace.cuda import arguments as c
from headrace.cuda.compile import Specialisation
from headrace.cuda.device import Device, DeviceArray, Launch
from headrace.cuda.layout import (
    FLOAT_TYPES,
    PADDED_ROWS,
    PLANES,
    TILE_COLUMNS,
    TILE_ROWS,
    TileLayout,
    tile_block,
)
from headrace.errors import DeviceError
from headrace.sampling import MAX_LOGPROBS

GROUP = 16
"""Activations that share a scale."""
PAGE_SIZE = 64
SPLIT = 128
"""Positions of a split, at least."""
ATTEND_WARPS = 4
ATTEND_PREFETCH = True
_PARTIAL_LIMIT = 48 << 10
"""Shared memory for the row sums of one pass, at most: more rows take more passes."""


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

        def address(array: DeviceArray | None) -> int:
            return array.row(row) if array else 0

        parts = (self.values, self.quants, self.scales, self.squares, self.brain)
        return c.Rows(*map(address, parts))


def padded(k: int) -> int:
    return -(-k // 512) * 512


@dataclass(frozen=True)
class Tuning:
    """How a matvec is cut. The defaults were best on an H100-class GPU; see docs/decisions."""

    warps: int = 16
    stages: int = 2
    exclusive: bool = True
    """Ask for over half of a multiprocessor's shared memory, so that one block has it alone: with
    two, the kernels of a chain of programmatic launches get in each other's way."""


@dataclass(frozen=True)
class MatvecShape:
    rows: int
    warps: int
    stages: int
    pass_units: int
    grid: int
    shared_bytes: int


def matvec_shape(
    device: Device, matrices: Sequence[Matrix], rows: int, *, paired: bool, unit_rows: int,
    floats: bool, tuning: Tuning,
) -> MatvecShape:  # fmt: skip
    """The variant that fits the shared memory: most warps first, then rows, then stages."""
    k = matrices[0].layout.k
    stage = max(m.layout.max_tile_bytes for m in matrices)
    padded_rows = [m.layout.groups * TILE_ROWS for m in matrices]
    units = (padded_rows[0] if paired else sum(padded_rows)) // unit_rows
    grid = min(device.sm_count, units)
    # Code for several types holds too many registers for eight rows.
    most = 8 if len({m.layout.qtype for m in matrices}) == 1 else 4
    at_once = 1 if floats else min(most, 1 << (rows - 1).bit_length())
    unit_bytes = unit_rows * (2 if paired else 1) * (-(-k // TILE_COLUMNS) | 1) * 4
    options = (
        (w, s, r) for w in (32, 24, 16, 12, 8, 4, 2, 1) for r in (8, 4, 2, 1) for s in (4, 3, 2, 1)
    )
    for warps, stages, r in options:
        if warps > tuning.warps or stages > tuning.stages or r > at_once:
            continue
        # A block's share can exceed the average by one unit, of the cheapest matrix by more.
        pass_units = max(1, min(_PARTIAL_LIMIT // (unit_bytes * r), -(-units // grid) + 1))
        x_bytes = r * k * 4 if floats else r * padded(k) // GROUP * 24
        barriers = -(-warps * stages * 8 // 16) * 16
        shared = warps * stages * stage + barriers + x_bytes + r * pass_units * unit_bytes + r * 4
        if shared <= device.shared_limit:
            if tuning.exclusive and device.arch >= 90:
                shared = max(shared, device.shared_limit // 2 + 2048)
            return MatvecShape(r, warps, stages, pass_units, grid, shared)
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
    tuning: Tuning = Tuning(),
) -> Launch:
    """``y = W x`` for one to three matrices over rows ``first_row …`` of x.

    ``norm_eps``: x was stored times the norm's weight, with its squares; divide by its RMS.
    ``floats``: read x's float values (times ``in_gain`` if there is a norm), not its int8 groups.
    """
    paired = isinstance(epilogue, c.Product)
    quantises = isinstance(epilogue, c.Product | c.Residual)
    k = matrices[0].layout.k
    floats = floats or any(m.layout.qtype in FLOAT_TYPES for m in matrices)
    _require(
        1 <= len(matrices) <= 3 and (not paired or len(matrices) == 2),
        "one to three matrices, or a pair",
    )
    _require(all(m.layout.k == k for m in matrices), "matrices that share x have the same K")
    _require(x.width == k, f"x has {x.width} columns, the matrix {k}")
    _require(
        n_rows > 0 and first_row + n_rows <= x.rows, f"rows {first_row} + {n_rows} of {x.rows}"
    )
    _require(all(m.address % 16 == 0 for m in matrices), "matrices lie on 16-byte boundaries")
    _require(
        not paired or matrices[0].layout.n == matrices[1].layout.n, "gate and up have equal rows"
    )
    _require(norm_eps is None or x.squares is not None, "a norm needs x's squares")
    _require(not floats or x.values is not None, "float activations need x's values")
    unit_rows = PADDED_ROWS if quantises else TILE_ROWS
    shape = matvec_shape(
        device, matrices, n_rows, paired=paired, unit_rows=unit_rows, floats=floats, tuning=tuning
    )
    types = [m.layout.qtype.name for m in matrices] + ["NONE"] * (3 - len(matrices))
    sizes = [m.layout.n for m in matrices] + [0] * (3 - len(matrices))
    constants: dict[str, object] = {
        "K": k,
        **{f"TYPE{i}": types[i] for i in range(3)},
        **{f"N{i}": sizes[i] for i in range(3)},
        "PAIRED": paired,
        "UNIT_ROWS": unit_rows,
        "ROWS": shape.rows,
        "FLOAT_ACTIVATIONS": floats,
        "NORM": norm_eps is not None,
        "EPS": float(norm_eps or 0.0),
        "EPILOGUE": c.EPILOGUES[type(epilogue)],
        "WARPS": shape.warps,
        "STAGES": shape.stages,
        "PASS_UNITS": shape.pass_units,
        "GRID": shape.grid,
        **(macros or {}),
    }
    written = getattr(epilogue, "x", None) or getattr(epilogue, "hidden", None)
    if written is not None:
        constants |= _brain(written)
    addresses = [m.address for m in matrices] + [0] * (3 - len(matrices))
    biases = [m.bias for m in matrices] + [0] * (3 - len(matrices))
    arguments = c.matvec_arguments(epilogue)(
        (c_void_p * 3)(*addresses),
        (c_void_p * 3)(*biases),
        x.at(first_row),
        in_gain,
        epilogue,
        n_rows,
    )
    grid = (shape.grid, -(-n_rows // shape.rows), 1)
    return Launch(
        Specialisation.of("matvec", constants),
        grid,
        shape.warps * 32,
        shape.shared_bytes,
        arguments,
    )


@dataclass(frozen=True)
class MatmulShape:
    rows: int
    warps: int
    stages: int
    grid: int
    shared_bytes: int


def matmul_shape(
    device: Device, matrices: Sequence[Matrix], rows: int, *, paired: bool
) -> MatmulShape:
    """As many rows of x at once as there are and fit; then two stages; then more rows of W."""
    tile = -(-max(m.layout.max_tile_bytes for m in matrices) // 128) * 128
    wanted = 8 if rows <= 8 else 16 if rows <= 16 else 32
    options = (
        (r, stages, warps)
        for stages in (2, 1)
        for r in (32, 16, 8)
        for warps in (16, 8, 4)
        if r <= wanted and not (paired and warps == 4)
    )
    total = sum(m.layout.groups // 4 for m in matrices)
    for r, stages, warps in options:
        m_tiles = warps // 4
        if m_tiles > 1 + paired and total // m_tiles < 0.9 * device.sm_count:
            continue  # few rows of W: a share for every multiprocessor comes first
        shared = stages * (4 * m_tiles * tile + r * TILE_COLUMNS * 2)
        shared += 4 * r * m_tiles * 16 * 4 + -(-stages * 8 // 16) * 16 + r * 4
        if shared <= device.shared_limit:
            at_once = max(1, min(device.shared_limit // shared, 64 // warps))
            grid = min(-(-total // m_tiles), device.sm_count * at_once)
            return MatmulShape(r, warps, stages, grid, shared)
    raise DeviceError(f"no matmul variant fits {device.shared_limit:,} bytes of shared memory")


def matmul(
    device: Device, matrices: Sequence[Matrix], x: Activations, epilogue: c.Epilogue, n_rows: int,
    *, first_row: int = 0, norm_eps: float | None = None, macros: dict[str, object] | None = None,
) -> Launch:  # fmt: skip
    """As :func:`matvec`, on tensor cores from bfloat16 activations."""
    paired = isinstance(epilogue, c.Product)
    k = matrices[0].layout.k
    _require(device.arch >= 80, f"bfloat16 on tensor cores needs sm_80, not sm_{device.arch}")
    _require(
        1 <= len(matrices) <= 3 and (not paired or len(matrices) == 2),
        "one to three matrices, or a pair",
    )
    _require(all(m.layout.k == k for m in matrices), "matrices that share x have the same K")
    _require(x.width == k, f"x has {x.width} columns, the matrix {k}")
    _require(
        n_rows > 0 and first_row + n_rows <= x.rows, f"rows {first_row} + {n_rows} of {x.rows}"
    )
    _require(all(m.address % 16 == 0 for m in matrices), "matrices lie on 16-byte boundaries")
    _require(
        not paired or matrices[0].layout.n == matrices[1].layout.n, "gate and up have equal rows"
    )
    _require(norm_eps is None or x.squares is not None, "a norm needs x's squares")
    _require(x.brain is not None, "tensor cores read bfloat16")
    shape = matmul_shape(device, matrices, n_rows, paired=paired)
    types = [m.layout.qtype.name for m in matrices] + ["NONE"] * (3 - len(matrices))
    sizes = [m.layout.n for m in matrices] + [0] * (3 - len(matrices))
    constants: dict[str, object] = {
        "K": k,
        **{f"TYPE{i}": types[i] for i in range(3)},
        **{f"N{i}": sizes[i] for i in range(3)},
        "PAIRED": paired,
        "ROWS": shape.rows,
        "NORM": norm_eps is not None,
        "EPS": float(norm_eps or 0.0),
        "EPILOGUE": c.EPILOGUES[type(epilogue)],
        "WARPS": shape.warps,
        "STAGES": shape.stages,
        "BRAIN": True,
        **(macros or {}),
    }
    addresses = [m.address for m in matrices] + [0] * (3 - len(matrices))
    biases = [m.bias for m in matrices] + [0] * (3 - len(matrices))
    arguments = c.matmul_arguments(epilogue)(
        (c_void_p * 3)(*addresses), (c_void_p * 3)(*biases), x.at(first_row), epilogue, n_rows
    )
    grid = (shape.grid, -(-n_rows // shape.rows), 1)
    return Launch(
        Specialisation.of("matmul", constants),
        grid,
        shape.warps * 32,
        shape.shared_bytes,
        arguments,
    )


@dataclass(frozen=True)
class CacheShape:
    """One layer's attention shape, as its kernels see it."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_dim: int = 0
    magnitude: float = 1.0
    macros: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        _require(
            self.head_dim % 16 == 0, f"head_dim {self.head_dim}: a multiple of 16 is supported"
        )
        _require(self.n_heads % self.n_kv_heads == 0, "n_heads is a multiple of n_kv_heads")
        _require(
            self.rope_dim % 2 == 0 and self.rope_dim <= self.head_dim, "rope_dim is even and fits"
        )
        macros: dict[str, object] = {
            "KV_HEADS": self.n_kv_heads,
            "HEAD_DIM": self.head_dim,
            "ROPE_DIM": self.rope_dim,
            "MAGNITUDE": float(self.magnitude),
        }
        object.__setattr__(self, "macros", macros)

    def page_bytes(self) -> int:
        """Bytes of the keys, or of the values, of one page."""
        return self.n_kv_heads * PAGE_SIZE * self.cache_dim * 2

    @property
    def cache_dim(self) -> int:
        """head_dim as the cache pads it."""
        return -(-self.head_dim // 32) * 32


def rotary(
    shape: CacheShape,
    arguments: c.RotaryHeads,
    n_rows: int,
    *,
    eps: float,
    q_norm: bool,
    k_norm: bool,
) -> Launch:
    constants = shape.macros | {
        "HEADS": shape.n_heads,
        "EPS": float(eps),
        "Q_NORM": q_norm,
        "K_NORM": k_norm,
    }
    grid = (shape.n_heads + 2 * shape.n_kv_heads, n_rows, 1)
    return Launch(Specialisation.of("rotary", constants), grid, 32, 0, arguments)


def head_tiles(n_heads: int, n_kv_heads: int) -> int:
    """Blocks of up to eight query heads, over all kv heads."""
    return n_kv_heads * -(-(n_heads // n_kv_heads) // 8)


def max_splits(device: Device, n_heads: int, n_kv_heads: int) -> int:
    """Splits of one row's positions, at most: two blocks for every multiprocessor."""
    return min(64, max(1, 2 * device.sm_count // head_tiles(n_heads, n_kv_heads)))


def attend(
    device: Device, shape: CacheShape, arguments: c.Attend, n_rows: int, longest: int, *,
    scale: float, window: int | None, softcap: float | None,
) -> Launch:  # fmt: skip
    """``longest``: the greatest length (position + 1) of a row; a longer row is right, but slow."""
    most = max_splits(device, shape.n_heads, shape.n_kv_heads)
    constants = shape.macros | {
        "HEADS": shape.n_heads,
        "SCALE": float(scale),
        "WINDOW": window or 0,
        "SOFTCAP": float(softcap or 0.0),
        "SPLIT": SPLIT,
        "MAX_SPLITS": most,
        "WARPS": ATTEND_WARPS,
        "PREFETCH": ATTEND_PREFETCH,
        **_brain(arguments.out),
    }
    visible = min(longest, (window or longest) + SPLIT)
    splits = min(most, -(-visible // SPLIT))
    blocks = head_tiles(shape.n_heads, shape.n_kv_heads)
    grid = (blocks, splits, n_rows)
    sums = ATTEND_WARPS * 8 * (shape.cache_dim + 2) * 4
    shared = shape.cache_dim // 16 * 512 + sums + 8 * most * 4 + 16
    return Launch(
        Specialisation.of("attend", constants), grid, ATTEND_WARPS * 32, shared, arguments
    )


def embed(matrix: Matrix, arguments: c.Embed, n_rows: int, *, scale: float) -> Launch:
    constants = {
        "TYPE": matrix.layout.qtype.name,
        "K": matrix.layout.k,
        "SCALE": float(scale),
        "WARPS": 8,
        **_brain(arguments.x),
    }
    grid = (-(-matrix.layout.k // TILE_COLUMNS), n_rows, 1)
    shared = TILE_COLUMNS // GROUP * (GROUP + 1) * 4
    return Launch(Specialisation.of("embed", constants), grid, 256, shared, arguments)


def _brain(rows: c.Rows) -> dict[str, object]:
    """Activations are written as bfloat16 where there is a place for them."""
    return {"BRAIN": True} if rows.brain else {}


def quantise(width: int, arguments: c.Quantise, n_rows: int) -> Launch:
    constants = {"K": width, "WARPS": 8, **_brain(arguments.x)}
    grid = (-(-width // 256), n_rows, 1)
    return Launch(Specialisation.of("quantise", constants), grid, 256, 0, arguments)


def post_norm(width: int, arguments: c.PostNorm, n_rows: int, *, eps: float) -> Launch:
    constants = {"K": width, "EPS": float(eps), "WARPS": 16, **_brain(arguments.x)}
    return Launch(Specialisation.of("post_norm", constants), (n_rows, 1, 1), 512, 16 * 4, arguments)


MAX_BIAS = 1024
"""Biased ids of one row, at most (kernels/sample.cu, as is the next)."""
REPORT_WORDS = 1 + 2 * MAX_LOGPROBS
"""A row's report: its log-probability, then (id, log-probability) of the likeliest."""


@dataclass(frozen=True)
class SampleShape:
    """How a vocabulary is cut: ``subs`` sub-blocks of ``sub`` ids, shared by ``blocks`` blocks."""

    n_vocab: int
    sub: int = field(init=False)
    subs: int = field(init=False)
    blocks: int = field(init=False)

    def __post_init__(self) -> None:
        sub = 64 * -(-self.n_vocab // (64 * 4096))
        subs = -(-self.n_vocab // sub)
        for name, value in (("sub", sub), ("subs", subs), ("blocks", max(1, min(64, subs // 8)))):
            object.__setattr__(self, name, value)


def sample(shape: SampleShape, arguments: c.Sample, n_rows: int) -> Launch:
    warps = 16
    constants = {
        "VOCABULARY": shape.n_vocab,
        "SUB": shape.sub,
        "BLOCKS": shape.blocks,
        "WARPS": warps,
    }
    chunk = -(-shape.subs // shape.blocks) * shape.sub
    work = max(2 * 2048 * 4 + shape.subs * 4, shape.subs * 8, chunk * 8)
    scratch = (2 * warps + 4) * 8 + MAX_LOGPROBS * 8
    shared = work + -(-shape.subs * 2 // 16) * 16 + scratch
    grid = (shape.blocks, n_rows, 1)
    return Launch(Specialisation.of("sample", constants), grid, warps * 32, shared, arguments)


def reorder(
    layout: TileLayout,
    source: int,
    target: int,
    first_row: int,
    rows: int,
    *,
    head_dim: int,
    rope_dim: int,
) -> Launch:
    """Tiles of file rows ``first_row …``, whose bytes lie at ``source``; the last chunk pads."""
    last = first_row + rows == layout.n
    _require(
        first_row % TILE_ROWS == 0 and (last or rows % TILE_ROWS == 0), "chunks of whole tiles"
    )
    _require(
        not rope_dim or (first_row % head_dim == 0 and rows % head_dim == 0),
        "chunks of whole heads",
    )
    values, block_bytes = tile_block(layout.qtype)
    planes = PLANES[layout.qtype]
    constants = {
        "VALUES": values,
        "BLOCK_BYTES": block_bytes,
        "PLANE_OFFSETS": "{" + ",".join(str(offset) for offset, _ in planes) + "}",
        "PLANE_SIZES": "{" + ",".join(str(size) for _, size in planes) + "}",
    }
    groups = layout.groups - first_row // TILE_ROWS if last else rows // TILE_ROWS
    arguments = c.Reorder(source, target, layout.n, layout.k, first_row, rows, head_dim, rope_dim)
    return Launch(Specialisation.of("reorder", constants), (groups, 1, 1), 256, 0, arguments)


def _require(condition: bool, contract: str) -> None:
    if not condition:
        raise DeviceError(f"launch contract broken: {contract}")


def read(device: Device, source: int, n_bytes: int, sink: int) -> Launch:
    """Read ``n_bytes`` (a multiple of 16), for the bandwidth ceiling."""
    arguments = c.Read(source, n_bytes // 16, sink)
    grid = (device.sm_count * 4, 1, 1)
    return Launch(Specialisation.of("read", {"WARPS": 16}), grid, 512, 0, arguments)


PEAK_ITERATIONS = 4096


def peak(device: Device, sink: int, *, integer: bool) -> tuple[Launch, int]:
    """Products from registers, and how many operations (a product is a multiplication and an
    addition) they are."""
    warps, blocks = 16, device.sm_count * 4
    constants = {"INTEGER": integer, "ITERATIONS": PEAK_ITERATIONS, "WARPS": warps}
    launch = Launch(
        Specialisation.of("peak", constants), (blocks, 1, 1), warps * 32, 0, c.Peak(sink)
    )
    products = blocks * warps * 32 * PEAK_ITERATIONS * 8 * (4 if integer else 1)
    return launch, 2 * products


def timed(launch: Launch, stamps: int) -> Launch:
    """The same kernel, noting at ``stamps`` (two uint64, zero before) when it began and ended."""
    spec = launch.spec
    macros = tuple(sorted({**dict(spec.macros), "TIMED": "1"}.items()))
    return replace(
        launch,
        spec=Specialisation(spec.name, macros),
        arguments=c.timed(launch.arguments, stamps),
    )
