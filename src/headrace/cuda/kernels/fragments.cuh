// Weights of one row as a lane's part of an mma's operand: a quad of lanes shares the row, and of every 16
// columns lane q has 2q, 2q + 1, 2q + 8 and 2q + 9, as the PTX fragments want them. So x needs no order of its
// own, and the tiles (blocks.cuh) are read straight from device memory.
//
// Weights<TYPE>::Raw is what 64 columns take, as they lie in memory: load() only loads, so that it can run a
// step ahead, and unpack() makes bfloat16 of it, rounded once. Steps go through a block of 256 in order, as its
// quarters 0 … 3: what all of them need is loaded with the first.
#pragma once
#include "blocks.cuh"

constexpr int STEP_COLUMNS = 64, STEPS_A_SLICE = TILE_COLUMNS / STEP_COLUMNS;

// w[g]: of group g of 16 columns, columns 2q and 2q + 1, then 2q + 8 and 2q + 9.
struct Operand { u32 w[4][2]; };

// A byte becomes a float without a conversion: as the upper mantissa of 128 (or, if it has eight bits and a
// sign, of 32,768) it stands for that much more, which the offset takes away.
template <bool SIGNED> DEVICE void to_brain4(u32 (&w)[2], u32 bytes, float scale, float offset) {
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u32 biased = SIGNED ? pick_bytes(bytes ^ 0x80808080u, 0x47000000u, 0x7404u | (u32)j << 4)
                              : pick_bytes(bytes, 0x43000000u, 0x7044u | (u32)j << 8);
    v[j] = fmaf(bits_to_float(biased), scale, offset);
  }
  w[0] = pack_brain2(v[0], v[1]);
  w[1] = pack_brain2(v[2], v[3]);
}
template <bool SIGNED> DEVICE float biased_offset(float2 weigh) { return fmaf(SIGNED ? -32896.f : -128.f, weigh.x, weigh.y); }
template <bool SIGNED = false> DEVICE void to_brain4(u32 (&w)[2], u32 bytes, float2 weigh) {
  to_brain4<SIGNED>(w, bytes, weigh.x, biased_offset<SIGNED>(weigh));
}

// Bytes 2q, 2q + 1, 2q + 8 and 2q + 9 of sixteen.
struct Bytes4 {
  u16 low, high;
  DEVICE void load(const u8* p, int q) {
    low = *(const u16*)(p + 2 * q);
    high = *(const u16*)(p + 8 + 2 * q);
  }
  DEVICE u32 word() const { return low | (u32)high << 16; }
};
constexpr u32 NIBBLES = 0x0f0f0f0fu, ONES = 0x01010101u, TWOS = 0x03030303u;

// Where a block lies: 64 columns, or the 256 of four steps; row: within its tile; step: within its slice.
struct At {
  const u8* tile;
  int blocks, row, q, step = 0, slice = 0;
  template <class T, int STEPS> DEVICE void advance() {  // T: the matrix's Tiles
    step += STEPS;
    if (step < STEPS_A_SLICE) return;
    step = 0;
    tile += T::FULL_BYTES;
    blocks = T::blocks(++slice);
  }
};

template <int TYPE> struct Weights;

// Blocks of 32 values: the 64 columns are two of them, of which the second may be beyond the matrix: its
// scales are zero then.
template <int TYPE> struct Pairs : Block<TYPE> {
  using B = Block<TYPE>;
  static constexpr int STEPS = 1;
  static DEVICE int block(const At& at, int quarter, int half) { return 2 * (at.step + quarter) + half; }
  static DEVICE bool exists(const At& at, int quarter, int half) { return block(at, quarter, half) < at.blocks; }
  template <int P> static DEVICE const u8* field(const At& at, int quarter, int half) {
    return B::template field<P>(at.tile, at.blocks, at.row * at.blocks + min(block(at, quarter, half), at.blocks - 1));
  }
  template <int P> static DEVICE u32 half_word(const At& at, int quarter, int half) {
    return exists(at, quarter, half) ? *(const u16*)field<P>(at, quarter, half) : 0;
  }
  template <int P> static DEVICE u32 word(const At& at, int quarter, int half) {
    return exists(at, quarter, half) ? load32(field<P>(at, quarter, half)) : 0;
  }
};
// The fifth bits of a lane's four columns of group `part` of a block, at bit 4 of each byte.
DEVICE u32 fifth_bits(u32 fifth, int part, int q) {
  const u32 x = fifth >> (16 * part + 2 * q);
  return (x & 1) << 4 | (x & 2) << 11 | (x & 0x100) << 12 | (x & 0x200) << 19;
}
DEVICE float2 scale_and_min(u32 dm) { return make_float2(half_to_float((u16)dm), half_to_float((u16)(dm >> 16))); }
DEVICE float2 centred(u32 d, float zero) {
  const float scale = half_to_float((u16)d);
  return make_float2(scale, -zero * scale);
}

// Four or five bits a weight, with one scale: of weights around `zero` (Q4_0, Q5_0), or beside a minimum.
template <int TYPE> struct Nibbles : Pairs<TYPE> {
  using P = Pairs<TYPE>;
  static constexpr bool FIVE = TYPE == Q5_0 || TYPE == Q5_1, MINIMUM = TYPE == Q4_1 || TYPE == Q5_1;
  struct Raw { Bytes4 q[2]; u32 fifth[2], scale[2]; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      r.q[i].load(P::template field<0>(at, quarter, i), at.q);
      r.fifth[i] = FIVE ? P::template word<1>(at, quarter, i) : 0;
      r.scale[i] = MINIMUM ? P::template word<1 + FIVE>(at, quarter, i) : P::template half_word<1 + FIVE>(at, quarter, i);
    }
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 w = MINIMUM ? scale_and_min(r.scale[i]) : centred(r.scale[i], FIVE ? 16.f : 8.f);
      const u32 low = FIVE ? fifth_bits(r.fifth[i], 0, q) : 0, high = FIVE ? fifth_bits(r.fifth[i], 1, q) : 0;
      to_brain4(o.w[2 * i], (r.q[i].word() & NIBBLES) | low, w);
      to_brain4(o.w[2 * i + 1], (r.q[i].word() >> 4 & NIBBLES) | high, w);
    }
  }
};
template <> struct Weights<Q4_0> : Nibbles<Q4_0> {};
template <> struct Weights<Q4_1> : Nibbles<Q4_1> {};
template <> struct Weights<Q5_0> : Nibbles<Q5_0> {};
template <> struct Weights<Q5_1> : Nibbles<Q5_1> {};
template <> struct Weights<Q8_0> : Pairs<Q8_0> {
  struct Raw { Bytes4 q[4]; u32 d[2]; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      r.q[2 * i].load(field<0>(at, quarter, i), at.q);
      r.q[2 * i + 1].load(field<1>(at, quarter, i), at.q);
      r.d[i] = half_word<2>(at, quarter, i);
    }
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
#pragma unroll
    for (int g = 0; g < 4; ++g) to_brain4<true>(o.w[g], r.q[g].word(), centred(r.d[g >> 1], 0.f));
  }
};

// Blocks of 256 values: the 64 columns are a quarter of one.
template <int TYPE> struct Quarters : Block<TYPE> {
  using B = Block<TYPE>;
  static constexpr int STEPS = 4;
  // What a quarter has of a field that lies in 1, 2 or 4 parts.
  template <int P, int PARTS = 1> static DEVICE const u8* field(const At& at, int quarter = 0) {
    constexpr int SIZE = B::template size<P>();
    return at.tile + B::template offset<P>(at.blocks) + (at.row * at.blocks + at.step / 4) * SIZE + quarter * PARTS / 4 * (SIZE / PARTS);
  }
};
template <> struct Weights<Q2_K> : Quarters<Q2_K> {
  struct Raw { Bytes4 q[2]; u32 scales, dm; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int p = 0; p < 2; ++p) r.q[p].load(field<1, 2>(at, quarter) + 16 * p, at.q);
    r.scales = load32(field<0, 4>(at, quarter));
    if (quarter == 0) r.dm = load32(field<2>(at));
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
    const float2 dm = scale_and_min(r.dm);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const u32 s = r.scales >> (8 * g);
      const float2 w = make_float2(dm.x * (float)(s & 15), -dm.y * (float)(s >> 4 & 15));
      to_brain4(o.w[g], r.q[g & 1].word() >> (4 * (quarter & 1) + 2 * (g >> 1)) & TWOS, w);
    }
  }
};
template <> struct Weights<Q3_K> : Quarters<Q3_K> {
  struct Raw { Bytes4 high[2], q[2]; u32 low_scales, high_scales, d; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if (quarter == 0) r.high[p].load(field<0>(at) + 16 * p, at.q);
      r.q[p].load(field<1, 2>(at, quarter) + 16 * p, at.q);
    }
    r.low_scales = load32(field<2>(at) + 4 * (quarter & 1));
    if (quarter) return;
    r.high_scales = load32(field<2>(at) + 8);
    r.d = *(const u16*)field<3>(at);
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
    const float d = half_to_float((u16)r.d);
    // Scale 4 quarter + g: low four bits in a nibble of byte (4 quarter + g) % 8, high two in byte 8 + g.
    const u32 scales = (r.low_scales >> (4 * (quarter >> 1)) & NIBBLES) | (r.high_scales >> (2 * quarter) & TWOS) << 4;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float s = d * (float)((int)(scales >> (8 * g) & 255) - 32);
      const u32 low = r.q[g & 1].word() >> (4 * (quarter & 1) + 2 * (g >> 1)) & TWOS;
      const u32 high = r.high[g & 1].word() >> (2 * quarter + (g >> 1)) & ONES;
      to_brain4(o.w[g], low | high << 2, make_float2(s, -4.f * s));
    }
  }
};
template <> struct Weights<Q4_K> : Quarters<Q4_K> {
  struct Raw { Bytes4 q[2]; uint4 header; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int p = 0; p < 2; ++p) r.q[p].load(field<1, 4>(at, quarter) + 16 * p, at.q);
    if (quarter == 0) r.header = *(const uint4*)field<0>(at);
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
    Share s;
    six_bit_scales(s, r.header, quarter);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      to_brain4(o.w[p], r.q[p].word() & NIBBLES, s.wa);
      to_brain4(o.w[2 + p], r.q[p].word() >> 4 & NIBBLES, s.wb);
    }
  }
};
template <> struct Weights<Q5_K> : Quarters<Q5_K> {
  struct Raw { Bytes4 fifth[2], q[2]; uint4 header; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if (quarter == 0) r.fifth[p].load(field<1>(at) + 16 * p, at.q);
      r.q[p].load(field<2, 4>(at, quarter) + 16 * p, at.q);
    }
    if (quarter == 0) r.header = *(const uint4*)field<0>(at);
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
    Share s;
    six_bit_scales(s, r.header, quarter);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const u32 fifth = r.fifth[p].word() >> (2 * quarter);
      to_brain4(o.w[p], (r.q[p].word() & NIBBLES) | (fifth & ONES) << 4, s.wa);
      to_brain4(o.w[2 + p], (r.q[p].word() >> 4 & NIBBLES) | (fifth >> 1 & ONES) << 4, s.wb);
    }
  }
};
template <> struct Weights<Q6_K> : Quarters<Q6_K> {
  struct Raw { Bytes4 low[4], high[2]; u32 scales, d; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int g = 0; g < 4; ++g) r.low[g].load(field<0, 2>(at, quarter) + 16 * g, at.q);
#pragma unroll
    for (int p = 0; p < 2; ++p) r.high[p].load(field<1, 2>(at, quarter) + 16 * p, at.q);
    r.scales = load32(field<2, 4>(at, quarter));
    if (quarter == 0) r.d = *(const u16*)field<3>(at);
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
    const int upper = quarter & 1;
    const float d = half_to_float((u16)r.d);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float s = d * (float)(signed char)(r.scales >> (8 * g));
      const u32 high = r.high[g & 1].word() >> (4 * upper + (g & 2)) & TWOS;
      to_brain4(o.w[g], (r.low[g].word() >> (4 * upper) & NIBBLES) | high << 4, make_float2(s, -32.f * s));
    }
  }
};

// Unquantised: planes of 16 bytes, 32 columns a block.
template <int TYPE> struct HalfWords : Pairs<TYPE> {
  struct Raw { u32 w[4][2]; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
    using P = Pairs<TYPE>;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u8* first = P::template field<0>(at, quarter, i) + 4 * at.q;
      const int plane = TILE_ROWS * at.blocks * 16;  // planes of equal size lie evenly apart
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int p = 0; p < 2; ++p) r.w[2 * i + g][p] = P::exists(at, quarter, i) ? load32(first + (2 * g + p) * plane) : 0;
    }
  }
};
template <> struct Weights<F16> : HalfWords<F16> {
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 v = scale_and_min(r.w[i >> 1][i & 1]);
      o.w[i >> 1][i & 1] = pack_brain2(v.x, v.y);
    }
  }
};
template <> struct Weights<BF16> : HalfWords<BF16> {
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
#pragma unroll
    for (int i = 0; i < 8; ++i) o.w[i >> 1][i & 1] = r.w[i >> 1][i & 1];
  }
};
template <> struct Weights<F32> : Pairs<F32> {
  struct Raw { float2 v[4][2]; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int plane = TILE_ROWS * at.blocks * 16;
      const u8* first = field<0>(at, quarter, i) + (at.q >> 1) * plane + 8 * (at.q & 1);
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int p = 0; p < 2; ++p)
          r.v[2 * i + g][p] = exists(at, quarter, i) ? *(const float2*)(first + (4 * g + 2 * p) * plane) : make_float2(0.f, 0.f);
    }
  }
  static DEVICE void unpack(Operand& o, const Raw& r, int q, int quarter) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 v = r.v[i >> 1][i & 1];
      o.w[i >> 1][i & 1] = pack_brain2(v.x, v.y);
    }
  }
};
