// attend.cuh's products with a cache in Q8_0: as attend_f16.cuh. The quants are exact as f16; scales, which differ from
// position to position, meet the sums of their 32 dims of a key, and the probabilities of their 32 dims of a value.
#pragma once
#include "kv_cache.cuh"

// The scales of a group of dims at the lane's eight positions, and where the first group's are.
DEVICE const uint4* scales_from(const u16* scales, int base) {
  return (const uint4*)(scales + base % PAGE_SIZE) + (threadIdx.x & 3);
}
DEVICE uint4 load_scales(const uint4* scales, int group) { return load_fresh(scales + group * (PAGE_SIZE / 8)); }
DEVICE float scale_at(const uint4& scales, int i) {
  const u32* words = &scales.x;
  return half_to_float((u16)(words[i >> 1] >> (16 * (i & 1))));
}

struct Held {  // nothing is
  static constexpr bool IS = false;
  DEVICE void load(const Cache&, u64, int, int) {}
};

// Positions base … base + 31 of a page, straight from memory.
struct InMemory {
  const Cache& cache;
  Held& held;
  u32 page, next_page;
  int head, base, next_base, end;

  DEVICE void scores(float (&score)[4][2], const uint4* q) const {
    const int lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;
#pragma unroll(CACHE_DIM > 128 ? 1 : 4)  // the accumulators of 256 dims leave few registers
    for (int group = 0; group < SCALE_GROUPS; ++group) {
      const uint4 scales = load_scales(scales_from(cache.key_scales(page, head), base), group);
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const u8* key = cache.key(page, head, base + 8 * (row >> 1) + 2 * tile + (row & 1)) + group * CACHE_GROUP;
        const uint2 k = load_fresh((const uint2*)key + quad), a = quants_to_halves(k.x), b = quants_to_halves(k.y);
        float sums[4] = {};
        mma_f16(sums, q[2 * group * 32 + lane], a.x, a.y);
        mma_f16(sums, q[(2 * group + 1) * 32 + lane], b.x, b.y);
#pragma unroll
        for (int e = 0; e < 2; ++e) score[tile][e] = fmaf(sums[e] + sums[e + 2], scale_at(scales, 2 * tile + e), score[tile][e]);
      }
    }
  }

  DEVICE void values(float (&accumulator)[CACHE_DIM / 16][4], const float (&p)[4][2], int count) const {
    const u8* at = cache.value(page, head, (threadIdx.x & 31) >> 2) + base % PAGE_SIZE + 8 * (threadIdx.x & 3);
    const uint4* all_scales = scales_from(cache.value_scales(page, head), base);
#pragma unroll
    for (int group = 0; group < SCALE_GROUPS; ++group) {
      uint4 scales = load_scales(all_scales, group);
      if (count < 8) clear_beyond(scales, count);
      // Times 64, and the quants divided by it: p times a small scale would be no normal f16.
      auto weight = [&](int i) { return p[i >> 1][i & 1] * 64.f * scale_at(scales, i); };
      uint2 high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        split_halves(weight(4 * i), weight(4 * i + 1), high[i].x, low[i].x);
        split_halves(weight(4 * i + 2), weight(4 * i + 3), high[i].y, low[i].y);
      }
#pragma unroll
      for (int d = 2 * group; d < 2 * group + 2; ++d) {
        const uint2 v = load_fresh((const uint2*)(at + 16 * d * PAGE_SIZE)), v8 = load_fresh((const uint2*)(at + (16 * d + 8) * PAGE_SIZE));
        add_products(accumulator[d], quants_to_halves<true>(v.x), quants_to_halves<true>(v8.x), high[0], low[0]);
        add_products(accumulator[d], quants_to_halves<true>(v.y), quants_to_halves<true>(v8.y), high[1], low[1]);
      }
    }
  }
};
