"""How each quantised block becomes integer weights, scales and shifts, a tile of rows at a time.

Every format is ``weight = scale * (q - offset) + shift`` over groups of 16 or 32, with unsigned
``q``. An unpacker emits the code that loads one block of each row of a tile and yields its groups
in order. Layouts: ggml's ``ggml-common.h`` (``block_q4_0`` … ``block_q6_K``).
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


Rows = Sequence[Value]
Unpack = Callable[[Tile, Rows], Iterator[Group]]

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


def _q4_0(tile: Tile, rows: Rows) -> Iterator[Group]:
    scale = tile.half(tile.dwords(rows, 0)[0])
    packed = tile.dwords(rows, 2)
    yield Group(_low(tile, packed) + _high(tile, packed), scale)


def _q4_1(tile: Tile, rows: Rows) -> Iterator[Group]:
    head = tile.dwords(rows, 0)[0]
    packed = tile.dwords(rows, 4)
    q = _low(tile, packed) + _high(tile, packed)
    yield Group(q, tile.half(head), tile.half(head, high=True))


def _q5_0(tile: Tile, rows: Rows) -> Iterator[Group]:
    first, second, *_ = tile.dwords(rows, 0)
    fifth = _fifth_bits(tile, tile.b.or_(tile.shr(first, 16), tile.shl(second, 16)))
    packed = tile.dwords(rows, 6)
    q = _or(tile, _low(tile, packed) + _high(tile, packed), fifth)
    yield Group(q, tile.half(first))


def _q5_1(tile: Tile, rows: Rows) -> Iterator[Group]:
    head, bits, *_ = tile.dwords(rows, 0)
    packed = tile.dwords(rows, 8)
    q = _or(tile, _low(tile, packed) + _high(tile, packed), _fifth_bits(tile, bits))
    yield Group(q, tile.half(head), tile.half(head, high=True))


def _q8_0(tile: Tile, rows: Rows) -> Iterator[Group]:
    scale = tile.half(tile.dwords(rows, 0)[0])
    signed = tile.dwords8(rows, 2)
    yield Group([tile.b.xor(v, tile.ints(0x80808080)) for v in signed], scale)


def _q2_k(tile: Tile, rows: Rows) -> Iterator[Group]:
    head = tile.dwords(rows, 68)[3]
    d, d_min = tile.half(head), tile.half(head, high=True)
    scales = tile.dwords(rows, 0)
    for half in range(2):
        packed = tile.dwords8(rows, 16 + 32 * half)
        for j in range(8):
            g = 8 * half + j
            nibbles = tile.shr(scales[g // 4], 8 * (g % 4))
            sixteen = packed[4 * (j % 2) : 4 * (j % 2) + 4]
            yield Group(
                [tile.mask(tile.shr(v, j & 6), 0x03030303) for v in sixteen],
                tile.b.fmul(d, tile.to_float(tile.mask(nibbles, 15))),
                tile.b.fneg(tile.b.fmul(d_min, tile.to_float(tile.mask(tile.shr(nibbles, 4), 15)))),
            )


def _q3_k(tile: Tile, rows: Rows) -> Iterator[Group]:
    b = tile.b
    d = tile.half(tile.dwords(rows, 94)[3], high=True)
    _, s0, s1, s2 = tile.dwords(rows, 92)
    two = 0x03030303
    scales = [
        b.or_(
            tile.mask(tile.shr(low, shift), _NIBBLES),
            tile.shl(tile.mask(tile.shr(s2, 2 * i), two), 4),
        )
        for i, (low, shift) in enumerate(((s0, 0), (s1, 0), (s0, 4), (s1, 4)))
    ]
    third = tile.dwords8(rows, 0)
    for half in range(2):
        packed = tile.dwords8(rows, 32 + 32 * half)
        for j in range(8):
            g = 8 * half + j
            part = slice(4 * (j % 2), 4 * (j % 2) + 4)
            low = [tile.mask(tile.shr(v, j & 6), two) for v in packed[part]]
            bit = [_move_bits(tile, v, g // 2, 2, 0x04040404) for v in third[part]]
            six = tile.mask(tile.shr(scales[g // 4], 8 * (g % 4)), 63)
            yield Group(
                _or(tile, low, bit),
                b.fmul(d, tile.to_float(b.sub(six, tile.ints(32)))),
            )


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


def _q4_k(tile: Tile, rows: Rows) -> Iterator[Group]:
    _, factor = _high_in_place(tile, [])
    scales = _six_bit_scales(tile, tile.dwords(rows, 0), factor)
    for chunk in range(4):
        packed = tile.dwords8(rows, 16 + 32 * chunk)
        yield Group(_low(tile, packed), *next(scales))
        yield Group(_high_in_place(tile, packed)[0], *next(scales))


def _q5_k(tile: Tile, rows: Rows) -> Iterator[Group]:
    scales = _six_bit_scales(tile, tile.dwords(rows, 0))
    bits = tile.dwords8(rows, 16)
    for chunk in range(4):
        packed = tile.dwords8(rows, 48 + 32 * chunk)
        for g, nibbles in ((2 * chunk, _low), (2 * chunk + 1, _high)):
            fifth = [_move_bits(tile, v, g, 4, 0x10101010) for v in bits]
            yield Group(_or(tile, nibbles(tile, packed), fifth), *next(scales))


_Q6_K_ORDER = (0, 32, 64, 96, 16, 48, 80, 112)
"""Where the groups of ``_q6_k`` start, of each 128: those that share bytes come together."""


def _q6_k(tile: Tile, rows: Rows) -> Iterator[Group]:
    d = tile.half(tile.dwords(rows, 194)[3], high=True)
    scales = tile.dwords(rows, 192)
    for half in range(2):
        for part in range(2):
            # 16 bytes at a time: holding more at once stalled on memory (docs/decisions).
            low = [tile.dwords(rows, 64 * half + 32 * i + 16 * part) for i in range(2)]
            top = tile.dwords(rows, 128 + 32 * half + 16 * part)
            for quarter in range(4):
                g = 8 * half + 2 * quarter + part
                nibbles = (_low if quarter < 2 else _high)(tile, low[quarter % 2])
                pairs = [_move_bits(tile, v, 2 * quarter, 4, 0x30303030) for v in top]
                yield Group(
                    _or(tile, nibbles, pairs),
                    tile.b.fmul(d, tile.to_float(tile.signed_byte(scales[g // 4], g % 4))),
                )


@dataclass(frozen=True)
class Unpacker:
    """``offset`` is subtracted from each ``q``; ``largest`` is the largest ``q`` (< 256).

    Groups come in the order of ``order``, the start of each within a repeating run of them.
    """

    unpack: Unpack
    group: int
    offset: int
    largest: int
    has_shift: bool
    order: tuple[int, ...] = (0,)

    def start(self, index: int) -> int:
        """Where the group that comes ``index``-th starts."""
        run, place = divmod(index, len(self.order))
        return run * len(self.order) * self.group + self.order[place]


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
    QuantType.Q6_K: Unpacker(_q6_k, 16, 32, 63, False, _Q6_K_ORDER),
}
