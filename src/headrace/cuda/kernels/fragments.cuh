// Weights of one row as a lane's part of an mma's operand. Of 256 columns, four steps of an mma's 64, lane q of the
// quad that shares the row has 64 neighbours, sixteen a step: bytes that lie together in every type, mostly with
// one scale, so that the tiles (blocks.cuh) are read straight from device memory, sixteen bytes at a time. x lies
// in the matching order (Row::brain_at).
//
// Weights<TYPE>::Raw is what a lane holds of its row, as it lies in memory: load() only loads, one or two steps
// ahead. Both it and what follows go through the steps 0 … 3 of a block of 256 in order: begin() first, which keeps
// what is needed of one block when load() begins with the next; then for each step bytes(), the lane's sixteen (as
// int8 if SIGNED), and weigh(), scale and offset. unpack_brain() makes bfloat16 of them, rounded once.
#pragma once
#include "blocks.cuh"

constexpr int STEP_COLUMNS = 64, STEPS_A_SLICE = TILE_COLUMNS / STEP_COLUMNS;

// w[g]: of the lane's sixteen columns, 4g and 4g + 1, then 4g + 2 and 4g + 3.
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

// Sixteen columns, a byte each, all with one scale.
template <bool SIGNED = false> DEVICE void to_brain16(Operand& o, const uint4& bytes, float2 weigh) {
  const float offset = biased_offset<SIGNED>(weigh);
  to_brain4<SIGNED>(o.w[0], bytes.x, weigh.x, offset);
  to_brain4<SIGNED>(o.w[1], bytes.y, weigh.x, offset);
  to_brain4<SIGNED>(o.w[2], bytes.z, weigh.x, offset);
  to_brain4<SIGNED>(o.w[3], bytes.w, weigh.x, offset);
}
constexpr u32 NIBBLES = 0x0f0f0f0fu, ONES = 0x01010101u, TWOS = 0x03030303u;
DEVICE uint4 load128(const u8* p) { return *(const uint4*)p; }
DEVICE uint4 operator>>(const uint4& v, int n) { return make_uint4(v.x >> n, v.y >> n, v.z >> n, v.w >> n); }
DEVICE uint4 operator<<(const uint4& v, int n) { return make_uint4(v.x << n, v.y << n, v.z << n, v.w << n); }
DEVICE uint4 operator&(const uint4& v, u32 mask) { return make_uint4(v.x & mask, v.y & mask, v.z & mask, v.w & mask); }
DEVICE uint4 operator|(const uint4& v, const uint4& o) { return make_uint4(v.x | o.x, v.y | o.y, v.z | o.z, v.w | o.w); }

// A lane's place: its row within a tile, the block of 256 columns within the slice.
struct At {
  const u8* tile;
  int blocks, row, q, block, slice;  // blocks: of the type, in the tile
  template <class T> DEVICE void advance() {  // T: the matrix's Tiles
    if (++block < TILE_COLUMNS / 256) return;
    block = 0;
    tile += T::FULL_BYTES;
    blocks = T::blocks(++slice);
  }
};

template <int TYPE> struct Weights;

// Blocks of 32 values: a lane has two of the eight, each for two steps. One that lies beyond the matrix has scales
// of zero.
template <int TYPE> struct Eighths : Block<TYPE> {
  using B = Block<TYPE>;
  static constexpr bool SIGNED = false;
  static DEVICE int index(const At& at, int step) { return 8 * at.block + 2 * at.q + step / 2; }
  static DEVICE bool exists(const At& at, int step) { return index(at, step) < at.blocks; }
  template <int P> static DEVICE const u8* field(const At& at, int step) {
    return B::template field<P>(at.tile, at.blocks, at.row * at.blocks + min(index(at, step), at.blocks - 1));
  }
  // Planes of equal size lie evenly apart.
  static DEVICE const u8* plane(const At& at, int step, int p) { return field<0>(at, step) + p * (TILE_ROWS * at.blocks * 16); }
  template <int P> static DEVICE u32 half_word(const At& at, int step) { return exists(at, step) ? *(const u16*)field<P>(at, step) : 0; }
  template <int P> static DEVICE u32 word(const At& at, int step) { return exists(at, step) ? load32(field<P>(at, step)) : 0; }
};
DEVICE float2 scale_and_min(u32 dm) { return make_float2(half_to_float((u16)dm), half_to_float((u16)(dm >> 16))); }
DEVICE float2 centred(u32 d, float zero) {
  const float scale = half_to_float((u16)d);
  return make_float2(scale, -zero * scale);
}
// reach(), called just after begin(): what no scale of the row's 256 columns is above, and no offset far above. From a
// block's scale and, in the upper half of the word, minimum:
DEVICE float reach_of(u32 dm) {
  const float2 s = scale_and_min(dm);
  return fmaxf(fabsf(s.x), fabsf(s.y) * (1.f / 1024.f));
}
// Blocks of 32 have scales of their own: the quad's lanes have two each.
DEVICE float reach_of_quad(uint2 scales) {
  float v = fmaxf(reach_of(scales.x), reach_of(scales.y));
  v = fmaxf(v, shuffle_xor(v, 1));
  return fmaxf(v, shuffle_xor(v, 2));
}
// Bit i of sixteen at bit 4 of byte i.
DEVICE uint4 fifth_bits(u32 bits) {
  const uint4 spread = make_uint4((bits & 15) * 0x00204081u, (bits >> 4 & 15) * 0x00204081u, (bits >> 8 & 15) * 0x00204081u, (bits >> 12 & 15) * 0x00204081u);
  return (spread & ONES) << 4;
}

// Four or five bits a weight, with one scale: of weights around `zero` (Q4_0, Q5_0), or beside a minimum.
template <int TYPE> struct Nibbles : Eighths<TYPE> {
  using E = Eighths<TYPE>;
  static constexpr bool FIVE = TYPE == Q5_0 || TYPE == Q5_1, MINIMUM = TYPE == Q4_1 || TYPE == Q5_1;
  struct Raw { struct { uint4 q; u32 fifth; } block[2]; uint2 scales, coming; };
  static DEVICE u32 scale(const At& at, int step) {
    return MINIMUM ? E::template word<1 + FIVE>(at, step) : E::template half_word<1 + FIVE>(at, step);
  }
  static DEVICE void load(Raw& raw, const At& at, int step) {
    if (step % 2) return;
    auto& r = raw.block[step / 2];
    r.q = load128(E::template field<0>(at, step));
    r.fifth = FIVE ? load32(E::template field<1>(at, step)) : 0;
    if (step == 0) raw.coming = make_uint2(scale(at, 0), scale(at, 2));
  }
  static DEVICE void begin(Raw& raw, int) { raw.scales = raw.coming; }
  static DEVICE uint4 bytes(const Raw& raw, int, int step) {
    const auto& r = raw.block[step / 2];
    const uint4 low = r.q >> (4 * (step % 2)) & NIBBLES;
    return FIVE ? low | fifth_bits(r.fifth >> (16 * (step % 2))) : low;
  }
  static DEVICE float reach(const Raw& raw) { return reach_of_quad(raw.scales); }
  static DEVICE float2 weigh(const Raw& raw, int, int step) {
    const u32 scale = step < 2 ? raw.scales.x : raw.scales.y;
    return MINIMUM ? scale_and_min(scale) : centred(scale, FIVE ? 16.f : 8.f);
  }
};
template <> struct Weights<Q4_0> : Nibbles<Q4_0> {};
template <> struct Weights<Q4_1> : Nibbles<Q4_1> {};
template <> struct Weights<Q5_0> : Nibbles<Q5_0> {};
template <> struct Weights<Q5_1> : Nibbles<Q5_1> {};
template <> struct Weights<Q8_0> : Eighths<Q8_0> {
  static constexpr bool SIGNED = true;
  struct Raw { uint4 q[2]; uint2 scales, coming; };
  static DEVICE void load(Raw& r, const At& at, int step) {
    r.q[step % 2] = load128(plane(at, step, step % 2));
    if (step == 0) r.coming = make_uint2(half_word<2>(at, 0), half_word<2>(at, 2));
  }
  static DEVICE void begin(Raw& r, int) { r.scales = r.coming; }
  static DEVICE uint4 bytes(const Raw& r, int, int step) { return r.q[step % 2]; }
  static DEVICE float reach(const Raw& r) { return reach_of_quad(r.scales); }
  static DEVICE float2 weigh(const Raw& r, int, int step) { return centred(step < 2 ? r.scales.x : r.scales.y, 0.f); }
};

// Blocks of 256 values: a lane has 64, of quarter q.
template <int TYPE> struct Wholes : Block<TYPE> {
  using B = Block<TYPE>;
  static constexpr bool SIGNED = false;
  template <int P> static DEVICE const u8* field(const At& at) {
    return at.tile + B::template offset<P>(at.blocks) + (at.row * at.blocks + at.block) * B::template size<P>();
  }
};
template <> struct Weights<Q2_K> : Wholes<Q2_K> {
  struct Common { u32 scales, dm; };
  struct Raw { uint4 q[2]; Common all, coming; };
  static DEVICE void load(Raw& r, const At& at, int step) {
    if (step < 2) r.q[step] = load128(field<1>(at) + 32 * (at.q >> 1) + 16 * step);
    if (step == 0) r.coming = {load32(field<0>(at) + 4 * at.q), load32(field<2>(at))};
  }
  static DEVICE void begin(Raw& r, int) { r.all = r.coming; }
  static DEVICE uint4 bytes(const Raw& r, int q, int step) { return r.q[step % 2] >> (4 * (q & 1) + 2 * (step / 2)) & TWOS; }
  static DEVICE float reach(const Raw& r) { return 16.f * reach_of(r.all.dm); }
  static DEVICE float2 weigh(const Raw& r, int, int step) {
    const float2 dm = scale_and_min(r.all.dm);
    const u32 s = r.all.scales >> (8 * step);
    return make_float2(dm.x * (float)(s & 15), -dm.y * (float)(s >> 4 & 15));
  }
};
template <> struct Weights<Q3_K> : Wholes<Q3_K> {
  struct Common { u32 low_scales, high_scales, d; };
  struct Raw { uint4 q[2], high[2]; Common all, coming; };
  static DEVICE void load(Raw& r, const At& at, int step) {
    if (step < 2) r.q[step] = load128(field<1>(at) + 32 * (at.q >> 1) + 16 * step), r.high[step] = load128(field<0>(at) + 16 * step);
    if (step == 0) r.coming = {load32(field<2>(at) + 4 * (at.q & 1)), load32(field<2>(at) + 8), *(const u16*)field<3>(at)};
  }
  static DEVICE void begin(Raw& r, int) { r.all = r.coming; }
  static DEVICE uint4 bytes(const Raw& r, int q, int step) {
    return (r.q[step % 2] >> (4 * (q & 1) + 2 * (step / 2)) & TWOS) | (r.high[step % 2] >> (2 * q + step / 2) & ONES) << 2;
  }
  static DEVICE float reach(const Raw& r) { return 32.f * reach_of(r.all.d); }
  static DEVICE float2 weigh(const Raw& r, int q, int step) {
    // Scale 4q + step: low four bits in a nibble of byte (4q + step) % 8, high two in byte 8 + step.
    const u32 low = r.all.low_scales >> (8 * step + 4 * (q >> 1)) & 15, high = r.all.high_scales >> (8 * step + 2 * q) & 3;
    const float s = half_to_float((u16)r.all.d) * (float)((int)(low | high << 4) - 32);
    return make_float2(s, -4.f * s);
  }
};
template <int TYPE> struct SixBits : Wholes<TYPE> {
  using W = Wholes<TYPE>;
  static constexpr bool FIVE = TYPE == Q5_K;
  struct Raw { uint4 q[2], fifth[2], header; float2 a, b; };  // a, b: scale and offset of the first 32 columns, of the last
  static DEVICE void load(Raw& r, const At& at, int step) {
    if (step == 0) r.header = load128(W::template field<0>(at));
    if (step < 2) r.q[step] = load128(W::template field<1 + FIVE>(at) + 32 * at.q + 16 * step);
    if (FIVE && step < 2) r.fifth[step] = load128(W::template field<1>(at) + 16 * step);
  }
  static DEVICE void begin(Raw& r, int q) {
    six_bit_scales(r.a, r.b, r.header, q);
  }
  static DEVICE uint4 bytes(const Raw& r, int q, int step) {
    const uint4 bits = r.q[step % 2] >> (4 * (step / 2)) & NIBBLES;
    return FIVE ? bits | (r.fifth[step % 2] >> (2 * q + step / 2) & ONES) << 4 : bits;
  }
  static DEVICE float reach(const Raw& r) { return 64.f * reach_of(r.header.x); }
  static DEVICE float2 weigh(const Raw& r, int, int step) { return step < 2 ? r.a : r.b; }
};
template <> struct Weights<Q4_K> : SixBits<Q4_K> {};
template <> struct Weights<Q5_K> : SixBits<Q5_K> {};
template <> struct Weights<Q6_K> : Wholes<Q6_K> {
  struct Common { u32 scales, d; };
  struct Raw { uint4 low[2], high[2]; Common all, coming; };
  static DEVICE void load(Raw& r, const At& at, int step) {
    const int half = at.q >> 1;
    r.low[step % 2] = load128(field<0>(at) + 64 * half + 16 * step);
    r.high[step % 2] = load128(field<1>(at) + 32 * half + 16 * (step % 2));
    if (step == 0) r.coming = {load32(field<2>(at) + 4 * at.q), *(const u16*)field<3>(at)};
  }
  static DEVICE void begin(Raw& r, int) { r.all = r.coming; }
  static DEVICE uint4 bytes(const Raw& r, int q, int step) {
    const uint4 high = r.high[step % 2] >> (4 * (q & 1) + 2 * (step / 2)) & TWOS;
    return (r.low[step % 2] >> (4 * (q & 1)) & NIBBLES) | high << 4;
  }
  static DEVICE float reach(const Raw& r) { return 128.f * reach_of(r.all.d); }
  static DEVICE float2 weigh(const Raw& r, int, int step) {
    const float s = half_to_float((u16)r.all.d) * (float)(signed char)(r.all.scales >> (8 * step));
    return make_float2(s, -32.f * s);
  }
};

// Unquantised: planes of 16 bytes, 32 columns a block.
template <int TYPE> struct HalfWords : Eighths<TYPE> {
  using E = Eighths<TYPE>;
  struct Raw { uint4 of[2][2]; };
  static DEVICE void load(Raw& r, const At& at, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      r.of[step % 2][i] = E::exists(at, step) ? load128(E::plane(at, step, 2 * (step % 2) + i)) : make_uint4(0, 0, 0, 0);
  }
  static DEVICE void unpack(Operand& o, Raw& r, int, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 w = r.of[step % 2][i];
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
template <> struct Weights<F32> : Eighths<F32> {
  struct Raw { float4 of[2][4]; };
  static DEVICE void load(Raw& r, const At& at, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r.of[step % 2][i] = exists(at, step) ? *(const float4*)plane(at, step, 4 * (step % 2) + i) : make_float4(0.f, 0.f, 0.f, 0.f);
  }
  static DEVICE void unpack(Operand& o, Raw& r, int, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = r.of[step % 2][i];
      o.w[i][0] = pack_brain2(v.x, v.y);
      o.w[i][1] = pack_brain2(v.z, v.w);
    }
  }
};

template <int TYPE> DEVICE void unpack_brain(Operand& o, typename Weights<TYPE>::Raw& raw, int q, int step) {
  using W = Weights<TYPE>;
  if constexpr (is_float_type(TYPE)) {
    W::unpack(o, raw, q, step);
  } else {
    if (step == 0) W::begin(raw, q);
    to_brain16<W::SIGNED>(o, W::bytes(raw, q, step), W::weigh(raw, q, step));
  }
}
