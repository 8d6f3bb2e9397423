"""``token``: all layers of one row in one kernel that stays on the device's multiprocessors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ctypes import c_int, c_void_p, sizeof
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.cuda import arguments as c
from headrace.cuda import launchers
from headrace.cuda.compile import Specialisation
from headrace.cuda.device import Device, Launch
from headrace.cuda.launchers import CacheShape
from headrace.cuda.layout import FLOAT_TYPES, PADDED_ROWS, TILE_COLUMNS, TILE_ROWS, TileLayout
from headrace.cuda.products import GROUP, Matrix, padded
from headrace.cuda.steps import LayerCache
from headrace.cuda.tuning import DEFAULTS, Tuning
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    Attend,
    FeedForwardIn,
    FeedForwardOut,
    Linear,
    ProjectOut,
    ProjectQKV,
)

WARPS = 11
"""That multiply; with the one that streams, as many as leave a thread 168 registers."""
_LARGEST_STAGE = 12 << 10
"""Bytes of four tiles that are a stage; of larger ones it is two."""
AHEAD = 3
"""Stages under way at once, of one multiprocessor. docs/decisions/017 has what was measured."""

Operations = tuple[ProjectQKV, Attend, ProjectOut, FeedForwardIn, FeedForwardOut]
KINDS = (ProjectQKV, Attend, ProjectOut, FeedForwardIn, FeedForwardOut)


@dataclass(frozen=True)
class TokenShape:
    """How the kernel is cut. ``units`` int32 [grid, layers, 4 products, (first, last)]."""

    layers: tuple[Operations, ...]
    constants: Mapping[str, object]
    units: NDArray[np.int32]
    shared_bytes: int

    @property
    def grid(self) -> int:
        return len(self.units)


def layers_of(decoder: Decoder) -> tuple[Operations, ...] | None:
    """The operations of each layer, where all are what the kernel does, and alike."""
    body = decoder.operations[1:-1]
    layers = [tuple(body[i : i + len(KINDS)]) for i in range(0, len(body), len(KINDS))]
    alike = set()
    for layer in layers:
        match layer:
            case (ProjectQKV() as qkv, Attend() as at, ProjectOut() as out, FeedForwardIn() as up,
                  FeedForwardOut() as down):  # fmt: skip
                if qkv.q_norm or qkv.k_norm or qkv.rope.dim % 4 or out.post_norm or down.post_norm:
                    return None
                sizes = tuple(one.n for one in (qkv.q, qkv.k, qkv.v, up.gate, up.up))
                alike.add((
                    qkv.rope, qkv.norm.eps, up.norm.eps, up.activation, sizes,
                    at.n_heads, at.n_kv_heads, at.head_dim, at.scale, at.window, at.softcap,
                ))  # fmt: skip
            case _:
                return None
    qkv_eps = {one[1] for one in alike} | {one[2] for one in alike}
    return tuple(layers) if len(alike) == 1 and len(qkv_eps) == 1 else None  # type: ignore[arg-type]


def token_shape(decoder: Decoder, device: Device, tuning: Tuning = DEFAULTS) -> TokenShape | None:
    """None where the kernel cannot stand for the launches: the device is not an sm_90 (older ones
    lack its copies, on later ones it spills registers), an operation is one it has not, weights are
    unquantised, its shared memory does not suffice, or attention takes more warps than it has. Of
    ``tuning`` attention's part counts."""
    layers = layers_of(decoder) if device.arch == 90 else None
    if layers is None:
        return None
    layouts = [[_layouts(decoder, linears) for linears in _products(layer)] for layer in layers]
    flat = [layout for layer in layouts for product in layer for layout in product]
    types = {layout.qtype for layout in flat}
    if types & FLOAT_TYPES:
        return None
    units, largest = _shares(layouts, device.sm_count)
    qkv, at, out, up, down = layers[0]
    shape = CacheShape(at.n_heads, at.n_kv_heads, at.head_dim, qkv.rope.dim, qkv.rope.magnitude)
    attend_warps = launchers.attend_warps(device, shape, tuning)
    if attend_warps > WARPS:
        return None
    attention = launchers.attend_constants(
        device, shape, scale=at.scale, window=at.window, softcap=at.softcap, tuning=tuning
    )
    attend_bytes = -(-launchers.attend_bytes(device, shape, attend_warps) // 16) * 16
    widest = max(qkv.q.k, out.out.k, down.down.k)
    partials = max(
        n * unit * (-(-k // TILE_COLUMNS) | 1)
        for n, unit, k in zip(
            largest, (TILE_ROWS, PADDED_ROWS, 2 * PADDED_ROWS, PADDED_ROWS),
            (qkv.q.k, out.out.k, up.gate.k, down.down.k), strict=True,
        )
    )  # fmt: skip
    product_bytes = padded(widest) // GROUP * 24 + 4 * partials + 16
    table = len(layers) * (sizeof(c.TokenLayer) + 4 * 8) + 16
    rest = table + max(product_bytes, attend_bytes)
    of_tiles = max(_stage_bytes(layout.max_tile_bytes) for layout in flat)
    stage_bytes = max(of_tiles, shape.half_page)
    stages = min(24, (device.shared_limit - rest) // (stage_bytes + 16))
    furthest = max(WARPS, 2 * attend_warps - 2)  # kernels/attend_ring.cuh
    if stages < AHEAD + furthest:
        return None
    constants = attention | {
        "LAYERS": len(layers),
        "D_MODEL": qkv.q.k,
        "D_FF": down.down.k,
        "TYPES": sum(1 << int(qtype) for qtype in types),
        "EPS": float(qkv.norm.eps),
        "ACTIVATION": launchers.ACTIVATIONS[up.activation],
        "WARPS": WARPS,
        "STAGE_BYTES": stage_bytes,
        "STAGES": stages,
        "AHEAD": AHEAD,
        "PARTIALS": partials,
        "GRID": len(units),
        "KEYS_AHEAD": 1,
        "JOINED_AT_ONCE": 8,
    }
    return TokenShape(layers, constants, units, stages * (stage_bytes + 16) + rest)


def _stage_bytes(tile_bytes: int) -> int:
    return tile_bytes * (4 if 4 * tile_bytes <= _LARGEST_STAGE else 2)


def layer_entry(matrices: Sequence[Matrix], gains: Sequence[int], cache: LayerCache) -> bytes:
    """A layer's row of the kernel's table: q, k, v, output, gate, up, down; the gains of the norms
    that read what the output and the down product leave."""
    return bytes(
        c.TokenLayer(
            (c_void_p * 7)(*(m.address for m in matrices)),
            (c_void_p * 7)(*(m.bias for m in matrices)),
            (c_void_p * 2)(*gains), cache.keys, cache.values,
            (c_int * 7)(*(m.layout.qtype for m in matrices)), 0,
        )
    )  # fmt: skip


def token(shape: TokenShape, arguments: c.Token) -> Launch:
    return Launch(
        Specialisation.of("token", shape.constants), (shape.grid, 1, 1), WARPS * 32 + 32,
        shape.shared_bytes, arguments,
    )  # fmt: skip


def _products(layer: Operations) -> list[list[Linear]]:
    qkv, _, out, up, down = layer
    return [[qkv.q, qkv.k, qkv.v], [out.out], [up.gate, up.up], [down.down]]


def _layouts(decoder: Decoder, linears: Iterable[Linear]) -> list[TileLayout]:
    return [TileLayout(decoder.weights[one.weight].qtype, one.n, one.k) for one in linears]


def _unit_bytes(layouts: Sequence[TileLayout]) -> NDArray[np.int64]:
    """Of each unit that a block takes, in order (kernels/cut.cuh)."""
    if len(layouts) == 2:
        both = sum(layout.group_bytes for layout in layouts) * PADDED_ROWS // TILE_ROWS
        return np.full(layouts[0].groups * TILE_ROWS // PADDED_ROWS, both)
    groups = 1 if len(layouts) == 3 else PADDED_ROWS // TILE_ROWS
    return np.concatenate(
        [np.full(one.groups // groups, one.group_bytes * groups) for one in layouts]
    )


def _shares(
    layouts: Sequence[Sequence[Sequence[TileLayout]]], sm_count: int
) -> tuple[NDArray[np.int32], list[int]]:
    """(units of each block, most units of a block in each product): equal bytes, for the number of
    blocks, about one a multiprocessor, with which the slowest of each product ends soonest."""
    products = [[_unit_bytes(product) for product in layer] for layer in layouts]
    found: list[tuple[int, int, NDArray[np.int32]]] = []
    for grid in range(-(-sm_count * 15 // 16), sm_count + 1):
        cost, cuts = 0, np.empty((grid, len(products), 4, 2), np.int32)
        known: dict[tuple[int, ...], tuple[NDArray[np.int64], int]] = {}
        for i, layer in enumerate(products):
            for j, unit_bytes in enumerate(layer):
                key = (j, len(unit_bytes), int(unit_bytes.sum()))
                if key not in known:
                    before = np.concatenate([[0], np.cumsum(unit_bytes)])
                    ideal = before[-1] * np.arange(grid + 1) / grid
                    first = np.searchsorted(before, ideal)
                    known[key] = first, int(np.diff(before[first]).max())
                first, most = known[key]
                cuts[:, i, j] = np.stack([first[:-1], first[1:]], axis=1)
                cost += most
        found.append((cost, grid, cuts))
    units = min(found, key=lambda one: one[:2])[2]
    return units, (units[..., 1] - units[..., 0]).max((0, 1)).tolist()
