// prompt_attend.cu by mma.sync: each warp on its own, 32 positions at a time.
#pragma once
#include "kv_cache.cuh"

constexpr int MT = CACHE_DIM <= 128 ? 2 : 1, FRAGMENTS = CACHE_DIM / 16, STEP = 32, BLOCKS = 1;
constexpr int KEY_BYTES = STEP * CACHE_DIM * (int)sizeof(Cached), STAGE_SCALES = CACHE_Q8 ? SCALE_GROUPS * STEP : 0;
constexpr int STAGE_BYTES = 2 * KEY_BYTES + 4 * STAGE_SCALES, RING_BYTES = STAGES * STAGE_BYTES, Q_BYTES = WARPS * MT * FRAGMENTS * 512;
constexpr int PIECE = 16 / (int)sizeof(Cached);  // values in 16 bytes

// Where 16 bytes of keys lie in a stage: lanes that read together, of two or four neighbouring lines, meet no bank twice.
DEVICE int key_piece(int position, int i) {
  const int swizzle = !CACHE_Q8 ? (position & 1) << 2 : CACHE_DIM % 128 == 0 ? (position & 1) << 1 | (position >> 3 & 1) << 2 : (position >> 3 & 1) << 1;
  return position * (CACHE_DIM / PIECE) + (CACHE_DIM % 64 == 0 ? i ^ swizzle : i);
}

// Positions base … base + 31 of a slot: keys, values, and the scales of both.
DEVICE void request(const Cache& cache, u8* stage, int slot, int head, int base) {
#if ARCH >= 80
  const u64 page = cache.page(slot, base);
  const Cached* keys = cache.key(page, head, base);
  for (int i = threadIdx.x; i < KEY_BYTES / 16; i += WARPS * 32) {
    copy_async16(stage + key_piece(i / (CACHE_DIM / PIECE), i % (CACHE_DIM / PIECE)) * 16, keys + i * PIECE);
    const int dim = i / (STEP / PIECE), piece = i % (STEP / PIECE);
    copy_async16(stage + KEY_BYTES + i * 16, cache.value(page, head, dim) + base % PAGE_SIZE + piece * PIECE);
  }
#if CACHE_Q8
  for (int i = threadIdx.x; i < 2 * STAGE_SCALES / 8; i += WARPS * 32) {
    const u16* scales = i < STAGE_SCALES / 8 ? cache.key_scales(page, head) : cache.value_scales(page, head);
    const int group = i / (STEP / 8) % SCALE_GROUPS, piece = i % (STEP / 8);
    copy_async16(stage + 2 * KEY_BYTES + i * 16, scales + group * PAGE_SIZE + base % PAGE_SIZE + piece * 8);
  }
#endif
#endif
}

#if CACHE_Q8
// Dims 8i … 8i + 7 of a position's key; positions 8i … 8i + 7 of a dim's value.
DEVICE uint4 key_at(const u8* stage, int position, int i) {
  const u16* scales = (const u16*)(stage + 2 * KEY_BYTES);
  return dequantise(*(const uint2*)(stage + key_piece(position, i >> 1) * 16 + (i & 1) * 8), scales[i / 4 * STEP + position]);
}
DEVICE uint4 value_at(const u8* stage, int dim, int i) {
  const u16* scales = (const u16*)(stage + 2 * KEY_BYTES) + STAGE_SCALES + dim / CACHE_GROUP * STEP;
  return dequantise(*(const uint2*)(stage + KEY_BYTES + dim * STEP + i * 8), *((const uint4*)scales + i));
}
#else
DEVICE uint4 key_at(const u8* stage, int position, int i) { return *(const uint4*)(stage + key_piece(position, i) * 16); }
DEVICE uint4 value_at(const u8* stage, int dim, int i) { return *(const uint4*)(stage + KEY_BYTES + (dim * (STEP / 8) + i) * 16); }
#endif

struct Warp {  // its rows line and line + 8 of each of MT sixteens
  float accumulator[MT][CACHE_DIM / 8][4] = {};
  float largest[MT][2], sum[MT][2] = {};

  DEVICE Warp() {
#pragma unroll
    for (int m = 0; m < MT; ++m) largest[m][0] = largest[m][1] = -INFINITY;
  }

  // The keys and values of positions base … base + 31, of which those from `end` on may be anything.
  DEVICE void step(const uint4* q, const u8* stage, int base, int end, const Span (&spans)[MT][2]) {
    const int lane = threadIdx.x & 31, line = lane >> 2, quad = lane & 3;
    float score[MT][4][4] = {};
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      // Column n of a tile is position 8 (n / 2) + 2 tile + n % 2, as in attend.cu.
      const int position = 8 * (line >> 1) + 2 * tile + (line & 1);
#pragma unroll
      for (int j = 0; j < CACHE_DIM / 32; ++j) {
        const uint4 k = key_at(stage, position, 4 * j + quad);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_f16(score[m][tile], q[(m * FRAGMENTS + 2 * j) * 32 + lane], k.x, k.y);
          mma_f16(score[m][tile], q[(m * FRAGMENTS + 2 * j + 1) * 32 + lane], k.z, k.w);
        }
      }
    }
    uint4 weights[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      float keep[2], p[4][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Span span = spans[m][half];
        float most = largest[m][half];
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float s = score[m][tile][2 * half + e];
            if constexpr (SOFTCAP > 0.f) s = LOG2_E * SOFTCAP * tanhf(s / SOFTCAP);
            const int position = base + 8 * quad + 2 * tile + e;
            s = position >= span.low && position < span.high ? s : -INFINITY;
            p[tile][2 * half + e] = s;
            most = fmaxf(most, s);
          }
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2));
        const float finite = most == -INFINITY ? 0.f : most;
        keep[half] = exp2_near(largest[m][half] - finite);
        largest[m][half] = most;
        sum[m][half] *= keep[half];
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            p[tile][2 * half + e] = exp2_near(p[tile][2 * half + e] - finite);
            sum[m][half] += p[tile][2 * half + e];
          }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        weights[m][i] = make_uint4(pack_halves(p[2 * i][0], p[2 * i][1]), pack_halves(p[2 * i][2], p[2 * i][3]),
                                   pack_halves(p[2 * i + 1][0], p[2 * i + 1][1]), pack_halves(p[2 * i + 1][2], p[2 * i + 1][3]));
#pragma unroll
      for (int d = 0; d < CACHE_DIM / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) accumulator[m][d][i] *= keep[i >> 1];
    }
    const int ahead = end - base - 8 * quad;  // of the lane's eight positions, how many exist
#pragma unroll
    for (int d = 0; d < CACHE_DIM / 8; ++d) {
      uint4 v = value_at(stage, 8 * d + line, quad);
      if (ahead < 8) clear_beyond(v, ahead);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma_f16(accumulator[m][d], weights[m][0], v.x, v.y);
        mma_f16(accumulator[m][d], weights[m][1], v.z, v.w);
      }
    }
  }

  DEVICE void load_query(const float* q_rows, uint4* queries, int first_row, int token, int rows, int head) {
    const int lane = threadIdx.x & 31, line = lane >> 2, quad = lane & 3;
    uint4* const q = queries + threadIdx.x / 32 * MT * FRAGMENTS * 32;
#pragma unroll 4
    for (int i = 0; i < MT * FRAGMENTS; ++i) {
      const int fragment = i % FRAGMENTS, dim = 32 * (fragment >> 1) + 8 * quad + 4 * (fragment & 1);
      float4 v[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = token + i / FRAGMENTS * 16 + half * 8 + line;
        v[half] = row < rows && dim < HEAD_DIM
                      ? load_fresh((const float4*)(q_rows + ((u64)(first_row + row) * HEADS + head) * HEAD_DIM + dim))
                      : make_float4(0.f, 0.f, 0.f, 0.f);
      }
      q[i * 32 + lane] = make_uint4(pack_halves(v[0].x * SCALED, v[0].y * SCALED), pack_halves(v[1].x * SCALED, v[1].y * SCALED),
                                    pack_halves(v[0].z * SCALED, v[0].w * SCALED), pack_halves(v[1].z * SCALED, v[1].w * SCALED));
    }
  }
  // Positions start … high - 1 of a slot.
  DEVICE void attend(const Cache& cache, u8* stages, const uint4* queries, int slot, int kv_head, int start, int high, const Span (&spans)[MT][2]) {
    const uint4* const q = queries + threadIdx.x / 32 * MT * FRAGMENTS * 32;
    const int steps = (high - start + STEP - 1) / STEP;
    int low = high, end = 0;  // of what the warp's rows see
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (spans[m][half].high > 0) low = min(low, spans[m][half].low), end = max(end, spans[m][half].high);
#pragma unroll
    for (int step = 16; step; step >>= 1) {
      low = min(low, shuffle_xor(low, step));
      end = max(end, shuffle_xor(end, step));
    }
    auto request_step = [&](int s) {
      if (s < steps) request(cache, stages + s % STAGES * STAGE_BYTES, slot, kv_head, start + s * STEP);
      copy_commit();
    };
    for (int s = 0; s < STAGES - 1; ++s) request_step(s);
    for (int s = 0; s < steps; ++s) {
      copy_wait<STAGES - 2>();
      sync_block();
      request_step(s + STAGES - 1);
      const int base = start + s * STEP;
      if (base < end && base + STEP > low) step(q, stages + s % STAGES * STAGE_BYTES, base, high, spans);
    }
  }
};
