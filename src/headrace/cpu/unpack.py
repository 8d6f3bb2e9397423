"""How each quantised block becomes integer weights, scales and shifts, a tile of rows at a time.

Every format is ``weight = scale * (q - offset) + shift`` over groups of 16 or 32, with unsigned
``q``. An unpacker emits the code that reads one interleaved block of a tile (``tiles.py``), given
its address, and yields its groups in order. Offsets are those of ggml's ``ggml-common.h``
(``block_q4_0`` … ``block_q6_K``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headrace.cpu.ir import Tile, Value
from headrace.gguf.types import QuantType


@dataclass(frozen=True)
class Group:
    """``q``: the group's weights, four unsigned bytes a lane; scale and shift: ``f32`` a lane."""

    q: Sequence[Value]
    scale: Value
    shift: Value | None = None


Unpack = Callable[[Tile, Value], Iterator[Group]]

_NIBBLES = 0x0F0F0F0F


def _low(tile: Tile, packed: Sequence[Value]) -> list[Value]:
    return [tile.mask(v, _NIBBLES) for v in packed]


def _high(tile: Tile, packed: Sequence[Value]) -> list[Value]:
    return [tile.mask(tile.shr(v, 4), _NIBBLES) for v in packed]


def _high_in_place(tile: Tile, packed: Sequence[Value]) -> tuple[list[Value], float]:
    """High nibbles and the factor to scale them by: left 16 times too large if that is cheaper."""
    if tile.full_bytes:
        return [tile.mask(v, 0xF0F0F0F0) for v in packed], 1 / 16
    return _high(tile, packed), 1.0


def _fifth_bits(tile: Tile, bits: Value) -> list[Value]:
    """Bit i of ``bits`` to bit 4 of byte i, for 32 bits: eight vectors of four bytes."""
    # x * (2^4 + 2^11 + 2^18 + 2^25) puts bits 0–3 of x at 4, 12, 20 and 28 without carries.
    spread = tile.ints(0x02040810)
    return [
        tile.mask(tile.b.mul(tile.mask(tile.shr(bits, 4 * j), 15), spread), 0x10101010)
        for j in range(8)
    ]


def _move_bits(tile: Tile, v: Value, source: int, target: int, mask: int) -> Value:
    """The bits at ``source`` of every byte moved to ``target``, where ``mask`` keeps them."""
    by = target - source
    return tile.mask(tile.shl(v, by) if by > 0 else tile.shr(v, -by), mask)


def _or(tile: Tile, a: Sequence[Value], c: Sequence[Value]) -> list[Value]:
    return [tile.b.or_(x, y) for x, y in zip(a, c, strict=True)]


def _q4_0(tile: Tile, block: Value) -> Iterator[Group]:
    packed = tile.dwords(block, 2, 4)
    yield Group(_low(tile, packed) + _high(tile, packed), tile.halves(block, 0))


def _q4_1(tile: Tile, block: Value) -> Iterator[Group]:
    head, *packed = tile.dwords(block, 0, 5)
    q = _low(tile, packed) + _high(tile, packed)
    yield Group(q, tile.half(head), tile.half(head, high=True))


def _q5_0(tile: Tile, block: Value) -> Iterator[Group]:
    bits, *packed = tile.dwords(block, 2, 5)
    q = _or(tile, _low(tile, packed) + _high(tile, packed), _fifth_bits(tile, bits))
    yield Group(q, tile.halves(block, 0))


def _q5_1(tile: Tile, block: Value) -> Iterator[Group]:
    head, bits, *packed = tile.dwords(block, 0, 6)
    q = _or(tile, _low(tile, packed) + _high(tile, packed), _fifth_bits(tile, bits))
    yield Group(q, tile.half(head), tile.half(head, high=True))


def _q8_0(tile: Tile, block: Value) -> Iterator[Group]:
    signed = tile.dwords(block, 2, 8)
    q = [tile.b.xor(v, tile.ints(0x80808080)) for v in signed]
    yield Group(q, tile.halves(block, 0))


def _q2_k(tile: Tile, block: Value) -> Iterator[Group]:
    head, scales = tile.dword(block, 80), tile.dwords(block, 0, 4)
    d, d_min = tile.half(head), tile.half(head, high=True)
    for g in range(16):
        packed = tile.dwords(block, 16 + 32 * (g // 8) + 16 * (g % 2), 4)
        nibbles = tile.shr(scales[g // 4], 8 * (g % 4))
        yield Group(
            [tile.mask(tile.shr(v, g & 6), 0x03030303) for v in packed],
            tile.b.fmul(d, tile.to_float(tile.mask(nibbles, 15))),
            tile.b.fneg(tile.b.fmul(d_min, tile.to_float(tile.mask(tile.shr(nibbles, 4), 15)))),
        )


def _q3_k(tile: Tile, block: Value) -> Iterator[Group]:
    b = tile.b
    d = tile.halves(block, 108)
    s0, s1, s2 = tile.dwords(block, 96, 3)
    two = 0x03030303
    scales = [
        b.or_(
            tile.mask(tile.shr(low, shift), _NIBBLES),
            tile.shl(tile.mask(tile.shr(s2, 2 * i), two), 4),
        )
        for i, (low, shift) in enumerate(((s0, 0), (s1, 0), (s0, 4), (s1, 4)))
    ]
    for g in range(16):
        packed = tile.dwords(block, 32 + 32 * (g // 8) + 16 * (g % 2), 4)
        third = tile.dwords(block, 16 * (g % 2), 4)
        low = [tile.mask(tile.shr(v, g & 6), two) for v in packed]
        bit = [_move_bits(tile, v, g // 2, 2, 0x04040404) for v in third]
        six = tile.mask(tile.shr(scales[g // 4], 8 * (g % 4)), 63)
        scale = b.fmul(d, tile.to_float(b.sub(six, tile.ints(32))))
        yield Group(_or(tile, low, bit), scale)


def _six_bit_scales(
    tile: Tile, head: Sequence[Value], odd_factor: float = 1.0
) -> Iterator[tuple[Value, Value]]:
    """The eight (scale, shift) pairs of a Q4_K or Q5_K block from its first 16 bytes.

    The scales of odd groups are multiplied by ``odd_factor``.
    """
    b = tile.b
    d, d_min = tile.half(head[0]), tile.half(head[0], high=True)
    d_odd = b.fmul(d, tile.floats(odd_factor))
    u0, u1, u2 = head[1:]
    six = 0x3F3F3F3F
    top = 0x30303030
    scales = (
        tile.mask(u0, six),
        b.or_(tile.mask(u2, _NIBBLES), tile.mask(tile.shr(u0, 2), top)),
    )
    mins = (
        tile.mask(u1, six),
        b.or_(tile.mask(tile.shr(u2, 4), _NIBBLES), tile.mask(tile.shr(u1, 2), top)),
    )
    for g in range(8):
        scale, minimum = (
            tile.to_float(tile.mask(tile.shr(v[g // 4], 8 * (g % 4)), 0xFF)) for v in (scales, mins)
        )
        yield b.fmul(d_odd if g % 2 else d, scale), b.fneg(b.fmul(d_min, minimum))


def _q4_k(tile: Tile, block: Value) -> Iterator[Group]:
    _, factor = _high_in_place(tile, [])
    scales = _six_bit_scales(tile, tile.dwords(block, 0, 4), factor)
    for chunk in range(4):
        packed = tile.dwords(block, 16 + 32 * chunk, 8)
        yield Group(_low(tile, packed), *next(scales))
        yield Group(_high_in_place(tile, packed)[0], *next(scales))


def _q5_k(tile: Tile, block: Value) -> Iterator[Group]:
    scales = _six_bit_scales(tile, tile.dwords(block, 0, 4))
    for chunk in range(4):
        packed = tile.dwords(block, 48 + 32 * chunk, 8)
        bits = tile.dwords(block, 16, 8)
        for g, nibbles in ((2 * chunk, _low), (2 * chunk + 1, _high)):
            fifth = [_move_bits(tile, v, g, 4, 0x10101010) for v in bits]
            yield Group(_or(tile, nibbles(tile, packed), fifth), *next(scales))


def _q6_k(tile: Tile, block: Value) -> Iterator[Group]:
    d, scales = tile.halves(block, 208), tile.dwords(block, 192, 4)
    for g in range(16):
        half, quarter, part = g // 8, g % 8 // 2, g % 2
        packed = tile.dwords(block, 64 * half + 32 * (quarter % 2) + 16 * part, 4)
        top = tile.dwords(block, 128 + 32 * half + 16 * part, 4)
        nibbles = (_low if quarter < 2 else _high)(tile, packed)
        pairs = [_move_bits(tile, v, 2 * quarter, 4, 0x30303030) for v in top]
        scale = tile.b.fmul(d, tile.to_float(tile.signed_byte(scales[g // 4], g % 4)))
        yield Group(_or(tile, nibbles, pairs), scale)


@dataclass(frozen=True)
class Unpacker:
    """``offset`` is subtracted from each ``q``; ``largest`` is the largest ``q`` (< 256)."""

    unpack: Unpack
    group: int
    offset: int
    largest: int
    has_shift: bool


UNPACKERS: dict[QuantType, Unpacker] = {
    QuantType.Q4_0: Unpacker(_q4_0, 32, 8, 15, False),
    QuantType.Q4_1: Unpacker(_q4_1, 32, 0, 15, True),
    QuantType.Q5_0: Unpacker(_q5_0, 32, 16, 31, False),
    QuantType.Q5_1: Unpacker(_q5_1, 32, 0, 31, True),
    QuantType.Q8_0: Unpacker(_q8_0, 32, 128, 255, False),
    QuantType.Q2_K: Unpacker(_q2_k, 16, 0, 3, True),
    QuantType.Q3_K: Unpacker(_q3_k, 16, 4, 7, False),
    QuantType.Q4_K: Unpacker(_q4_k, 32, 0, 15, True),
    QuantType.Q5_K: Unpacker(_q5_k, 32, 0, 31, True),
    QuantType.Q6_K: Unpacker(_q6_k, 16, 32, 63, False),
}
