// Weights of one row as a lane's part of an mma's operand: a quad of lanes shares the row, and of every 32
// columns lane q has eight neighbours, 8q … 8q + 7: bytes that lie together in every type, so that the tiles
// (blocks.cuh) are read straight from device memory, a word or two at a time. x lies in the matching order
// (Row::brain_at).
//
// Weights<TYPE>::Raw is what 256 columns take, as they lie in memory: load() only loads, one or two steps of 64
// ahead, and unpack() makes bfloat16 of it, rounded once. Steps go through a block of 256 in order, as its
// quarters 0 … 3. What all of them need is loaded with the first, into `coming`: the last block's may still be in
// use then.
#pragma once
#include "blocks.cuh"

constexpr int STEP_COLUMNS = 64, STEPS_A_SLICE = TILE_COLUMNS / STEP_COLUMNS;

// w[2b + h]: of the 32 columns b, the lane's columns 4h, 4h + 1, then 4h + 2, 4h + 3.
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

// The eight columns of a lane, whose bytes are `words`, all with one scale.
template <bool SIGNED = false> DEVICE void to_brain8(u32 (*w)[2], uint2 words, float2 weigh) {
  const float offset = biased_offset<SIGNED>(weigh);
  to_brain4<SIGNED>(w[0], words.x, weigh.x, offset);
  to_brain4<SIGNED>(w[1], words.y, weigh.x, offset);
}
constexpr u32 NIBBLES = 0x0f0f0f0fu, ONES = 0x01010101u, TWOS = 0x03030303u;
DEVICE uint2 load64(const u8* p) { return *(const uint2*)p; }
DEVICE uint2 operator>>(uint2 v, int n) { return make_uint2(v.x >> n, v.y >> n); }
DEVICE uint2 operator<<(uint2 v, int n) { return make_uint2(v.x << n, v.y << n); }
DEVICE uint2 operator&(uint2 v, u32 mask) { return make_uint2(v.x & mask, v.y & mask); }
DEVICE uint2 operator|(uint2 v, uint2 o) { return make_uint2(v.x | o.x, v.y | o.y); }

// Where a block lies: 64 columns, or the 256 of four steps; row: within its tile; step: within its slice.
struct At {
  const u8* tile;
  int blocks, row, q, step = 0, slice = 0;
  template <class T> DEVICE void advance() {  // to the next 256 columns; T: the matrix's Tiles
    step += 4;
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
  static DEVICE int block(const At& at, int quarter, int half) { return 2 * (at.step + quarter) + half; }
  static DEVICE bool exists(const At& at, int quarter, int half) { return block(at, quarter, half) < at.blocks; }
  template <int P> static DEVICE const u8* field(const At& at, int quarter, int half) {
    return B::template field<P>(at.tile, at.blocks, at.row * at.blocks + min(block(at, quarter, half), at.blocks - 1));
  }
  // Planes of equal size lie evenly apart.
  static DEVICE const u8* plane(const At& at, int quarter, int half, int p) { return field<0>(at, quarter, half) + p * (TILE_ROWS * at.blocks * 16); }
  template <int P> static DEVICE u32 half_word(const At& at, int quarter, int half) {
    return exists(at, quarter, half) ? *(const u16*)field<P>(at, quarter, half) : 0;
  }
  template <int P> static DEVICE u32 word(const At& at, int quarter, int half) {
    return exists(at, quarter, half) ? load32(field<P>(at, quarter, half)) : 0;
  }
};
DEVICE float2 scale_and_min(u32 dm) { return make_float2(half_to_float((u16)dm), half_to_float((u16)(dm >> 16))); }
DEVICE float2 centred(u32 d, float zero) {
  const float scale = half_to_float((u16)d);
  return make_float2(scale, -zero * scale);
}
// Bit i of eight at bit 4 of byte i.
DEVICE uint2 fifth_bits(u32 bits) {
  return (make_uint2((bits & 15) * 0x00204081u, (bits >> 4) * 0x00204081u) & ONES) << 4;
}

// Four or five bits a weight, with one scale: of weights around `zero` (Q4_0, Q5_0), or beside a minimum.
template <int TYPE> struct Nibbles : Pairs<TYPE> {
  using P = Pairs<TYPE>;
  static constexpr bool FIVE = TYPE == Q5_0 || TYPE == Q5_1, MINIMUM = TYPE == Q4_1 || TYPE == Q5_1;
  struct Raw { struct { uint2 q[2]; u32 fifth[2], scale[2]; } of[4]; };
  static DEVICE void load(Raw& raw, const At& at, int quarter) {
    auto& r = raw.of[quarter];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      r.q[i] = load64(P::template field<0>(at, quarter, i) + 8 * (at.q & 1));
      r.fifth[i] = FIVE ? P::template field<1>(at, quarter, i)[at.q] : 0;
      r.scale[i] = MINIMUM ? P::template word<1 + FIVE>(at, quarter, i) : P::template half_word<1 + FIVE>(at, quarter, i);
    }
  }
  static DEVICE void unpack(Operand& o, Raw& raw, int q, int quarter) {
    auto& r = raw.of[quarter];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 w = MINIMUM ? scale_and_min(r.scale[i]) : centred(r.scale[i], FIVE ? 16.f : 8.f);
      const uint2 low = r.q[i] >> (4 * (q >> 1)) & NIBBLES;
      to_brain8(o.w + 2 * i, FIVE ? low | fifth_bits(r.fifth[i]) : low, w);
    }
  }
};
template <> struct Weights<Q4_0> : Nibbles<Q4_0> {};
template <> struct Weights<Q4_1> : Nibbles<Q4_1> {};
template <> struct Weights<Q5_0> : Nibbles<Q5_0> {};
template <> struct Weights<Q5_1> : Nibbles<Q5_1> {};
template <> struct Weights<Q8_0> : Pairs<Q8_0> {
  struct Raw { struct { uint2 q[2]; u32 d[2]; } of[4]; };
  static DEVICE void load(Raw& raw, const At& at, int quarter) {
    auto& r = raw.of[quarter];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      r.q[i] = load64(plane(at, quarter, i, at.q >> 1) + 8 * (at.q & 1));
      r.d[i] = half_word<2>(at, quarter, i);
    }
  }
  static DEVICE void unpack(Operand& o, Raw& raw, int, int quarter) {
    auto& r = raw.of[quarter];
#pragma unroll
    for (int i = 0; i < 2; ++i) to_brain8<true>(o.w + 2 * i, r.q[i], centred(r.d[i], 0.f));
  }
};

// Blocks of 256 values: the 64 columns are a quarter of one.
template <int TYPE> struct Quarters : Block<TYPE> {
  using B = Block<TYPE>;
  // What a quarter has of a field that lies in 1, 2 or 4 parts.
  template <int P, int PARTS = 1> static DEVICE const u8* field(const At& at, int quarter = 0) {
    constexpr int SIZE = B::template size<P>();
    return at.tile + B::template offset<P>(at.blocks) + (at.row * at.blocks + at.step / 4) * SIZE + quarter * PARTS / 4 * (SIZE / PARTS);
  }
};
template <> struct Weights<Q2_K> : Quarters<Q2_K> {
  struct Raw { uint2 q[2]; u32 scales[4], dm, coming; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
    if (quarter % 2 == 0) r.q[quarter / 2] = load64(field<1, 2>(at, quarter) + 8 * at.q);
    r.scales[quarter] = load32(field<0, 4>(at, quarter));
    if (quarter == 0) r.coming = load32(field<2>(at));
  }
  static DEVICE void unpack(Operand& o, Raw& r, int q, int quarter) {
    if (quarter == 0) r.dm = r.coming;
    const float2 dm = scale_and_min(r.dm);
    const u32 scales = r.scales[quarter] >> (8 * (q >> 1));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 s = scales >> (16 * i);
      to_brain8(o.w + 2 * i, r.q[quarter / 2] >> (4 * (quarter & 1) + 2 * i) & TWOS, make_float2(dm.x * (float)(s & 15), -dm.y * (float)(s >> 4 & 15)));
    }
  }
};
template <> struct Weights<Q3_K> : Quarters<Q3_K> {
  struct Common { uint2 high; u32 scales[3], d; };
  struct Raw { uint2 q[2]; Common all, coming; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
    if (quarter % 2 == 0) r.q[quarter / 2] = load64(field<1, 2>(at, quarter) + 8 * at.q);
    if (quarter) return;
    r.coming.high = load64(field<0>(at) + 8 * at.q);
#pragma unroll
    for (int i = 0; i < 3; ++i) r.coming.scales[i] = load32(field<2>(at) + 4 * i);
    r.coming.d = *(const u16*)field<3>(at);
  }
  static DEVICE void unpack(Operand& o, Raw& r, int q, int quarter) {
    if (quarter == 0) r.all = r.coming;
    const float d = half_to_float((u16)r.all.d);
    // Scale 4 quarter + g: low four bits in a nibble of byte (4 quarter + g) % 8, high two in byte 8 + g.
    const u32 low_scales = r.all.scales[quarter & 1] >> (4 * (quarter >> 1)) & NIBBLES, high_scales = r.all.scales[2] >> (2 * quarter) & TWOS;
    const u32 scales = (low_scales | high_scales << 4) >> (8 * (q >> 1));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float s = d * (float)((int)(scales >> (16 * i) & 255) - 32);
      const uint2 low = r.q[quarter / 2] >> (4 * (quarter & 1) + 2 * i) & TWOS, high = r.all.high >> (2 * quarter + i) & ONES;
      to_brain8(o.w + 2 * i, low | high << 2, make_float2(s, -4.f * s));
    }
  }
};
// Scales and offsets of Q4_K and Q5_K: lane q works out those of quarter q, and the others ask it.
struct SharedScales {
  float2 a, b;  // biased
  DEVICE void set(const uint4& header, int q) {
    Share s;
    six_bit_scales(s, header, q);
    a = make_float2(s.wa.x, biased_offset<false>(s.wa));
    b = make_float2(s.wb.x, biased_offset<false>(s.wb));
  }
  DEVICE SharedScales of(int quarter) const {
    const int lane = (threadIdx.x & 28) + quarter;
    return {make_float2(shuffle(a.x, lane), shuffle(a.y, lane)), make_float2(shuffle(b.x, lane), shuffle(b.y, lane))};
  }
};
template <int TYPE> struct SixBits : Quarters<TYPE> {
  using Q = Quarters<TYPE>;
  static constexpr bool FIVE = TYPE == Q5_K;
  struct Raw { uint2 q[4], fifth, coming; uint4 header; SharedScales scales; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
    r.q[quarter] = load64(Q::template field<1 + FIVE, 4>(at, quarter) + 8 * at.q);
    if (quarter) return;
    r.header = *(const uint4*)Q::template field<0>(at);
    if (FIVE) r.coming = load64(Q::template field<1>(at) + 8 * at.q);
  }
  static DEVICE void unpack(Operand& o, Raw& r, int q, int quarter) {
    if (quarter == 0) r.scales.set(r.header, q), r.fifth = r.coming;
    const SharedScales s = r.scales.of(quarter);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint2 v = r.q[quarter] >> (4 * i) & NIBBLES;
      if (FIVE) v = v | (r.fifth >> (2 * quarter + i) & ONES) << 4;
      const float2 w = i ? s.b : s.a;
      to_brain4<false>(o.w[2 * i], v.x, w.x, w.y);
      to_brain4<false>(o.w[2 * i + 1], v.y, w.x, w.y);
    }
  }
};
template <> struct Weights<Q4_K> : SixBits<Q4_K> {};
template <> struct Weights<Q5_K> : SixBits<Q5_K> {};
template <> struct Weights<Q6_K> : Quarters<Q6_K> {
  struct Raw { uint2 low[2][2], high[2]; u32 scales[4], d, coming; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
    if (quarter % 2 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) r.low[quarter / 2][i] = load64(field<0, 2>(at, quarter) + 32 * i + 8 * at.q);
      r.high[quarter / 2] = load64(field<1, 2>(at, quarter) + 8 * at.q);
    }
    r.scales[quarter] = load32(field<2, 4>(at, quarter));
    if (quarter == 0) r.coming = *(const u16*)field<3>(at);
  }
  static DEVICE void unpack(Operand& o, Raw& r, int q, int quarter) {
    const int half = quarter >> 1, upper = quarter & 1;
    if (quarter == 0) r.d = r.coming;
    const float d = half_to_float((u16)r.d);
    const u32 scales = r.scales[quarter] >> (8 * (q >> 1));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float s = d * (float)(signed char)(scales >> (16 * i));
      const uint2 high = r.high[half] >> (4 * upper + 2 * i) & TWOS;
      to_brain8(o.w + 2 * i, (r.low[half][i] >> (4 * upper) & NIBBLES) | high << 4, make_float2(s, -32.f * s));
    }
  }
};

// Unquantised: planes of 16 bytes, 32 columns a block.
template <int TYPE> struct HalfWords : Pairs<TYPE> {
  using P = Pairs<TYPE>;
  struct Raw { uint4 of[4][2]; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int i = 0; i < 2; ++i) r.of[quarter][i] = P::exists(at, quarter, i) ? *(const uint4*)P::plane(at, quarter, i, at.q) : make_uint4(0, 0, 0, 0);
  }
  static DEVICE void unpack(Operand& o, Raw& r, int, int quarter) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 w = r.of[quarter][i];
      const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = scale_and_min(words[j]);
        o.w[2 * i + (j >> 1)][j & 1] = TYPE == BF16 ? words[j] : pack_brain2(v.x, v.y);
      }
    }
  }
};
template <> struct Weights<F16> : HalfWords<F16> {};
template <> struct Weights<BF16> : HalfWords<BF16> {};
template <> struct Weights<F32> : Pairs<F32> {
  struct Raw { float4 of[4][4]; };
  static DEVICE void load(Raw& r, const At& at, int quarter) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r.of[quarter][i] = exists(at, quarter, i >> 1) ? *(const float4*)plane(at, quarter, i >> 1, 2 * at.q + (i & 1)) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
  static DEVICE void unpack(Operand& o, Raw& r, int, int quarter) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = r.of[quarter][i];
      o.w[i][0] = pack_brain2(v.x, v.y);
      o.w[i][1] = pack_brain2(v.z, v.w);
    }
  }
};
