// Activations as int8: groups of 8 values share a scale d; x ≈ d × q.
//
// Sixteen columns are stored together: their int8, the two scales as bfloat16 (the quants are rounded
// with the scale as it is stored, so nothing is lost), and Σ d q, what a block's minimum multiplies. (Not
// Σx: the rounding errors of Σ q_w q_x and Σ q_x then cancel where a weight is scale × q_w − min, and the
// error of the dot goes with the weight, not with its quants.)
//
// For tensor cores (BRAIN) they are bfloat16 instead, in tiles of 64 rows × 64 columns of 8 KB: a row's 128 bytes
// together, of which piece i of 16 bytes lies at i ^ (row % 8). That is how wgmma reads shared memory (its
// 128-byte swizzle), and eight rows' same pieces meet no bank twice. Of 256 columns, tile s of the four has of every
// 64 the columns 16s … 16s + 15, and piece i of it two of each sixteen: so the four lanes that share a row of an
// mma's operands have sixteen neighbours each, which is how weights lie in their blocks (fragments.cuh).
//
// Groups are stored where neighbouring lanes, eight that read quants or sixteen that read scales, meet no bank twice:
// whether each reads every fourth group, or four read every other one of eight and so on (Block<TYPE>::group).
#pragma once
#include "primitives.cuh"

#ifndef BRAIN
#define BRAIN 0
#endif

constexpr int GROUP = 16;  // columns that are stored together: two scales
DEVICE constexpr int padded(int k) { return (k + 1023) / 1024 * 1024; }  // slots permute within 1,024 columns

constexpr int BRAIN_TILE = 64 * 64;  // values
DEVICE constexpr int brain_tiles(int k) { return (k + 255) / 256 * 4; }  // of 64 rows; columns beyond k are zero

DEVICE int quant_slot(int g) { return (g & ~31) | (g & 6) << 2 | (g >> 2 & 6) | ((g >> 2 ^ g) & 1); }    // units of 16 bytes
DEVICE int scale_slot(int g) { return (g & ~63) | (g & 6) << 3 | (g >> 2 & 14) | ((g >> 2 ^ g) & 1); }   // units of 8 bytes

// One row of activations, or the place for one; any pointer may be null where nobody reads it.
struct Row {
  float* values;    // [k]
  int4* quants;     // [padded(k) / 16]
  uint2* scales;    // [padded(k) / 16]: (two bfloat16, Σ d q)
  float* squares;   // [k / 16]: Σ values² of each group, for the reader's RMS norm
  u16* brain;       // its 64 values in the first tile
  int line;         // within the tile
  DEVICE u16* brain_at(int column) const {
    return piece(column, column >> 1 & 7) + ((column >> 5 & 6) | (column & 1));
  }
  DEVICE u16* piece(int column, int i) const {  // of the tile where it lies
    return brain + (column / 256 * 4 + (column >> 4 & 3)) * BRAIN_TILE + (i ^ (line & 7)) * 8;
  }
};

DEVICE float low_scale(uint2 s) { return bits_to_float(s.x << 16); }
DEVICE float high_scale(uint2 s) { return bits_to_float(s.x & 0xffff0000u); }
DEVICE float group_sum(uint2 s) { return bits_to_float(s.y); }

DEVICE u32 float_to_brain(float f) {  // the nearest; f is finite
  const u32 bits = float_to_bits(f);
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

// 16 / N neighbouring lanes hold one group, N (one or two) neighbouring values each: stores value × gain as the reader wants
// it, and the sum of the values' squares. Every lane of the warp must call; `live` lanes store.
template <int N> DEVICE void store_group(const Row& row, int column, const float (&value)[N], const float (&gain)[N], bool live) {
  float v[N], squares[N], largest = 0.f;
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = value[n] * gain[n], squares[n] = value[n] * value[n], largest = fmaxf(largest, fabsf(v[n]));
#pragma unroll
  for (int step = 4 / N; step; step >>= 1) {
    if (!BRAIN) largest = fmaxf(largest, shuffle_xor(largest, step));
#pragma unroll
    for (int n = 0; n < N; ++n) squares[n] += shuffle_xor(squares[n], step);
  }
  if (N == 2) squares[0] += squares[N - 1];
  squares[0] += shuffle_xor(squares[0], 8 / N);
  const int group = column / GROUP, i = column % GROUP;
  if (BRAIN) {
    if (!live) return;
#pragma unroll
    for (int n = 0; n < N; ++n) *row.brain_at(column + n) = (u16)float_to_brain(v[n]);
    if (row.squares && i == 0) row.squares[group] = squares[0];
    return;
  }
  const u32 scale = float_to_brain(largest * (1.f / 127.f));
  const float d = bits_to_float(scale << 16), inverse = divide_near(1.f, d);
  struct alignas(N) { signed char q[N]; } out;
  int sum = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int q = d > 1e-36f ? __float2int_rn(v[n] * inverse) : 0;  // smaller ones count as 0: 1 / d must be finite
    out.q[n] = (signed char)q;
    sum += q;
  }
#pragma unroll
  for (int step = 4 / N; step; step >>= 1) sum += shuffle_xor(sum, step);
  float total = d * (float)sum;
  total += shuffle_xor(total, 8 / N);
  const u32 other = shuffle_xor(scale, 8 / N);
  if (!live) return;
  *(decltype(out)*)((signed char*)(row.quants + quant_slot(group)) + i) = out;
  if (i == 0) {
    row.scales[scale_slot(group)] = make_uint2(scale | other << 16, float_to_bits(total));
    if (row.squares) row.squares[group] = squares[0];
  }
}
DEVICE void store_group(const Row& row, int column, float value, float gain, bool live) {
  store_group<1>(row, column, {value}, {gain}, live);
}

// Rows of activations in device memory, from row `first` on: row t of each array but brain is `t × its width`
// further on.
struct Rows {
  float* values;
  int4* quants;
  uint2* scales;
  float* squares;
  u16* brain;
  int first;
  template <int WIDTH> DEVICE Row row(int t) const {
    t += first;
    return {values ? values + (u64)t * WIDTH : nullptr, quants + (u64)t * (padded(WIDTH) / GROUP),
            scales + (u64)t * (padded(WIDTH) / GROUP), squares ? squares + (u64)t * (WIDTH / GROUP) : nullptr,
            brain + (u64)(t / 64) * (brain_tiles(WIDTH) * BRAIN_TILE) + t % 64 * 64, t % 64};
  }
};
