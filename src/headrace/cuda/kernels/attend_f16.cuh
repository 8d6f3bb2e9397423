// attend.cuh's products with a cache in f16, of 32 positions.
#pragma once
#include "kv_cache.cuh"

#ifndef KEYS_AHEAD
#define KEYS_AHEAD (CACHE_DIM > 128 ? 2 : 8)  // the accumulators of 256 dims leave few registers
#endif
constexpr int SCORES_AT_ONCE = KEYS_AHEAD > 2 ? 4 : 1;  // tiles that share a read of q

// Where a warp's lane reads 32 positions: position key_position(tile) is column n = lane / 4 of a tile. Then the lane's
// probabilities are those of positions 8 quad … 8 quad + 7, which is how it reads the values.
constexpr int NEXT_KEYS = 2 * CACHE_DIM / 8;  // from tile to tile, in units of 16 bytes
DEVICE int key_position(int tile) { const int n = lane_now() >> 2; return 8 * (n >> 1) + 2 * tile + (n & 1); }

// q·k of position base + 8 quad + 2 tile + e to score[tile][e], for head `lane / 4`. key(tile, j): of the lane's position
// dims 32 j + 8 quad … + 7.
template <class Key> DEVICE void add_scores(float (&score)[4][2], const uint4* q, Key&& key) {
  const int lane = lane_now();
#pragma unroll
  for (int tile = 0; tile < 4; tile += SCORES_AT_ONCE) {
    float sums[SCORES_AT_ONCE][4] = {};
#pragma unroll(KEYS_AHEAD)
    for (int j = 0; j < CACHE_DIM / 32; ++j) {
      const uint4 q0 = q[2 * j * 32 + lane], q1 = q[(2 * j + 1) * 32 + lane];
#pragma unroll
      for (int i = 0; i < SCORES_AT_ONCE; ++i) {
        const uint4 k = key(tile + i, j);
        mma_f16(sums[i], q0, k.x, k.y);
        mma_f16(sums[i], q1, k.z, k.w);
      }
    }
#pragma unroll
    for (int i = 0; i < SCORES_AT_ONCE; ++i) {
      score[tile + i][0] += sums[i][0] + sums[i][2];
      score[tile + i][1] += sums[i][1] + sums[i][3];
    }
  }
}

// Of a lane's eight positions only the first `count` exist.
struct Existing {
  uint4 bits = make_uint4(~0u, ~0u, ~0u, ~0u);
  DEVICE explicit Existing(int count) { clear_beyond(bits, count); }
  DEVICE uint4 of(const uint4& v) const { return make_uint4(v.x & bits.x, v.y & bits.y, v.z & bits.z, v.w & bits.w); }
};

// Σ p v to the accumulator; p as the scores were. value(d): the lane's eight positions of dim 8d + lane / 4.
template <class Value> DEVICE void add_values(float (&accumulator)[CACHE_DIM / 16][4], const float (&p)[4][2], Value&& value) {
  uint2 high[2], low[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    split_halves(p[2 * i][0], p[2 * i][1], high[i].x, low[i].x);
    split_halves(p[2 * i + 1][0], p[2 * i + 1][1], high[i].y, low[i].y);
  }
#pragma unroll
  for (int d = 0; d < CACHE_DIM / 16; ++d) {
    const uint4 v = value(2 * d), v8 = value(2 * d + 1);
    add_products(accumulator[d], make_uint2(v.x, v.y), make_uint2(v8.x, v8.y), high[0], low[0]);
    add_products(accumulator[d], make_uint2(v.z, v.w), make_uint2(v8.z, v8.w), high[1], low[1]);
  }
}

// A warp's keys and values of 32 positions, on their way while other things go on; heads of more than 128 dims leave no
// registers for it.
struct Held {
  static constexpr bool IS = CACHE_DIM <= 128;
  uint4 keys[4][IS ? CACHE_DIM / 32 : 1], values[IS ? CACHE_DIM / 8 : 1];
  DEVICE void load_keys(const Cache& cache, u64 page, int head, int base) {
    if (!IS) return;
    const uint4* const first = key(cache, page, head, base);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
      for (int j = 0; j < CACHE_DIM / 32; ++j) keys[tile][IS ? j : 0] = load_fresh(first + tile * NEXT_KEYS + 4 * j);
  }
  DEVICE void load_values(const Cache& cache, u64 page, int head, int base) {
    if (!IS) return;
    const uint4* const first = value(cache, page, head, base);
#pragma unroll
    for (int d = 0; d < CACHE_DIM / 8; ++d) values[IS ? d : 0] = load_fresh(first + d * PAGE_SIZE);
  }
  DEVICE void load(const Cache& cache, u64 page, int head, int base) {
    load_keys(cache, page, head, base);
    load_values(cache, page, head, base);
  }
  static DEVICE const uint4* key(const Cache& cache, u64 page, int head, int base) {
    return (const uint4*)cache.key(page, head, base + key_position(0)) + (lane_now() & 3);
  }
  static DEVICE const uint4* value(const Cache& cache, u64 page, int head, int base) {  // 8 dims further on: a page's width
    return (const uint4*)(cache.value(page, head, lane_now() >> 2) + base % PAGE_SIZE) + (lane_now() & 3);
  }
};

// Positions base … base + 31 of a page, straight from memory; then come those from next_base on, if below `end`.
struct InMemory {
  const Cache& cache;
  Held& held;
  u32 page, next_page;
  int head, base, next_base, end;
  DEVICE void scores(float (&score)[4][2], const uint4* q) const {
    add_scores(score, q, [&](int tile, int j) {
      return Held::IS ? held.keys[tile][Held::IS ? j : 0] : load_fresh(Held::key(cache, page, head, base) + tile * NEXT_KEYS + 4 * j);
    });
    if (next_base < end) held.load_keys(cache, next_page, head, next_base);
  }
  DEVICE void values(float (&accumulator)[CACHE_DIM / 16][4], const float (&p)[4][2], int count) const {
    if constexpr (Held::IS) {
      if (base + STEP > end) {
        const Existing existing(count);
#pragma unroll
        for (int d = 0; d < CACHE_DIM / 8; ++d) held.values[d] = existing.of(held.values[d]);
      }
      add_values(accumulator, p, [&](int d) { return held.values[d]; });
      if (next_base < end) held.load_values(cache, next_page, head, next_base);
    } else {
      const uint4* const first = Held::value(cache, page, head, base);
      const Existing existing(count);
      add_values(accumulator, p, [&](int d) { return existing.of(load_fresh(first + d * PAGE_SIZE)); });
    }
  }
};
