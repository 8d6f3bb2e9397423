// The thirteen GGML block types, as tiles.
//
// A tile is 4 rows × up to 1,024 columns of one matrix, contiguous in memory. Inside it the bytes of
// the file's blocks are only regrouped, field by field ("planes": all quants, then all scales, …), so
// that 32 lanes read 16-byte words side by side. layout.py holds the same table; reorder.cu makes
// tiles. Layouts and formulas: ggml's ggml-common.h and ggml-quants.c.
//
// A lane's share of a tile row is two groups, a and b, of 16 consecutive columns. For the quantised
// types a weight is scale × q + offset with q an int8, so that a dot with activations d × x is
//     scale × d × Σ q x  +  offset × d × Σ x.
#pragma once
#include "primitives.cuh"

enum Type { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30, NONE = -1 };

constexpr int TILE_ROWS = 4, TILE_COLUMNS = 1024;

struct Share {
  int a[4], b[4];     // 16 int8 each
  float2 wa, wb;      // (scale, offset) of group a and of group b
};

// Planes of these bytes a block. Folds, not loops over a table: with a run-time number of blocks a table
// would lie in local memory, read for every block.
template <int... SIZES> struct Planes {
  // Bytes before plane P in a tile of `blocks` blocks a row.
  template <int P> static DEVICE constexpr int offset(int blocks) {
    int total = 0, plane = 0;
    ((total += plane++ < P ? (TILE_ROWS * blocks * SIZES + 15) / 16 * 16 : 0), ...);
    return total;
  }
  static DEVICE constexpr int bytes(int blocks) { return offset<sizeof...(SIZES)>(blocks); }
  template <int P> static DEVICE constexpr int size() {
    int found = 0, plane = 0;
    ((found = plane++ == P ? SIZES : found), ...);
    return found;
  }
  // The field of block `i` (row × blocks + column block) in plane P.
  template <int P> static DEVICE const u8* field(const u8* tile, int blocks, int i) {
    return tile + offset<P>(blocks) + i * size<P>();
  }
};

DEVICE u32 load32(const u8* p) { return *(const u32*)p; }
DEVICE float half_at(const u8* p) { return half_to_float(*(const u16*)p); }

DEVICE void low_nibbles(int (&out)[4], const uint4& q) {
  out[0] = q.x & 0x0f0f0f0f; out[1] = q.y & 0x0f0f0f0f; out[2] = q.z & 0x0f0f0f0f; out[3] = q.w & 0x0f0f0f0f;
}
DEVICE void high_nibbles(int (&out)[4], const uint4& q) {
  low_nibbles(out, make_uint4(q.x >> 4, q.y >> 4, q.z >> 4, q.w >> 4));
}
// ORs bits [shift, shift + width) of every byte of h into out at bit `to`.
template <int WIDTH> DEVICE void or_bits(int (&out)[4], const uint4& h, int shift, int to) {
  constexpr u32 mask = ((1u << WIDTH) - 1) * 0x01010101u;
  out[0] |= ((h.x >> shift) & mask) << to; out[1] |= ((h.y >> shift) & mask) << to;
  out[2] |= ((h.z >> shift) & mask) << to; out[3] |= ((h.w >> shift) & mask) << to;
}
// ORs bit i of `bits` into byte i of out at bit 4, for 16 values.
DEVICE void or_fifth_bits(int (&out)[4], u32 bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] |= ((((bits >> (4 * i)) & 15u) * 0x00204081u) & 0x01010101u) << 4;
}

// Where a lane's groups lie in a 1,024-column slice, in groups of 16 columns.
struct Blocks32 {  // 32-value blocks: a lane owns one
  static constexpr int SIZE = 32;
  static DEVICE int block(int lane) { return lane; }
  static DEVICE int group_a(int lane) { return 2 * lane; }
  static DEVICE int group_b(int lane) { return 2 * lane + 1; }
};
struct Blocks256 {  // 256-value blocks: eight lanes share one; b lies 32 columns after a
  static constexpr int SIZE = 256;
  static DEVICE int block(int lane) { return lane >> 3; }
  static DEVICE int group_a(int lane) { return (lane >> 3) * 16 + 4 * ((lane & 7) >> 1) + (lane & 1); }
  static DEVICE int group_b(int lane) { return group_a(lane) + 2; }
};

template <int TYPE> struct Block;

template <> struct Block<Q4_0> : Blocks32, Planes<16, 2> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int) {
    const uint4 q = *(const uint4*)field<0>(tile, blocks, i);
    const float d = half_at(field<1>(tile, blocks, i));
    low_nibbles(s.a, q);
    high_nibbles(s.b, q);
    s.wa = s.wb = make_float2(d, -8.f * d);
  }
};
template <> struct Block<Q4_1> : Blocks32, Planes<16, 4> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int) {
    const uint4 q = *(const uint4*)field<0>(tile, blocks, i);
    const u32 dm = load32(field<1>(tile, blocks, i));
    low_nibbles(s.a, q);
    high_nibbles(s.b, q);
    s.wa = s.wb = make_float2(half_to_float((u16)dm), half_to_float((u16)(dm >> 16)));
  }
};
template <> struct Block<Q5_0> : Blocks32, Planes<16, 4, 2> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int) {
    const uint4 q = *(const uint4*)field<0>(tile, blocks, i);
    const u32 fifth = load32(field<1>(tile, blocks, i));
    const float d = half_at(field<2>(tile, blocks, i));
    low_nibbles(s.a, q);
    high_nibbles(s.b, q);
    or_fifth_bits(s.a, fifth);
    or_fifth_bits(s.b, fifth >> 16);
    s.wa = s.wb = make_float2(d, -16.f * d);
  }
};
template <> struct Block<Q5_1> : Blocks32, Planes<16, 4, 4> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int) {
    const uint4 q = *(const uint4*)field<0>(tile, blocks, i);
    const u32 fifth = load32(field<1>(tile, blocks, i)), dm = load32(field<2>(tile, blocks, i));
    low_nibbles(s.a, q);
    high_nibbles(s.b, q);
    or_fifth_bits(s.a, fifth);
    or_fifth_bits(s.b, fifth >> 16);
    s.wa = s.wb = make_float2(half_to_float((u16)dm), half_to_float((u16)(dm >> 16)));
  }
};
template <> struct Block<Q8_0> : Blocks32, Planes<16, 16, 2> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int) {
    const int4 a = *(const int4*)field<0>(tile, blocks, i), b = *(const int4*)field<1>(tile, blocks, i);
    s.a[0] = a.x; s.a[1] = a.y; s.a[2] = a.z; s.a[3] = a.w;
    s.b[0] = b.x; s.b[1] = b.y; s.b[2] = b.z; s.b[3] = b.w;
    s.wa = s.wb = make_float2(half_at(field<2>(tile, blocks, i)), 0.f);
  }
};
// The 2 bits of a (and b, 2 bits higher) of every byte: Q2_K and Q3_K hold four columns 32 apart in one.
DEVICE void two_bits(Share& s, const u8* quants, int part) {
  const uint4 q = *(const uint4*)(quants + 32 * (part >> 2) + 16 * (part & 1));
  const int shift = 4 * ((part >> 1) & 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) s.a[i] = s.b[i] = 0;
  or_bits<2>(s.a, q, shift, 0);
  or_bits<2>(s.b, q, shift + 2, 0);
}
template <> struct Block<Q2_K> : Blocks256, Planes<16, 64, 4> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int part) {
    const u8* scales = field<0>(tile, blocks, i) + 4 * (part >> 1) + (part & 1);
    const u32 dm = load32(field<2>(tile, blocks, i)), sa = scales[0], sb = scales[2];
    const float d = half_to_float((u16)dm), m = -half_to_float((u16)(dm >> 16));
    two_bits(s, field<1>(tile, blocks, i), part);
    s.wa = make_float2(d * (float)(sa & 15), m * (float)(sa >> 4));
    s.wb = make_float2(d * (float)(sb & 15), m * (float)(sb >> 4));
  }
};
template <> struct Block<Q3_K> : Blocks256, Planes<32, 64, 12, 2> {
  // Scale g of 16: low four bits in byte g % 8, high two in byte 8 + g % 4.
  static DEVICE float scale(const u8* scales, int g) {
    const int low = (scales[g & 7] >> (g & 8 ? 4 : 0)) & 15, high = (scales[8 + (g & 3)] >> (2 * (g >> 2))) & 3;
    return (float)((low | high << 4) - 32);
  }
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int part) {
    const uint4 high = *(const uint4*)(field<0>(tile, blocks, i) + 16 * (part & 1));
    const u8* scales = field<2>(tile, blocks, i);
    const float d = half_at(field<3>(tile, blocks, i));
    const int g = 4 * (part >> 1) + (part & 1);
    two_bits(s, field<1>(tile, blocks, i), part);
    or_bits<1>(s.a, high, 2 * (part >> 1), 2);
    or_bits<1>(s.b, high, 2 * (part >> 1) + 1, 2);
    const float sa = d * scale(scales, g), sb = d * scale(scales, g + 2);
    s.wa = make_float2(sa, -4.f * sa);
    s.wb = make_float2(sb, -4.f * sb);
  }
};
// Sub-blocks 2j and 2j+1 of Q4_K and Q5_K: six-bit scales and mins packed in twelve bytes.
DEVICE void six_bit_scales(Share& s, const uint4& header, int j) {
  const float d = half_to_float((u16)header.x), m = -half_to_float((u16)(header.x >> 16));
  const int shift = (j & 1) * 16;
  const u32 x = header.y >> shift, y = header.z >> shift, z = header.w >> shift;
  const u32 scales = j < 2 ? x & 0x3f3f : (z & 0x0f0f) | ((x >> 2) & 0x3030);
  const u32 mins = j < 2 ? y & 0x3f3f : ((z >> 4) & 0x0f0f) | ((y >> 2) & 0x3030);
  s.wa = make_float2(d * (float)(scales & 255), m * (float)(mins & 255));
  s.wb = make_float2(d * (float)(scales >> 8), m * (float)(mins >> 8));
}
template <> struct Block<Q4_K> : Blocks256, Planes<16, 128> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int part) {
    const uint4 header = *(const uint4*)field<0>(tile, blocks, i);
    const uint4 q = *(const uint4*)(field<1>(tile, blocks, i) + 16 * part);
    low_nibbles(s.a, q);
    high_nibbles(s.b, q);
    six_bit_scales(s, header, part >> 1);
  }
};
template <> struct Block<Q5_K> : Blocks256, Planes<16, 32, 128> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int part) {
    const uint4 header = *(const uint4*)field<0>(tile, blocks, i);
    const uint4 fifth = *(const uint4*)(field<1>(tile, blocks, i) + 16 * (part & 1));
    const uint4 q = *(const uint4*)(field<2>(tile, blocks, i) + 16 * part);
    low_nibbles(s.a, q);
    high_nibbles(s.b, q);
    or_bits<1>(s.a, fifth, part & 6, 4);
    or_bits<1>(s.b, fifth, (part & 6) + 1, 4);
    six_bit_scales(s, header, part >> 1);
  }
};
template <> struct Block<Q6_K> : Planes<128, 64, 16, 2> {
  static constexpr int SIZE = 256;
  static DEVICE int block(int lane) { return lane >> 3; }
  static DEVICE int group_a(int lane) { return (lane >> 3) * 16 + 8 * ((lane & 7) >> 2) + (lane & 3); }
  static DEVICE int group_b(int lane) { return group_a(lane) + 4; }
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int i, int part) {
    const uint4 low = *(const uint4*)(field<0>(tile, blocks, i) + 16 * part);
    const uint4 high = *(const uint4*)(field<1>(tile, blocks, i) + 32 * (part >> 2) + 16 * (part & 1));
    const u8* scales = field<2>(tile, blocks, i) + 8 * (part >> 2) + (part & 3);
    const float d = half_at(field<3>(tile, blocks, i));
    low_nibbles(s.a, low);
    high_nibbles(s.b, low);
    or_bits<2>(s.a, high, part & 2, 4);
    or_bits<2>(s.b, high, (part & 2) + 4, 4);
    const float sa = d * (float)(signed char)scales[0], sb = d * (float)(signed char)scales[4];
    s.wa = make_float2(sa, -32.f * sa);
    s.wb = make_float2(sb, -32.f * sb);
  }
};

// Unquantised weights: a "block" is 32 values, its planes 16 bytes each.
DEVICE void halves(float* out, const uint4& q) {
  const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = half_to_float((u16)(words[i >> 1] >> (16 * (i & 1))));
}
DEVICE void brain_halves(float* out, const uint4& q) {
  const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = bits_to_float(i & 1 ? words[i >> 1] & 0xffff0000u : words[i >> 1] << 16);
}
struct FloatBlock16 : Blocks32, Planes<16, 16, 16, 16> {};
template <> struct Block<F16> : FloatBlock16 {
  static DEVICE void values(float (&v)[32], const u8* tile, int blocks, int i) {
    halves(v, *(const uint4*)field<0>(tile, blocks, i));
    halves(v + 8, *(const uint4*)field<1>(tile, blocks, i));
    halves(v + 16, *(const uint4*)field<2>(tile, blocks, i));
    halves(v + 24, *(const uint4*)field<3>(tile, blocks, i));
  }
};
template <> struct Block<BF16> : FloatBlock16 {
  static DEVICE void values(float (&v)[32], const u8* tile, int blocks, int i) {
    brain_halves(v, *(const uint4*)field<0>(tile, blocks, i));
    brain_halves(v + 8, *(const uint4*)field<1>(tile, blocks, i));
    brain_halves(v + 16, *(const uint4*)field<2>(tile, blocks, i));
    brain_halves(v + 24, *(const uint4*)field<3>(tile, blocks, i));
  }
};
template <> struct Block<F32> : Blocks32, Planes<16, 16, 16, 16, 16, 16, 16, 16> {
  static DEVICE void values(float (&v)[32], const u8* tile, int blocks, int i) {
#pragma unroll
    for (int p = 0; p < 8; ++p) {  // planes of equal size lie evenly apart
      const float4 w = *(const float4*)(field<0>(tile, blocks, i) + p * (TILE_ROWS * blocks * 16));
      v[4 * p] = w.x; v[4 * p + 1] = w.y; v[4 * p + 2] = w.z; v[4 * p + 3] = w.w;
    }
  }
};

DEVICE constexpr bool is_float_type(int type) { return type == F32 || type == F16 || type == BF16; }

// A lane's 32 weights as floats: group a, then group b.
template <int TYPE> DEVICE void lane_values(float (&v)[32], const u8* tile, int blocks, int row, int lane) {
  using B = Block<TYPE>;
  const int i = row * blocks + B::block(lane);
  if constexpr (is_float_type(TYPE)) {
    B::values(v, tile, blocks, i);
  } else {
    Share s;
    B::unpack(s, tile, blocks, i, lane & 7);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      v[j] = fmaf(s.wa.x, (float)(signed char)(s.a[j >> 2] >> (8 * (j & 3))), s.wa.y);
      v[16 + j] = fmaf(s.wb.x, (float)(signed char)(s.b[j >> 2] >> (8 * (j & 3))), s.wb.y);
    }
  }
}

// Sizes of a matrix in tiles.
template <int TYPE, int COLUMNS> struct Tiles {
  using B = Block<TYPE>;
  static constexpr int FULL = COLUMNS / TILE_COLUMNS, SLICES = (COLUMNS + TILE_COLUMNS - 1) / TILE_COLUMNS;
  static constexpr int FULL_BLOCKS = TILE_COLUMNS / B::SIZE, TAIL_BLOCKS = COLUMNS % TILE_COLUMNS / B::SIZE;
  static constexpr int FULL_BYTES = B::bytes(FULL_BLOCKS), TAIL_BYTES = B::bytes(TAIL_BLOCKS);
  static constexpr int GROUP_BYTES = FULL * FULL_BYTES + TAIL_BYTES;  // four rows
  static constexpr int MAX_BYTES = FULL ? FULL_BYTES : TAIL_BYTES;
  // Constants where there is no partial slice.
  static DEVICE int blocks(int slice) { return TAIL_BLOCKS == 0 || slice < FULL ? FULL_BLOCKS : TAIL_BLOCKS; }
  static DEVICE u32 bytes(int slice) { return TAIL_BLOCKS == 0 || slice < FULL ? FULL_BYTES : TAIL_BYTES; }
  // Of tiles `first` to `last`, counted through the slices of each group.
  static DEVICE u32 span(int first, int last) {
    if (TAIL_BLOCKS == 0) return (last - first) * FULL_BYTES;
    return (last / SLICES - first / SLICES) * GROUP_BYTES + (last % SLICES - first % SLICES) * FULL_BYTES;
  }
  static DEVICE u64 offset(int group, int slice) { return (u64)group * GROUP_BYTES + (u32)slice * FULL_BYTES; }
};
