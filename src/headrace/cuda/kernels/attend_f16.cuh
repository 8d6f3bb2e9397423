// attend.cuh's products with a cache in f16, of 32 positions.
#pragma once
#include "kv_cache.cuh"

#ifndef KEYS_AHEAD
#define KEYS_AHEAD (CACHE_DIM > 128 ? 2 : 8)  // the accumulators of 256 dims leave few registers
#endif

// Where a warp's lane reads 32 positions: position key_position(tile) is column n = lane / 4 of a tile. Then the lane's
// probabilities are those of positions 8 quad … 8 quad + 7, which is how it reads the values.
DEVICE int key_position(int tile) { const int n = lane_now() >> 2; return 8 * (n >> 1) + 2 * tile + (n & 1); }

// q·k of position base + 8 quad + 2 tile + e to score[tile][e], for head `lane / 4`. key(tile, j): of the lane's position
// dims 32 j + 8 quad … + 7.
template <class Key> DEVICE void add_scores(float (&score)[4][2], const uint4* q, Key&& key) {
  const int lane = lane_now();
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    float sums[4] = {};
#pragma unroll(KEYS_AHEAD)
    for (int j = 0; j < CACHE_DIM / 32; ++j) {
      const uint4 k = key(tile, j);
      mma_f16(sums, q[2 * j * 32 + lane], k.x, k.y);
      mma_f16(sums, q[(2 * j + 1) * 32 + lane], k.z, k.w);
    }
    score[tile][0] += sums[0] + sums[2];
    score[tile][1] += sums[1] + sums[3];
  }
}

// Σ p v to the accumulator; p as the scores were, of which the first `count` of a lane's eight exist. value(d): the lane's
// eight positions of dim 8d + lane / 4.
template <class Value> DEVICE void add_values(float (&accumulator)[CACHE_DIM / 16][4], const float (&p)[4][2], Value&& value, int count) {
  uint2 high[2], low[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    split_halves(p[2 * i][0], p[2 * i][1], high[i].x, low[i].x);
    split_halves(p[2 * i + 1][0], p[2 * i + 1][1], high[i].y, low[i].y);
  }
  uint4 exist = make_uint4(~0u, ~0u, ~0u, ~0u);
  clear_beyond(exist, count);
  auto existing = [&](int d) {
    const uint4 v = value(d);
    return make_uint4(v.x & exist.x, v.y & exist.y, v.z & exist.z, v.w & exist.w);
  };
#pragma unroll
  for (int d = 0; d < CACHE_DIM / 16; ++d) {
    const uint4 v = existing(2 * d), v8 = existing(2 * d + 1);
    add_products(accumulator[d], make_uint2(v.x, v.y), make_uint2(v8.x, v8.y), high[0], low[0]);
    add_products(accumulator[d], make_uint2(v.z, v.w), make_uint2(v8.z, v8.w), high[1], low[1]);
  }
}

// A warp's keys of 32 positions, on their way while other things go on; heads of more than 128 dims leave no registers for it.
struct Keys {
  static constexpr bool HELD = CACHE_DIM <= 128;
  uint4 at[4][HELD ? CACHE_DIM / 32 : 1];
  DEVICE void load(const Cache& cache, u64 page, int head, int base) {
    if (!HELD) return;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
      for (int j = 0; j < CACHE_DIM / 32; ++j) at[tile][HELD ? j : 0] = load_fresh(place(cache, page, head, base, tile) + 4 * j);
  }
  static DEVICE const uint4* place(const Cache& cache, u64 page, int head, int base, int tile) {
    return (const uint4*)cache.key(page, head, base + key_position(tile)) + (lane_now() & 3);
  }
};

// Positions base … base + 31 of a page, straight from memory; then come those from next_base on, if below `end`.
struct InMemory {
  const Cache& cache;
  Keys& keys;
  u64 page, next_page;
  int head, base, next_base, end;
  DEVICE void scores(float (&score)[4][2], const uint4* q) const {
    add_scores(score, q, [&](int tile, int j) {
      return Keys::HELD ? keys.at[tile][Keys::HELD ? j : 0] : load_fresh(Keys::place(cache, page, head, base, tile) + 4 * j);
    });
    if (next_base < end) keys.load(cache, next_page, head, next_base);
  }
  DEVICE void values(float (&accumulator)[CACHE_DIM / 16][4], const float (&p)[4][2], int count) const {
    const u16* at = cache.value(page, head, (threadIdx.x & 31) >> 2) + base % PAGE_SIZE + 8 * (threadIdx.x & 3);
    add_values(accumulator, p, [&](int d) { return load_fresh((const uint4*)(at + 8 * d * PAGE_SIZE)); }, count);
  }
};
