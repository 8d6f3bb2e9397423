// Activations as int8: groups of 16 values share a scale d; x ≈ d × q.
//
// With each scale goes d × Σq, what a block's minimum multiplies. (Not Σx: the rounding errors of
// Σ q_w q_x and Σ q_x then cancel where a weight is scale × q_w − min, and the error of the dot goes
// with the weight, not with its quants.)
//
// Groups are stored where eight lanes reading every other, every second or every fourth group of a
// slice, as the block types do, meet no bank twice.
#pragma once
#include "primitives.cuh"

constexpr int GROUP = 16;
DEVICE constexpr int padded(int k) { return (k + 511) / 512 * 512; }  // the swizzles permute within 512 columns

DEVICE int quant_slot(int group) { return group ^ ((group >> 3 & 1) * 7); }   // units of 16 bytes
DEVICE int scale_slot(int group) { return group ^ ((group >> 4 & 1) * 7); }   // units of 8 bytes

// One row of activations, or the place for one; any pointer may be null where nobody reads it.
struct Row {
  float* values;    // [k]
  int4* quants;     // [padded(k) / 16]
  float2* scales;   // [padded(k) / 16]: (d, d Σq)
  float* squares;   // [k / 16]: Σ values² of each group, for the reader's RMS norm
};

// Sixteen neighbouring lanes hold one group, a value each: stores quants of value × gain, and the
// sum of the values' squares. Every lane of the warp must call; `live` lanes store.
DEVICE void store_group(const Row& row, int column, float value, float gain, bool live) {
  const float v = value * gain;
  float largest = fabsf(v), squares = value * value;
#pragma unroll
  for (int step = 8; step; step >>= 1) {
    largest = fmaxf(largest, shuffle_xor(largest, step));
    squares += shuffle_xor(squares, step);
  }
  const int q = largest > 0.f ? __float2int_rn(v * (127.f / largest)) : 0;
  int sum = q;
#pragma unroll
  for (int step = 8; step; step >>= 1) sum += shuffle_xor(sum, step);
  if (!live) return;
  const int group = column / GROUP, i = column % GROUP;
  ((signed char*)(row.quants + quant_slot(group)))[i] = (signed char)q;
  if (i == 0) {
    const float d = largest * (1.f / 127.f);
    row.scales[scale_slot(group)] = make_float2(d, d * (float)sum);
    if (row.squares) row.squares[group] = squares;
  }
}

// Rows of activations in device memory: row t of each array is `t × its width` further on.
struct Rows {
  float* values;
  int4* quants;
  float2* scales;
  float* squares;
  template <int WIDTH> DEVICE Row row(int t) const {
    return {values ? values + (u64)t * WIDTH : nullptr, quants + (u64)t * (padded(WIDTH) / GROUP),
            scales + (u64)t * (padded(WIDTH) / GROUP), squares ? squares + (u64)t * (WIDTH / GROUP) : nullptr};
  }
};
