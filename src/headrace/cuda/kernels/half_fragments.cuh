// Weights of fragments.cuh as half precision instead, and activations with them: what skinny.cu multiplies.
//
// A byte becomes a half without a conversion: as its low bits it is a subnormal number, and stands for 2^-24 as much.
// One multiplication and addition for two weights then makes scale × byte + offset, rounded once. Half precision has
// eight times bfloat16's precision and little of its range, so each row of 256 weights, and each of activations, is
// brought to a known size first, by a power of two, which the sums are multiplied by afterwards.
#pragma once
#include "fragments.cuh"

// Scale and offset of a lane's four steps, each twice in a word, and what one of such weights stands for.
struct HalfScales { u32 scale[4], offset[4]; float unit; };

constexpr u32 EXPONENT = 1u << 23;  // one more: twice as much

// Of the row of the quad's lanes. Scales come to lie below 2^15, for bytes of 2^-24; an offset may be far larger.
template <int TYPE> DEVICE void half_scales(HalfScales& s, const typename Weights<TYPE>::Raw& raw, int quad) {
  using W = Weights<TYPE>;
  // 2^100 times less than one counts as no less: its reciprocal is a number.
  const u32 power = larger((int)(float_to_bits(W::reach(raw)) & 0x7f800000u), 27 * EXPONENT);
  const float up = bits_to_float((254 + 14) * EXPONENT - power), offset_up = up * (1.f / (1 << 24));
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    float2 w = W::weigh(raw, quad, step);
    if (W::SIGNED) w.y -= 128.f * w.x;
    s.scale[step] = pack_halves(w.x * up, w.x * up);
    s.offset[step] = pack_halves(w.y * offset_up, w.y * offset_up);
  }
  s.unit = bits_to_float(power + (24 - 14) * EXPONENT);
}

template <int TYPE> DEVICE void unpack_halves(Operand& o, const typename Weights<TYPE>::Raw& raw, const HalfScales& s, int quad, int step) {
  using W = Weights<TYPE>;
  const uint4 bytes = W::bytes(raw, quad, step);
  const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const u32 word = W::SIGNED ? words[g] ^ 0x80808080u : words[g];
    o.w[g][0] = half2_fma(pick_bytes(word, 0u, 0x4140u), s.scale[step], s.offset[step]);
    o.w[g][1] = half2_fma(pick_bytes(word, 0u, 0x4342u), s.scale[step], s.offset[step]);
  }
}

// A lane's part of 256 columns of eight rows of x, as the mma's other operand: w[step][g] like an Operand's, of row
// lane / 4; and what one of the results of rows 2 quad and 2 quad + 1 stands for.
struct HalfColumns { u32 w[4][4][2]; float unit[2]; };

// Brings bfloat16 in w to half precision, the largest of a row at 2^9 to 2^10.
DEVICE void to_halves(HalfColumns& x) {
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) largest = brain2_max(largest, x.w[i >> 3][i >> 1 & 3][i & 1] & 0x7fff7fffu);
  largest = larger(largest >> 16, largest & 0xffffu);
  largest = larger(largest, shuffle_xor(largest, 1));
  largest = larger(largest, shuffle_xor(largest, 2));
  const u32 power = larger(largest >> 7, 10), up = ((254 + 9) - power) << 7;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    u32& w = x.w[i >> 3][i >> 1 & 3][i & 1];
    const u32 scaled = brain2_mul(w, up | up << 16);
    w = pack_halves(bits_to_float(scaled << 16), bits_to_float(scaled & 0xffff0000u));
  }
  const float unit = bits_to_float((power - 9) * EXPONENT);
  const int quad = threadIdx.x & 3;
  x.unit[0] = shuffle(unit, 8 * quad);
  x.unit[1] = shuffle(unit, 8 * quad + 4);
}
