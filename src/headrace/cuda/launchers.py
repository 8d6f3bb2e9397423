"""One thin launcher for each kernel: its contract, checked, and its shape.

Which kernel runs for what (``matvec`` is in ``products.py``, the other two in files of their own):

====================  ==========================================================================
``matvec``            every matrix; ROWS (1, 2, 4 or 8 rows of activations at once) from the step's
                      rows and the shared memory; int8 activations, or float ones when asked for
                      or when a matrix is F32, F16 or BF16
``gemm``              every matrix instead, on tensor cores: in prompts (``Step.prompt``), and in
                      steps of ``tensor_rows`` rows or more
``skinny``            every matrix instead, on tensor cores: in steps of ``few_rows`` rows, if all
                      matrices are quantised
``token``             all layers of a step of one row in one launch, if ``one_kernel`` asks for it
``rotations``         the angles of a step's rows, for ``gemm``'s and ``skinny``'s epilogue
``rotary``            q and k norms, rotary, cache write, where the family norms q or k; elsewhere
                      the projection's own epilogue does it
``attend``            attention of rows
``prompt_attend``     attention of a prompt's rows, with ``gemm``
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

from dataclasses import dataclass, field, replace

from headrace.cuda import arguments as c
from headrace.cuda.compile import Specialisation
from headrace.cuda.device import Device, Launch
from headrace.cuda.layout import (
    PLANES,
    TILE_COLUMNS,
    TILE_ROWS,
    TileLayout,
    tile_block,
)
from headrace.cuda.products import GROUP, Matrix, brain, require
from headrace.cuda.tuning import ALLOWED, DEFAULTS, Tuning
from headrace.errors import DeviceError
from headrace.model.operations import Activation
from headrace.sampling import MAX_LOGPROBS

ACTIVATIONS = {Activation.SILU: "SILU", Activation.GELU_TANH: "GELU_TANH"}
"""kernels/epilogue_names.cuh"""

PAGE_SIZE = 64
CACHE_GROUP = 32
"""Dims of a position that share a scale in a quantised cache."""


@dataclass(frozen=True)
class CacheShape:
    """One layer's attention shape, as its kernels see it."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_dim: int = 0
    magnitude: float = 1.0
    quantised: bool = False
    """Q8_0 (docs/decisions/016), else f16."""
    macros: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        require(self.head_dim % 16 == 0, f"head_dim {self.head_dim}: a multiple of 16 is supported")
        require(self.n_heads % self.n_kv_heads == 0, "n_heads is a multiple of n_kv_heads")
        require(
            self.rope_dim % 2 == 0 and self.rope_dim <= self.head_dim, "rope_dim is even and fits"
        )
        macros: dict[str, object] = {
            "KV_HEADS": self.n_kv_heads,
            "HEAD_DIM": self.head_dim,
            "ROPE_DIM": self.rope_dim,
            "MAGNITUDE": float(self.magnitude),
            "CACHE_Q8": self.quantised,
        }
        object.__setattr__(self, "macros", macros)

    def page_bytes(self) -> int:
        """Bytes of the keys, or of the values, of one page."""
        scales = self.cache_dim // CACHE_GROUP * 2
        of_a_position = self.cache_dim + scales if self.quantised else self.cache_dim * 2
        return self.n_kv_heads * PAGE_SIZE * of_a_position

    @property
    def half_page(self) -> int:
        """Bytes of half of one head's keys, or values, of one page."""
        return self.page_bytes() // self.n_kv_heads // 2

    @property
    def cache_dim(self) -> int:
        """head_dim as the cache pads it."""
        return -(-self.head_dim // CACHE_GROUP) * CACHE_GROUP


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


def rotations(shape: CacheShape, arguments: c.Rotations, n_rows: int) -> Launch:
    """The table [rows, rope_dim / 2] of (cosine, sine) that gemm's rotary epilogue reads."""
    require(shape.rope_dim % 4 == 0 and shape.head_dim % 4 == 0, "heads turn by fours")
    grid = (-(-n_rows * (shape.rope_dim // 2) // 256), 1, 1)
    return Launch(Specialisation.of("rotations", shape.macros), grid, 256, 0, arguments)


def head_tiles(n_heads: int, n_kv_heads: int) -> int:
    """Blocks of up to eight query heads, over all kv heads."""
    return n_kv_heads * -(-(n_heads // n_kv_heads) // 8)


def max_splits(device: Device, shape: CacheShape) -> int:
    """Splits of one row's positions, at most: a block for every multiprocessor."""
    return min(64, max(1, device.sm_count // head_tiles(shape.n_heads, shape.n_kv_heads)))


def attend(
    device: Device, shape: CacheShape, arguments: c.Attend, n_rows: int, longest: int, *,
    scale: float, window: int | None, softcap: float | None, tuning: Tuning = DEFAULTS,
) -> Launch:  # fmt: skip
    """``longest``: the greatest length (position + 1) of a row; a longer row is right, but slow."""
    constants = attend_constants(
        device, shape, scale=scale, window=window, softcap=softcap, tuning=tuning
    )
    split, warps = tuning.attend_split, attend_warps(device, shape, tuning)
    visible = min(longest, (window or longest) + split)
    splits = min(max_splits(device, shape), -(-visible // split))
    grid = (head_tiles(shape.n_heads, shape.n_kv_heads), splits, n_rows)
    return Launch(
        Specialisation.of("attend", constants | brain(arguments.out)),
        grid, warps * 32, attend_bytes(device, shape, warps), arguments,
    )  # fmt: skip


def attend_constants(
    device: Device, shape: CacheShape, *,
    scale: float, window: int | None, softcap: float | None, tuning: Tuning,
) -> dict[str, object]:  # fmt: skip
    """Macros of kernels/attend.cuh. None depends on a step's rows or their lengths: how positions
    are split, and so a row's bits, is the same in any step."""
    return shape.macros | {
        "HEADS": shape.n_heads,
        "SCALE": float(scale),
        "WINDOW": window or 0,
        "SOFTCAP": float(softcap or 0.0),
        "SPLIT": tuning.attend_split,
        "MAX_SPLITS": max_splits(device, shape),
        "ATTEND_WARPS": attend_warps(device, shape, tuning),
    }


def attend_warps(device: Device, shape: CacheShape, tuning: Tuning) -> int:
    """As many as asked for, or the most that the shared memory has room for."""
    for warps in reversed(ALLOWED["attend_warps"]):
        fits = attend_bytes(device, shape, warps) <= device.shared_limit
        if warps <= tuning.attend_warps and fits:
            return int(warps)
    raise DeviceError(
        f"no attention of heads of {shape.head_dim} fits {device.shared_limit:,} bytes"
    )


def attend_bytes(device: Device, shape: CacheShape, warps: int) -> int:
    """Shared memory of so many warps (kernels/attend.cuh)."""
    heads = min(8, shape.n_heads // shape.n_kv_heads)
    sums = warps * heads * (shape.cache_dim + 2) * 4
    return shape.cache_dim // 16 * 512 + sums + heads * max_splits(device, shape) * 4 + 16


def prompt_attend(
    device: Device, shape: CacheShape, arguments: c.PromptAttend, *,
    scale: float, window: int | None, softcap: float | None,
) -> Launch:  # fmt: skip
    """As :func:`attend`, to bfloat16, and made for many rows of each slot."""
    require(device.arch >= 80, f"attention of prompts needs sm_80, not sm_{device.arch}")
    group, dim = shape.n_heads // shape.n_kv_heads, shape.cache_dim
    together = device.arch == 90 and dim in (64, 128)
    if together:
        heads = min((8, 4, 2, 1), key=lambda n: -(-group // n) * n)  # the fewest idle
        warps, stages, tokens = 8, 6, 8 // heads * 16
        # A quantised page is 17 / 32 of an f16 one, and three are f16 besides.
        pages = 3 * 256 + stages * 136 if shape.quantised else stages * 256
        shared = pages * dim + 2 * tokens * 4
    else:
        heads, warps, stages, tokens, shared = _prompt_tile(device, group, shape)
    constants = shape.macros | {
        "HEADS": shape.n_heads,
        "SCALE": float(scale),
        "WINDOW": window or 0,
        "SOFTCAP": float(softcap or 0.0),
        "HEAD_TILE": heads,
        "WARPS": warps,
        "STAGES": stages,
        "TOGETHER": together,
        "BRAIN": True,
    }
    grid = (shape.n_kv_heads * -(-group // heads), -(-arguments.n_rows // tokens), 1)
    return Launch(
        Specialisation.of("prompt_attend", constants), grid, warps * 32, shared, arguments
    )


def _prompt_tile(device: Device, group: int, shape: CacheShape) -> tuple[int, int, int, int, int]:
    """Heads, warps, stages, rows and shared bytes of a block, where each warp is on its own."""
    dim, stage = shape.cache_dim, (68 if shape.quantised else 128) * shape.cache_dim
    tiles, fragments = 2 if dim <= 128 else 1, dim // 16
    for most, stages in ((8, 3), (8, 2), (4, 3), (4, 2), (2, 2)):
        heads = min(group, most)
        warps = most // heads * heads
        tokens = warps // heads * tiles * 16
        shared = stages * stage + warps * tiles * fragments * 512 + 2 * tokens * 4
        if shared <= device.shared_limit:
            return heads, warps, stages, tokens, shared
    raise DeviceError(f"no attention of heads of {dim} fits {device.shared_limit:,} bytes")


def embed(matrix: Matrix, arguments: c.Embed, n_rows: int, *, scale: float) -> Launch:
    constants = {
        "TYPE": matrix.layout.qtype.name,
        "K": matrix.layout.k,
        "SCALE": float(scale),
        "WARPS": 8,
        **brain(arguments.x),
    }
    grid = (-(-matrix.layout.k // TILE_COLUMNS), n_rows, 1)
    shared = TILE_COLUMNS // GROUP * (GROUP + 1) * 4
    return Launch(Specialisation.of("embed", constants), grid, 256, shared, arguments)


def quantise(width: int, arguments: c.Quantise, n_rows: int) -> Launch:
    constants = {"K": width, "WARPS": 8, **brain(arguments.x)}
    grid = (-(-width // 256), n_rows, 1)
    return Launch(Specialisation.of("quantise", constants), grid, 256, 0, arguments)


def post_norm(width: int, arguments: c.PostNorm, n_rows: int, *, eps: float) -> Launch:
    constants = {"K": width, "EPS": float(eps), "WARPS": 16, **brain(arguments.x)}
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
    work = -(-max(2 * 2048 * 4 + shape.subs * 4, shape.subs * 8, chunk * 8) // 16) * 16
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
    require(first_row % TILE_ROWS == 0 and (last or rows % TILE_ROWS == 0), "chunks of whole tiles")
    require(
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


def read(device: Device, source: int, n_bytes: int, sink: int) -> Launch:
    """Read ``n_bytes`` (a multiple of 16), for the bandwidth ceiling."""
    arguments = c.Read(source, n_bytes // 16, sink)
    grid = (device.sm_count * 4, 1, 1)
    return Launch(Specialisation.of("read", {"WARPS": 16}), grid, 512, 0, arguments)


PEAK_ITERATIONS = 4096


def peak(device: Device, sink: int, arithmetic: str) -> tuple[Launch, int]:
    """Products from registers, and how many operations (a product is a multiplication and an
    addition) they are. ``arithmetic``: DOTS, FMAS or TENSORS."""
    warps, blocks, chains = 16, device.sm_count * 4, 8
    constants = {"ARITHMETIC": arithmetic, "ITERATIONS": PEAK_ITERATIONS, "WARPS": warps}
    launch = Launch(
        Specialisation.of("peak", constants), (blocks, 1, 1), warps * 32, 0, c.Peak(sink)
    )
    of_a_warp = {"DOTS": 32 * 4, "FMAS": 32, "TENSORS": 16 * 8 * 16}[arithmetic]
    return launch, 2 * blocks * warps * PEAK_ITERATIONS * chains * of_a_warp


def timed(launch: Launch, stamps: int) -> Launch:
    """The same kernel, noting at ``stamps`` (two uint64, zero before) when it began and ended."""
    spec = launch.spec
    macros = tuple(sorted({**dict(spec.macros), "TIMED": "1"}.items()))
    return replace(
        launch,
        spec=Specialisation(spec.name, macros),
        arguments=c.timed(launch.arguments, stamps),
    )
