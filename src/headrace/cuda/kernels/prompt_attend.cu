// Grouped-query attention of a prompt's rows over their slots' caches, on tensor cores: what attend.cu does for
// one row of each slot. A block takes one kv head and TOKENS consecutive rows; a warp takes 16 or 32 of the rows
// for one query head. Keys and values pass through shared memory, 32 positions at a time, once for all of them.
//
// Queries and probabilities are rounded to f16, like the cache; sums are f32. The result is bfloat16.
// Steps begin at multiples of 32, and those a row does not see change nothing of it: a row is bit-equal
// whatever the chunk it comes in.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM (a multiple of 16), SCALE, WINDOW (0: none), SOFTCAP (0: none), HEAD_TILE (query heads
// of a block), WARPS (a multiple of it), STAGES.
#include "activations.cuh"
#include "kv_cache.cuh"

constexpr int GROUP_HEADS = HEADS / KV_HEADS, HEAD_TILES = (GROUP_HEADS + HEAD_TILE - 1) / HEAD_TILE;
constexpr int MT = CACHE_DIM <= 128 ? 2 : 1, FRAGMENTS = CACHE_DIM / 16, STEP = 32;
constexpr int TOKENS = WARPS / HEAD_TILE * MT * 16;
constexpr int KEY_BYTES = STEP * CACHE_DIM * 2, STAGE_BYTES = 2 * KEY_BYTES, Q_BYTES = WARPS * MT * FRAGMENTS * 512;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + Q_BYTES + 2 * TOKENS * 4;
constexpr float LOG2_E = 1.4426950408889634f;

struct PromptAttendArgs {
  const float* q;  // [rows, HEADS × HEAD_DIM], rotated
  Cache cache;
  Rows out;        // [rows, HEADS × HEAD_DIM], bfloat16
  int n_rows;
  STAMPS
};

// Where 16 bytes lie in a stage: lanes of a quarter warp read four pieces of two neighbouring lines.
DEVICE int key_piece(int position, int i) { return position * (CACHE_DIM / 8) + (CACHE_DIM % 64 == 0 ? i ^ (position & 1) << 2 : i); }
DEVICE int value_piece(int dim, int i) { return dim * (STEP / 8) + i; }

// Positions base … base + 31 of a slot, keys and then values.
DEVICE void request(const Cache& cache, u8* stage, int slot, int head, int base) {
#if ARCH >= 80
  const u64 page = cache.page(slot, base);
  const u16* keys = cache.key(page, head, base);
  for (int i = threadIdx.x; i < KEY_BYTES / 16; i += WARPS * 32) {
    copy_async16(stage + key_piece(i / (CACHE_DIM / 8), i % (CACHE_DIM / 8)) * 16, keys + i * 8);
    const int dim = i / (STEP / 8), piece = i % (STEP / 8);
    copy_async16(stage + KEY_BYTES + value_piece(dim, piece) * 16, cache.value(page, head, dim) + base % PAGE_SIZE + piece * 8);
  }
#endif
}

struct Span { int low, high; };  // the positions that a row sees

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
        const uint4 k = *(const uint4*)(stage + key_piece(position, 4 * j + quad) * 16);
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
        keep[half] = exp2_fast(largest[m][half] - finite);
        largest[m][half] = most;
        sum[m][half] *= keep[half];
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            p[tile][2 * half + e] = exp2_fast(p[tile][2 * half + e] - finite);
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
      uint4 v = *(const uint4*)(stage + KEY_BYTES + value_piece(8 * d + line, quad) * 16);
      if (ahead < 8) {  // 0 × NaN
        u32* words = &v.x;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] &= ahead > 2 * i + 1 ? 0xffffffffu : ahead > 2 * i ? 0xffffu : 0u;
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma_f16(accumulator[m][d], weights[m][0], v.x, v.y);
        mma_f16(accumulator[m][d], weights[m][1], v.z, v.w);
      }
    }
  }
};

KERNEL(WARPS * 32, 1) prompt_attend(ARGS(PromptAttendArgs, a)) {
#if ARCH >= 80
  DYNAMIC_SHARED(shared);
  uint4* const queries = (uint4*)(shared + STAGES * STAGE_BYTES);  // [WARPS, MT, FRAGMENTS, lane]
  int* const positions = (int*)((u8*)queries + Q_BYTES);
  int* const slots = positions + TOKENS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, line = lane >> 2, quad = lane & 3;
  const int kv_head = blockIdx.x / HEAD_TILES, in_group = blockIdx.x % HEAD_TILES * HEAD_TILE + warp % HEAD_TILE;
  const int head = kv_head * GROUP_HEADS + min(in_group, GROUP_HEADS - 1), token = warp / HEAD_TILE * MT * 16;
  // The last rows see the most positions: they begin first.
  const int first_row = (gridDim.y - 1 - blockIdx.y) * TOKENS, rows = min(TOKENS, a.n_rows - first_row);
  dependents_launch();
  BEGIN(a);
  for (int i = threadIdx.x; i < rows; i += WARPS * 32) {
    positions[i] = load_fresh(a.cache.positions + first_row + i);
    slots[i] = load_fresh(a.cache.slots + first_row + i);
  }
  constexpr float SCALED = SOFTCAP > 0.f ? SCALE : SCALE * LOG2_E;
  uint4* const q = queries + warp * MT * FRAGMENTS * 32;
#pragma unroll 4
  for (int i = 0; i < MT * FRAGMENTS; ++i) {
    const int fragment = i % FRAGMENTS, dim = 32 * (fragment >> 1) + 8 * quad + 4 * (fragment & 1);
    float4 v[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = token + i / FRAGMENTS * 16 + half * 8 + line;
      v[half] = row < rows && dim < HEAD_DIM
                    ? load_fresh((const float4*)(a.q + ((u64)(first_row + row) * HEADS + head) * HEAD_DIM + dim))
                    : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    q[i * 32 + lane] = make_uint4(pack_halves(v[0].x * SCALED, v[0].y * SCALED), pack_halves(v[1].x * SCALED, v[1].y * SCALED),
                                  pack_halves(v[0].z * SCALED, v[0].w * SCALED), pack_halves(v[1].z * SCALED, v[1].w * SCALED));
  }
  Warp w;
  // Runs of rows of one slot, nearly always one.
  for (int begin = 0, end; begin < rows; begin = end) {
    sync_block();
    const int slot = slots[begin];
    for (end = begin + 1; end < rows && slots[end] == slot;) ++end;
    const int start = (WINDOW ? max(0, positions[begin] + 1 - WINDOW) : 0) / STEP * STEP, high = positions[end - 1] + 1;
    const int steps = (high - start + STEP - 1) / STEP;
    Span spans[MT][2];
    int warp_low = high, warp_high = 0;  // of all of the warp's rows
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = token + 16 * m + 8 * half + line;
        const bool mine = row >= begin && row < end;
        const int position = mine ? positions[row] : -1;
        spans[m][half] = {WINDOW ? position + 1 - WINDOW : 0, position + 1};
        if (mine) warp_low = min(warp_low, spans[m][half].low), warp_high = max(warp_high, spans[m][half].high);
      }
#pragma unroll
    for (int step = 16; step; step >>= 1) {
      warp_low = min(warp_low, shuffle_xor(warp_low, step));
      warp_high = max(warp_high, shuffle_xor(warp_high, step));
    }
    auto request_step = [&](int s) {
      if (s < steps) request(a.cache, shared + s % STAGES * STAGE_BYTES, slot, kv_head, start + s * STEP);
      copy_commit();
    };
    for (int s = 0; s < STAGES - 1; ++s) request_step(s);
    for (int s = 0; s < steps; ++s) {
      copy_wait<STAGES - 2>();
      sync_block();
      request_step(s + STAGES - 1);
      const int base = start + s * STEP;
      if (base < warp_high && base + STEP > warp_low) w.step(q, shared + s % STAGES * STAGE_BYTES, base, high, spans);
    }
  }
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = w.sum[m][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int row = token + 16 * m + 8 * half + line;
      if (row >= rows || in_group >= GROUP_HEADS) continue;
      const Row out = a.out.row<HEADS * HEAD_DIM>(first_row + row);
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) {
        const float* c = w.accumulator[m][d] + 2 * half;
        *(u32*)out.brain_at(head * HEAD_DIM + 8 * d + 2 * quad) = pack_brain2(c[0] / sum, c[1] / sum);
      }
    }
#endif
}
HOST_ENTRY(prompt_attend, PromptAttendArgs)
