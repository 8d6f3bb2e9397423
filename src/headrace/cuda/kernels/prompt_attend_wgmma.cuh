// Hopper's way of prompt_attend.cu, for heads of 64 or 128: a warp has sixteen rows of a query head, four warps
// multiply together, 64 positions (a page) at a time. While a step's probabilities are worked out, the products of
// the last step's and its values run, and whatever the other four warps have begun.
#pragma once
#include "wgmma.cuh"

constexpr int MT = 1, STEP = PAGE_SIZE, HALF_TILE = 64 * 128;  // bytes of 64 rows of 64
constexpr int KEY_BYTES = STEP * CACHE_DIM * 2, STAGE_BYTES = 2 * KEY_BYTES, Q_BYTES = 0, AHEAD = STAGES - 1;
constexpr int BLOCKS = CACHE_DIM == 64 && !CACHE_Q8 ? 2 : 1;  // of a multiprocessor; unpacking takes registers

// Keys lie as tiles of 64 positions × 64 dims, values as one of dims × 64 positions: as wgmma wants them. Where eight
// dims of a position go, and eight positions of a dim:
DEVICE u8* key_place(u8* stage, int position, int i) { return stage + i / 8 * HALF_TILE + position * 128 + ((i ^ position) & 7) * 16; }
DEVICE u8* value_place(u8* stage, int dim, int i) { return stage + KEY_BYTES + dim * 128 + ((i ^ dim) & 7) * 16; }

#if CACHE_Q8
// Pages come as they are, and become f16 a step before they are needed, while products run.
constexpr int EARLY = 1, READY = 3, PAGE_BYTES = 2 * HEAD_BYTES, RING_BYTES = READY * STAGE_BYTES + STAGES * PAGE_BYTES;
DEVICE u8* landing(u8* stages, int s) { return stages + READY * STAGE_BYTES + s % STAGES * PAGE_BYTES; }

DEVICE void request(const Cache& cache, u8* target, int slot, int head, int base, int) {
  const u64 page = cache.page(slot, base);
  const u8 *keys = cache.key(page, head, 0), *values = cache.value(page, head, 0);
  for (int i = threadIdx.x * 16; i < HEAD_BYTES; i += WARPS * 32 * 16) {
    copy_async16(target + i, keys + i);
    copy_async16(target + HEAD_BYTES + i, values + i);
  }
}

DEVICE void unpack(const u8* page, u8* stage, int base, int end) {
  const u16 *key_scales = (const u16*)(page + PAGE_SIZE * CACHE_DIM), *value_scales = key_scales + HEAD_BYTES / 2;
#pragma unroll(CACHE_DIM > 64 ? 2 : 1)
  for (int i = threadIdx.x; i < KEY_BYTES / 16; i += WARPS * 32) {
    const int position = i / (CACHE_DIM / 8), piece = i % (CACHE_DIM / 8), dim = i / 8, part = i % 8;
    *(uint4*)key_place(stage, position, piece) = dequantise(*(const uint2*)(page + i * 8), key_scales[piece / 4 * PAGE_SIZE + position]);
    uint4 v = dequantise(*(const uint2*)(page + HEAD_BYTES + i * 8), *(const uint4*)(value_scales + dim / CACHE_GROUP * PAGE_SIZE + part * 8));
    clear_beyond(v, end - base - 8 * part);
    *(uint4*)value_place(stage, dim, part) = v;
  }
}
#else
constexpr int EARLY = 0, READY = STAGES, RING_BYTES = STAGES * STAGE_BYTES;
DEVICE u8* landing(u8* stages, int s) { return stages + s % STAGES * STAGE_BYTES; }

DEVICE void request(const Cache& cache, u8* stage, int slot, int head, int base, int end) {
  const u64 page = cache.page(slot, base);
  const u16 *keys = cache.key(page, head, base), *values = cache.value(page, head, 0);
  for (int i = threadIdx.x; i < KEY_BYTES / 16; i += WARPS * 32) {
    copy_async16(key_place(stage, i / (CACHE_DIM / 8), i % (CACHE_DIM / 8)), keys + i * 8);
    const int dim = i / 8, part = i % 8, left = end - base - 8 * part;  // what lies beyond may be anything: 0 × NaN
    copy_async16(value_place(stage, dim, part), values + i * 8, 2 * min(8, max(0, left)));
  }
}
DEVICE void unpack(const u8*, u8*, int, int) {}
#endif

struct Scores { float s[STEP / 2]; };
struct Weights { u32 w[STEP / 16][4]; };

struct Warp {  // its rows line and line + 8
  float accumulator[MT][CACHE_DIM / 8][4] = {};
  float largest[MT][2] = {{-INFINITY, -INFINITY}}, sum[MT][2] = {};
  u32 q[CACHE_DIM / 16][4];
  int lowest_high, highest_low;  // positions outside of them some row does not see

  using Accumulator = float[CACHE_DIM / 2];
  DEVICE Accumulator& flat() { return *(Accumulator*)accumulator; }

  DEVICE void load_query(const float* q_rows, uint4*, int first_row, int token, int rows, int head) {
    const int line = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
#pragma unroll
    for (int g = 0; g < CACHE_DIM / 16; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = token + line + 8 * (i & 1), dim = 16 * g + 2 * quad + 8 * (i >> 1);
        const bool live = row < rows && dim < HEAD_DIM;
        const float2 v = live ? load_fresh((const float2*)(q_rows + ((u64)(first_row + row) * HEADS + head) * HEAD_DIM + dim)) : make_float2(0.f, 0.f);
        q[g][i] = pack_halves(v.x * SCALED, v.y * SCALED);
      }
  }
  DEVICE void see(const Span (&spans)[MT][2]) {
    lowest_high = min(spans[0][0].high, spans[0][1].high);
    highest_low = max(spans[0][0].low, spans[0][1].low);
#pragma unroll
    for (int step = 16; step; step >>= 1) {
      lowest_high = min(lowest_high, shuffle_xor(lowest_high, step));
      highest_low = max(highest_low, shuffle_xor(highest_low, step));
    }
  }
  DEVICE void start_scores(Scores& scores, const u8* stage) {
    wgmma_fence();
#pragma unroll
    for (int g = 0; g < CACHE_DIM / 16; ++g)
      wgmma_half<STEP>(scores.s, q[g], wgmma_descriptor(stage + g / 4 * HALF_TILE) + g % 4 * 2, g > 0);
    wgmma_commit();
  }
  DEVICE void start_values(Weights& weights, const u8* stage) {
    wgmma_fence();
    const u64 descriptor = wgmma_descriptor(stage + KEY_BYTES);
#pragma unroll
    for (int g = 0; g < STEP / 16; ++g) wgmma_half<CACHE_DIM>(flat(), weights.w[g], descriptor + g * 2);
    wgmma_commit();
  }
  // Scores of a step become probabilities; keep: what the accumulator is to be multiplied by.
  DEVICE void weigh(Scores& scores, float (&keep)[2], int base, const Span (&spans)[MT][2]) {
    const int quad = threadIdx.x & 3;
    if constexpr (SOFTCAP > 0.f) {
#pragma unroll
      for (int i = 0; i < STEP / 2; ++i) scores.s[i] = LOG2_E * SOFTCAP * tanhf(scores.s[i] / SOFTCAP);
    }
    if (base + STEP > lowest_high || base < highest_low) {  // some row does not see all
#pragma unroll
      for (int i = 0; i < STEP / 2; ++i) {
        const Span span = spans[0][i >> 1 & 1];
        const int position = base + 8 * (i / 4) + 2 * quad + (i & 1);
        scores.s[i] = position >= span.low && position < span.high ? scores.s[i] : -INFINITY;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[0][half];
#pragma unroll
      for (int t = 0; t < STEP / 8; ++t) most = fmaxf(most, fmaxf(scores.s[4 * t + 2 * half], scores.s[4 * t + 2 * half + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      const float finite = most == -INFINITY ? 0.f : most;
      keep[half] = exp2_near(largest[0][half] - finite);
      largest[0][half] = most;
      float total = sum[0][half] * keep[half];
#pragma unroll
      for (int t = 0; t < STEP / 8; ++t) {
        float* s = scores.s + 4 * t + 2 * half;
        s[0] = exp2_near(s[0] - finite), s[1] = exp2_near(s[1] - finite);
        total += s[0] + s[1];
      }
      sum[0][half] = total;
    }
  }

  DEVICE void rescale(const float (&keep)[2]) {
    if (!any_lane(keep[0] != 1.f || keep[1] != 1.f)) return;
#pragma unroll
    for (int i = 0; i < CACHE_DIM / 2; ++i) flat()[i] *= keep[i >> 1 & 1];
  }
  DEVICE static void pack(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int i = 0; i < STEP / 4; ++i) weights.w[i / 4][i % 4] = pack_halves(scores.s[2 * i], scores.s[2 * i + 1]);
  }

  // Positions start … high - 1 of a slot.
  DEVICE void attend(const Cache& cache, u8* stages, const uint4*, int slot, int kv_head, int start, int high, const Span (&spans)[MT][2]) {
    see(spans);
    const int steps = (high - start + STEP - 1) / STEP;
    auto stage_of = [&](int s) { return stages + s % READY * STAGE_BYTES; };
    auto request_step = [&](int s) {
      if (s < steps) request(cache, landing(stages, s), slot, kv_head, start + s * STEP, high);
      copy_commit();
    };
    auto unpack_step = [&](int s) {
      if (s < steps) unpack(landing(stages, s), stage_of(s), start + s * STEP, high);
    };
    auto arrived = [&] {
      fence_for_wgmma();
      sync_block();
    };
    for (int s = 0; s < AHEAD; ++s) request_step(s);
    copy_wait<AHEAD - 1 - EARLY>();
    if (EARLY) {
      sync_block();
      unpack_step(0);
      unpack_step(1);
    }
    arrived();
    Scores scores;
    Weights weights;
    float keep[2];
    start_scores(scores, stage_of(0));
    wgmma_wait();
    pin(scores.s);
    weigh(scores, keep, start, spans);
    pack(weights, scores);
    for (int s = 0; s + 1 < steps; ++s) {
      copy_wait<AHEAD - 2 - EARLY>();  // step s + 1 is here
      arrived();
      request_step(s + AHEAD);
      start_scores(scores, stage_of(s + 1));
      start_values(weights, stage_of(s));
      unpack_step(s + 2);
      wgmma_wait<1>();
      pin(scores.s);
      weigh(scores, keep, start + (s + 1) * STEP, spans);
      wgmma_wait();
      pin(flat());
      rescale(keep);
#pragma unroll
      for (int g = 0; g < STEP / 16; ++g) pin(weights.w[g]);
      pack(weights, scores);
    }
    start_values(weights, stage_of(steps - 1));
    wgmma_wait();
    pin(flat());
  }
};
