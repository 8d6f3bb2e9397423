// The thirteen GGML block types, as tiles.
//
// A tile is 4 rows × up to 1,024 columns of one matrix, contiguous in memory. Inside it the bytes of
// the file's blocks are only regrouped, field by field ("planes": all quants, then all scales, …), so
// that 32 lanes read 16-byte words side by side. layout.py holds the same table; reorder.cu makes
// tiles. Layouts and formulas: ggml's ggml-common.h and ggml-quants.c.
//
// Lanes 0–15 have rows 0 and 1 of a tile, lanes 16–31 rows 2 and 3. A lane's share of a row is four groups of 16
// consecutive columns; which ones, is the type's choice. For the quantised types a weight is scale × q + offset with q an
// integer, so that a dot with activations d × x is
//     scale × d × Σ q x  +  offset × d × Σ x.
#pragma once
#include "primitives.cuh"

enum Type { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30, NONE = -1 };

constexpr int TILE_ROWS = 4, TILE_COLUMNS = 1024, LANE_ROWS = 2;

struct Share {
  u32 q[4][4];  // 16 bytes of each group: q, or 16 q where SIXTEENFOLD says so
  float2 w[4];  // (scale, offset), of group i at weight(i)
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

// Every word of q, shifted down, with a mask for its bytes.
DEVICE void bits_of(u32 (&out)[4], const uint4& q, int shift, u32 mask) {
  out[0] = q.x >> shift & mask; out[1] = q.y >> shift & mask; out[2] = q.z >> shift & mask; out[3] = q.w >> shift & mask;
}
constexpr u32 LOW = 0x0f0f0f0fu, HIGH = 0xf0f0f0f0u, TWO_BITS = 0x03030303u, BIT = 0x01010101u;
// ORs those bits of every byte of h into out, at bit `to`.
DEVICE void or_bits(u32 (&out)[4], const uint4& h, int shift, u32 mask, int to) {
  out[0] |= (h.x >> shift & mask) << to; out[1] |= (h.y >> shift & mask) << to;
  out[2] |= (h.z >> shift & mask) << to; out[3] |= (h.w >> shift & mask) << to;
}
// ORs bit i of `bits` into byte i of out at bit 4, for 16 values.
DEVICE void or_fifth_bits(u32 (&out)[4], u32 bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] |= ((((bits >> (4 * i)) & 15u) * 0x00204081u) & BIT) << 4;
}

// Where the groups of lane l of sixteen lie in a 1,024-column slice, in groups of 16 columns. Of two pieces of memory that a
// lane reads in turn, every other four lanes read the second first: then eight lanes meet no bank twice.
DEVICE int swapped(int l) { return l >> 2 & 1; }

struct Blocks32 {  // 32-value blocks: a lane has two
  static constexpr int SIZE = 32, WEIGHTS = 2;
  static constexpr u32 SIXTEENFOLD = 0;  // bit i: group i
  static constexpr bool SIGNED = false;
  static DEVICE constexpr int weight(int i) { return i >> 1; }
  static DEVICE int block(int l, int k) { return 2 * l + (k ^ swapped(l)); }  // of groups 2k and 2k + 1
  static DEVICE int group(int l, int i) { return 2 * block(l, i >> 1) + (i & 1); }
  static DEVICE int existing(int l, int k, int blocks) { return min(block(l, k), blocks - 1); }  // of an odd number the last lane has one
  static DEVICE bool active(int l, int blocks) { return 2 * l < blocks; }
};
struct Blocks256 {  // 256-value blocks: four lanes share one, each has a part
  static constexpr int SIZE = 256, WEIGHTS = 4;
  static constexpr u32 SIXTEENFOLD = 0;
  static constexpr bool SIGNED = false;
  static DEVICE constexpr int weight(int i) { return i; }
  static DEVICE int block(int l, int) { return l >> 2; }
  static DEVICE bool active(int l, int blocks) { return l >> 2 < blocks; }
  // Groups 32 columns apart: part p has bytes 16 (p % 2) … + 15 of each 32 of half p / 2 of the block.
  static DEVICE int group(int l, int i) { return (l >> 2) * 16 + (l & 2) * 4 + (l & 1) + 2 * i; }
};

template <int TYPE> struct Block;  // unpack(): the share of lane l of sixteen in row `row` of a tile of so many blocks a row

template <> struct Block<Q4_0> : Blocks32, Planes<16, 2> {
  static constexpr u32 SIXTEENFOLD = 0b1010;
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = row * blocks + existing(l, k, blocks);
      const uint4 q = *(const uint4*)field<0>(tile, blocks, i);
      const float d = half_at(field<1>(tile, blocks, i));
      bits_of(s.q[2 * k], q, 0, LOW);
      bits_of(s.q[2 * k + 1], q, 0, HIGH);
      s.w[k] = make_float2(d, -8.f * d);
    }
  }
};
template <> struct Block<Q4_1> : Blocks32, Planes<16, 4> {
  static constexpr u32 SIXTEENFOLD = 0b1010;
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = row * blocks + existing(l, k, blocks);
      const uint4 q = *(const uint4*)field<0>(tile, blocks, i);
      const u32 dm = load32(field<1>(tile, blocks, i));
      bits_of(s.q[2 * k], q, 0, LOW);
      bits_of(s.q[2 * k + 1], q, 0, HIGH);
      s.w[k] = make_float2(half_to_float((u16)dm), half_to_float((u16)(dm >> 16)));
    }
  }
};
// Sixteen low nibbles and sixteen high ones, and a fifth bit for each.
DEVICE void five_bits(u32 (&low)[4], u32 (&high)[4], const uint4& q, u32 fifth) {
  bits_of(low, q, 0, LOW);
  bits_of(high, q, 4, LOW);
  or_fifth_bits(low, fifth);
  or_fifth_bits(high, fifth >> 16);
}
template <> struct Block<Q5_0> : Blocks32, Planes<16, 4, 2> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = row * blocks + existing(l, k, blocks);
      const float d = half_at(field<2>(tile, blocks, i));
      five_bits(s.q[2 * k], s.q[2 * k + 1], *(const uint4*)field<0>(tile, blocks, i), load32(field<1>(tile, blocks, i)));
      s.w[k] = make_float2(d, -16.f * d);
    }
  }
};
template <> struct Block<Q5_1> : Blocks32, Planes<16, 4, 4> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = row * blocks + existing(l, k, blocks);
      const u32 dm = load32(field<2>(tile, blocks, i));
      five_bits(s.q[2 * k], s.q[2 * k + 1], *(const uint4*)field<0>(tile, blocks, i), load32(field<1>(tile, blocks, i)));
      s.w[k] = make_float2(half_to_float((u16)dm), half_to_float((u16)(dm >> 16)));
    }
  }
};
template <> struct Block<Q8_0> : Blocks32, Planes<16, 16, 2> {
  static constexpr bool SIGNED = true;
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = row * blocks + existing(l, k, blocks);
      bits_of(s.q[2 * k], *(const uint4*)field<0>(tile, blocks, i), 0, ~0u);
      bits_of(s.q[2 * k + 1], *(const uint4*)field<1>(tile, blocks, i), 0, ~0u);
      s.w[k] = make_float2(half_at(field<2>(tile, blocks, i)), 0.f);
    }
  }
};
template <> struct Block<Q2_K> : Blocks256, Planes<16, 64, 4> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
    const int at = row * blocks + block(l, 0), half = l >> 1 & 1;
    const uint4 q = *(const uint4*)(field<1>(tile, blocks, at) + 32 * half + 16 * (l & 1));
    const uint2 scales = *(const uint2*)(field<0>(tile, blocks, at) + 8 * half);
    const u32 dm = load32(field<2>(tile, blocks, at));
    const float d = half_to_float((u16)dm), m = -half_to_float((u16)(dm >> 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 scale = (i < 2 ? scales.x : scales.y) >> (8 * (l & 1) + 16 * (i & 1));
      bits_of(s.q[i], q, 2 * i, TWO_BITS);
      s.w[i] = make_float2(d * (float)(scale & 15), m * (float)(scale >> 4 & 15));
    }
  }
};
template <> struct Block<Q3_K> : Blocks256, Planes<32, 64, 12, 2> {
  // Scale g of 16: low four bits in byte g % 8, high two in byte 8 + g % 4.
  static DEVICE float scale(const u8* scales, int g) {
    const int low = (scales[g & 7] >> (g & 8 ? 4 : 0)) & 15, high = (scales[8 + (g & 3)] >> (2 * (g >> 2))) & 3;
    return (float)((low | high << 4) - 32);
  }
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
    const int at = row * blocks + block(l, 0), half = l >> 1 & 1;
    const uint4 q = *(const uint4*)(field<1>(tile, blocks, at) + 32 * half + 16 * (l & 1));
    const uint4 high = *(const uint4*)(field<0>(tile, blocks, at) + 16 * (l & 1));
    const float d = half_at(field<3>(tile, blocks, at));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float w = d * scale(field<2>(tile, blocks, at), 8 * half + (l & 1) + 2 * i);
      bits_of(s.q[i], q, 2 * i, TWO_BITS);
      or_bits(s.q[i], high, 4 * half + i, BIT, 2);
      s.w[i] = make_float2(w, -4.f * w);
    }
  }
};
// Sub-blocks 2j and 2j+1 of Q4_K and Q5_K: six-bit scales and mins packed in twelve bytes.
DEVICE void six_bit_scales(float2& a, float2& b, const uint4& header, int j) {
  const float d = half_to_float((u16)header.x), m = -half_to_float((u16)(header.x >> 16));
  const int shift = (j & 1) * 16;
  const u32 x = header.y >> shift, y = header.z >> shift, z = header.w >> shift;
  // The four low bits of the later four lie in the last word, and their two high ones above the earlier four's six.
  const u32 scales = ((j < 2 ? x : z) & 0x0f0f) | ((j < 2 ? x : x >> 2) & 0x3030);
  const u32 mins = ((j < 2 ? y : z >> 4) & 0x0f0f) | ((j < 2 ? y : y >> 2) & 0x3030);
  a = make_float2(d * (float)(scales & 255), m * (float)(mins & 255));
  b = make_float2(d * (float)(scales >> 8), m * (float)(mins >> 8));
}
// A lane has two sub-blocks, 64 neighbouring columns: their nibbles are the low and the high ones of 32 bytes.
struct SubBlocks : Blocks256 {
  static constexpr int WEIGHTS = 2;
  static DEVICE constexpr int weight(int i) { return i & 1; }
  static DEVICE int group(int l, int i) { return 4 * l + 2 * (i & 1) + ((i >> 1) ^ swapped(l)); }
};
template <> struct Block<Q4_K> : SubBlocks, Planes<16, 128> {
  static constexpr u32 SIXTEENFOLD = 0b1010;
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
    const int at = row * blocks + block(l, 0);
    six_bit_scales(s.w[0], s.w[1], *(const uint4*)field<0>(tile, blocks, at), l & 3);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 q = *(const uint4*)(field<1>(tile, blocks, at) + 32 * (l & 3) + 16 * (k ^ swapped(l)));
      bits_of(s.q[2 * k], q, 0, LOW);
      bits_of(s.q[2 * k + 1], q, 0, HIGH);
    }
  }
};
template <> struct Block<Q5_K> : SubBlocks, Planes<16, 32, 128> {
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
    const int at = row * blocks + block(l, 0);
    six_bit_scales(s.w[0], s.w[1], *(const uint4*)field<0>(tile, blocks, at), l & 3);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int half = k ^ swapped(l);
      const uint4 q = *(const uint4*)(field<2>(tile, blocks, at) + 32 * (l & 3) + 16 * half);
      const uint4 fifth = *(const uint4*)(field<1>(tile, blocks, at) + 16 * half);
      bits_of(s.q[2 * k], q, 0, LOW);
      bits_of(s.q[2 * k + 1], q, 4, LOW);
      or_bits(s.q[2 * k], fifth, 2 * (l & 3), BIT, 4);
      or_bits(s.q[2 * k + 1], fifth, 2 * (l & 3) + 1, BIT, 4);
    }
  }
};
template <> struct Block<Q6_K> : Blocks256, Planes<128, 64, 16, 2> {
  static DEVICE int group(int l, int i) { return (l >> 2) * 16 + (l & 2) * 4 + (l & 1) + 4 * (i & 1) + 2 * ((i >> 1) ^ swapped(l)); }
  static DEVICE void unpack(Share& s, const u8* tile, int blocks, int row, int l) {
    const int at = row * blocks + block(l, 0), half = l >> 1 & 1;
    const uint4 high = *(const uint4*)(field<1>(tile, blocks, at) + 32 * half + 16 * (l & 1));
    const uint2 scales = *(const uint2*)(field<2>(tile, blocks, at) + 8 * half);
    const float d = half_at(field<3>(tile, blocks, at));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int later = k ^ swapped(l);  // 32 columns later: the next two bits
      const uint4 low = *(const uint4*)(field<0>(tile, blocks, at) + 64 * half + 32 * later + 16 * (l & 1));
      bits_of(s.q[2 * k], low, 0, LOW);
      bits_of(s.q[2 * k + 1], low, 4, LOW);
      or_bits(s.q[2 * k], high, 2 * later, TWO_BITS, 4);
      or_bits(s.q[2 * k + 1], high, 2 * later + 4, TWO_BITS, 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float w = d * (float)(signed char)((i ? scales.y : scales.x) >> (8 * (l & 1) + 16 * later));
        s.w[2 * k + i] = make_float2(w, -32.f * w);
      }
    }
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
template <> struct Block<F16> : FloatBlock16 {};
template <> struct Block<BF16> : FloatBlock16 {};
template <> struct Block<F32> : Blocks32, Planes<16, 16, 16, 16, 16, 16, 16, 16> {};

DEVICE constexpr bool is_float_type(int type) { return type == F32 || type == F16 || type == BF16; }

// Group i of the share of lane l of sixteen as floats.
template <int TYPE> DEVICE void group_values(float (&v)[16], const u8* tile, int blocks, int row, int l, int i) {
  using B = Block<TYPE>;
  if constexpr (is_float_type(TYPE)) {
    const int plane_bytes = TILE_ROWS * blocks * 16, planes = TYPE == F32 ? 4 : 2;  // of a group
    const u8* const p = tile + (i & 1) * planes * plane_bytes + (row * blocks + B::existing(l, i >> 1, blocks)) * 16;
#pragma unroll
    for (int j = 0; j < planes; ++j) {
      const uint4 w = *(const uint4*)(p + j * plane_bytes);
      if (TYPE == F16) halves(v + 8 * j, w);
      else if (TYPE == BF16) brain_halves(v + 8 * j, w);
      else v[4 * j] = bits_to_float(w.x), v[4 * j + 1] = bits_to_float(w.y), v[4 * j + 2] = bits_to_float(w.z), v[4 * j + 3] = bits_to_float(w.w);
    }
  } else {
    Share s;
    B::unpack(s, tile, blocks, row, l);
    const float2 w = s.w[B::weight(i)];
    const float scale = B::SIXTEENFOLD >> i & 1 ? w.x * 0.0625f : w.x;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const u32 byte = s.q[i][j >> 2] >> (8 * (j & 3)) & 255;
      v[j] = fmaf(scale, (float)(B::SIGNED ? (int)(signed char)byte : (int)byte), w.y);
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
  static DEVICE u64 offset(int group, int slice) { return (u64)group * GROUP_BYTES + (u32)slice * FULL_BYTES; }
};
