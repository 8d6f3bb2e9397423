// Attention of one row's query heads over one or more splits of its slot's cache: the work of ATTEND_WARPS warps that
// meet at a barrier of their own. attend.cu runs it in a block of its own, token.cu beside others.
//
// Up to eight query heads of one kv head, and one split of the positions, at a time; a warp takes 32 positions, on
// tensor cores, straight from memory: keys lie in the cache as fragments of K^T, values (transposed) as fragments of V.
// q goes in twice, rounded to f16, and what the rounding left; likewise the probabilities. So nothing but the cache itself is
// rounded. Who finishes last joins the splits, in order.
//
// How positions are split depends on the row's position alone: a row's result is bit-equal whatever the
// grid and whoever else is in the step.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM (a multiple of 16; the cache pads it to one of 32), SCALE, WINDOW (0: none), SOFTCAP (0: none),
// SPLIT (positions, at least; a multiple of 64), MAX_SPLITS, ATTEND_WARPS; if registers are few, JOINED_AT_ONCE, and KEYS_AHEAD (attend_f16.cuh).
#pragma once
#include "activations.cuh"
#include "kv_cache.cuh"

constexpr int STEP = 32, TILE = 8, GROUP_HEADS = HEADS / KV_HEADS, HEAD_TILES = (GROUP_HEADS + TILE - 1) / TILE;
// Scores are in units of log2 e: 2 to their power is wanted.
constexpr float LOG2_E = 1.44269504f, SCORE_SCALE = SOFTCAP > 0.f ? SCALE : SCALE * LOG2_E;
constexpr int FRAGMENTS = CACHE_DIM / 16;  // of q: 16 dims each
constexpr int MOST_HEADS = GROUP_HEADS < TILE ? GROUP_HEADS : TILE;  // at a time
constexpr bool PACKED = MOST_HEADS <= 4;
#ifndef JOINED_AT_ONCE
#define JOINED_AT_ONCE 16  // splits
#endif
constexpr int ATTEND_BYTES = FRAGMENTS * 512 + ATTEND_WARPS * MOST_HEADS * (CACHE_DIM + 2) * 4 + MOST_HEADS * MAX_SPLITS * 4 + 16;

struct Attention {
  const float* q;          // [rows, HEADS × HEAD_DIM], rotated
  Cache cache;
  Rows out;                // [rows, HEADS × HEAD_DIM]
  float* partial;          // [rows, HEADS, MAX_SPLITS, CACHE_DIM]
  float2* partial_max_sum; // [rows, HEADS, MAX_SPLITS]
  u32* arrived;            // [rows, KV_HEADS × HEAD_TILES], zero between launches
};

// The pages of a row's positions, from page `first` on, in `count` splits: of `each` pages, and the first `longer` of one more.
struct Splits {
  int begin, first, count, each, longer;  // begin: the first position that is seen
  DEVICE int page(int split) const { return first + split * each + min(split, longer); }
};

DEVICE Splits splits_of(int position) {
  const int begin = WINDOW ? max(0, position + 1 - WINDOW) : 0, first = begin / PAGE_SIZE, pages = position / PAGE_SIZE - first + 1;
  const int count = min(MAX_SPLITS, (pages + SPLIT / PAGE_SIZE - 1) / (SPLIT / PAGE_SIZE)), each = pages / count;
  return {begin, first, count, each, pages - each * count};
}

struct Range { int low, high; };  // positions
DEVICE Range range_of(const Splits& s, int split, int position) {
  return {max(s.page(split) * PAGE_SIZE, s.begin), min(s.page(split + 1) * PAGE_SIZE, position + 1)};
}
// The first position of a warp's first step; the steps of a split begin with a page.
DEVICE int first_base(const Range& r, int warp) { return r.low / PAGE_SIZE * PAGE_SIZE + warp * STEP; }

// weights[head, s] = what split s counts in the whole: exp(its maximum − the greatest) / the sum. A warp a head.
DEVICE void join_weights(int thread, const float2* max_sum, int heads, int count, float* weights) {
  const int lane = thread & 31;
  for (int head = thread >> 5; head < heads; head += ATTEND_WARPS) {
    float2 m[(MAX_SPLITS + 31) / 32];
    float largest = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < (MAX_SPLITS + 31) / 32; ++i) {
      const int s = lane + 32 * i;
      m[i] = s < count ? load_fresh(max_sum + head * MAX_SPLITS + s) : make_float2(-INFINITY, 0.f);
      largest = fmaxf(largest, m[i].x);
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) largest = fmaxf(largest, shuffle_xor(largest, step));
#pragma unroll
    for (int i = 0; i < (MAX_SPLITS + 31) / 32; ++i) {
      m[i].x = exp2_near(m[i].x - largest);
      sum = fmaf(m[i].y, m[i].x, sum);
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < (MAX_SPLITS + 31) / 32; ++i)
      if (lane + 32 * i < count) weights[head * MAX_SPLITS + lane + 32 * i] = m[i].x / sum;
  }
}

// The outputs of `heads` heads, [heads, CACHE_DIM]: a thread has two neighbouring ones at a time, from 2 × thread on. All
// lanes of a warp go on together; those beyond the last repeat it.
template <class Do> DEVICE void outputs(int thread, int heads, Do&& each) {
  const int count = heads * CACHE_DIM;
#pragma unroll 1
  for (int i = 2 * thread; i < (count + 63) / 64 * 64; i += 2 * ATTEND_WARPS * 32) each(min(i, count - 2), i < count);
}

// finish(i, outputs, live): the splits' sums, weighted, in order. ready(): makes the weights; the first sums are on their
// way then.
template <class Ready, class Finish>
DEVICE void join(int thread, const float* partial, int heads, int count, const float* weights, Ready&& ready, Finish&& finish) {
  constexpr int AT_ONCE = JOINED_AT_ONCE;
  float2 x[AT_ONCE];
  auto load = [&](int i, int from) {
    const float* const sums = partial + ((u64)(i / CACHE_DIM) * MAX_SPLITS + from) * CACHE_DIM + i % CACHE_DIM;
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s)
      if (from + s < count) x[s] = load_fresh((const float2*)(sums + s * CACHE_DIM));
  };
  const int first = min(2 * thread, heads * CACHE_DIM - 2);
  load(first, 0);
  ready();
  outputs(thread, heads, [&](int i, bool live) {
    if (i != first) load(i, 0);
    float v[2] = {};
#pragma unroll 1
    for (int from = 0; from < count; from += AT_ONCE) {
      if (from) load(i, from);
#pragma unroll
      for (int s = 0; s < AT_ONCE; ++s) {
        if (from + s >= count) break;
        const float w = weights[i / CACHE_DIM * MAX_SPLITS + from + s];
        v[0] = fmaf(x[s].x, w, v[0]), v[1] = fmaf(x[s].y, w, v[1]);
      }
    }
    finish(i, v, live);
  });
}

// Two floats as f16 pairs: rounded, and the rest.
DEVICE void split_halves(float x, float y, u32& high, u32& low) {
  const u16 hx = float_to_half(x), hy = float_to_half(y);
  high = hx | (u32)hy << 16;
  low = float_to_half(x - half_to_float(hx)) | (u32)float_to_half(y - half_to_float(hy)) << 16;
}

// Brings the keys of 32 positions, and the values of their page, into L2 while the previous kernel still runs.
DEVICE void prefetch(const Cache& cache, u64 page, int head, int base) {
  prefetch_l2(cache.key(page, head, base), STEP * CACHE_DIM * (int)sizeof(Cached));
  if (base % PAGE_SIZE) return;
  prefetch_l2(cache.value(page, head, 0), HEAD_BYTES);
  if (CACHE_Q8) prefetch_l2(cache.key_scales(page, head), SCALE_BYTES);
}

// Adds Σ p v of 16 positions (half of each lane's) to 16 dims: v of dim lane / 4, and of eight further on.
DEVICE void add_products(float (&sums)[4], uint2 v, uint2 v8, uint2 high, uint2 low) {
  const uint4 a = make_uint4(v.x, v8.x, v.y, v8.y);
  if (PACKED) {
    const bool upper = lane_now() < 16;
    mma_f16(sums, a, upper ? high.x : low.x, upper ? high.y : low.y);
  } else {
    mma_f16(sums, a, high.x, high.y);
    mma_f16(sums, a, low.x, low.y);
  }
}

#if CACHE_Q8
#include "attend_q8.cuh"
#else
#include "attend_f16.cuh"
#endif

// One warp's share. Of the scores' mma the rows are heads: q's upper parts, and eight further on its lower ones; so a
// lane has the scores of head `lane / 4`. Of the values' mma the rows are dims, and the columns heads: where there are no more
// than four, the probabilities' upper parts are columns 0–3 and the lower ones 4–7, else they take turns.
struct Warp {
  float accumulator[CACHE_DIM / 16][4] = {};  // dims 16 i + lane / 4 (+ 8), of columns 2 quad and 2 quad + 1
  float largest = -INFINITY, sum = 0.f;

  // Positions base … base + 31, which `source` has, and of which [low, high) count.
  template <class Source> DEVICE void step(const uint4* q, const Source& source, int base, int low, int high) {
    const int quad = lane_now() & 3;
    float p[4][2] = {}, step_largest = -INFINITY;  // of position base + 8 quad + 2 tile + e: score, then probability
    source.scores(p, q);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float s = p[tile][e];
        if constexpr (SOFTCAP > 0.f) s = LOG2_E * SOFTCAP * tanhf(s / SOFTCAP);
        const int position = base + 8 * quad + 2 * tile + e;
        p[tile][e] = (!WINDOW || position >= low) && position < high ? s : -INFINITY;
        step_largest = fmaxf(step_largest, p[tile][e]);
      }
    step_largest = fmaxf(step_largest, shuffle_xor(step_largest, 1));
    step_largest = fmaxf(step_largest, shuffle_xor(step_largest, 2));
    const float now = fmaxf(largest, step_largest), finite = now == -INFINITY ? 0.f : now;
    const float keep = exp2_near(largest - finite);
    largest = now;
    sum *= keep;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      p[tile][0] = exp2_near(p[tile][0] - finite);
      p[tile][1] = exp2_near(p[tile][1] - finite);
      sum += p[tile][0] + p[tile][1];
    }
    const int head = PACKED ? 2 * (quad & 1) : 2 * quad;
    const float kept[2] = {shuffle(keep, 4 * head), shuffle(keep, 4 * head + 4)};
#pragma unroll
    for (int d = 0; d < CACHE_DIM / 16; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) accumulator[d][i] *= kept[i & 1];
    // Of the lane's eight positions, those that exist count.
    source.values(accumulator, p, high - base - 8 * quad);
  }

  // sums [MOST_HEADS, CACHE_DIM]
  DEVICE void store(float* sums) const {
    const int line = lane_now() >> 2, quad = lane_now() & 3;
    constexpr int AT_ONCE = PACKED ? 2 : 1;  // of PACKED columns, a lane and its partner have the parts of one of two each
    const bool second = PACKED && quad & 2;
#pragma unroll
    for (int d = 0; d < CACHE_DIM / 16; d += AT_ONCE)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = accumulator[d][i], b = accumulator[d + AT_ONCE - 1][i];
        const float v = PACKED ? (second ? b : a) + shuffle_xor(second ? a : b, 2) : a;
        const int head = (PACKED ? 2 * (quad & 1) : 2 * quad) + (i & 1), dim = 16 * (d + second) + 8 * (i >> 1) + line;
        if (head < MOST_HEADS) sums[head * CACHE_DIM + dim] = v;
      }
  }
};

// A row's query heads of one tile, and what their splits are.
struct Target {
  int row, slot = 0, position = 0, kv_head = 0, first_head = 0, heads = 0;
  Splits splits;
  DEVICE Target(const Cache& cache, int row, int head_tile) : row(row) {
    position = load_fresh(cache.positions + row), slot = load_fresh(cache.slots + row);
    kv_head = head_tile / HEAD_TILES, first_head = kv_head * GROUP_HEADS + head_tile % HEAD_TILES * TILE;
    heads = min(TILE, GROUP_HEADS - head_tile % HEAD_TILES * TILE), splits = splits_of(position);
  }
};

// Four values of q of a target, as a lane has them of fragment i; nobody's are 0.
DEVICE float4 query_of(const Attention& a, const Target& t, int i) {
  const int line = lane_now() >> 2, quad = lane_now() & 3, head = PACKED ? line % 4 : line, dim = 32 * (i >> 1) + 8 * quad + 4 * (i & 1);
  if (i >= FRAGMENTS || head >= t.heads || dim >= HEAD_DIM) return {0.f, 0.f, 0.f, 0.f};
  return load_fresh((const float4*)(a.q + ((u64)t.row * HEADS + t.first_head + head) * HEAD_DIM + dim));
}

// One split of a target, by the ATTEND_WARPS warps of which `thread` is one. query(i): as query_of(). read(w, q) takes the
// thread's warp's steps. shared: ATTEND_BYTES. arrived: the target's own, zero between launches. sync(): their barrier.
template <class Query, class Read, class Sync>
DEVICE void attend_split(const Attention& a, const Target& t, Query&& query, int split, u8* shared, u32* arrived, int thread, Read&& read, Sync&& sync) {
  const int row = t.row, first_head = t.first_head, heads = t.heads, count = t.splits.count;
  uint4* const q = (uint4*)shared;                                 // [FRAGMENTS, lane]
  float* const sums = (float*)(q + FRAGMENTS * 32);                // [ATTEND_WARPS, MOST_HEADS, CACHE_DIM]
  float2* const max_sums = (float2*)(sums + ATTEND_WARPS * MOST_HEADS * CACHE_DIM);  // [ATTEND_WARPS, MOST_HEADS]
  float* const weights = (float*)(max_sums + ATTEND_WARPS * MOST_HEADS);             // [MOST_HEADS, MAX_SPLITS]
  int* const is_last = (int*)(weights + MOST_HEADS * MAX_SPLITS);
  const int warp = thread >> 5;
  for (int i = warp; i < FRAGMENTS; i += ATTEND_WARPS) {
    const float4 v = query(i);
    uint4 fragment;
    split_halves(v.x * SCORE_SCALE, v.y * SCORE_SCALE, fragment.x, fragment.y);
    split_halves(v.z * SCORE_SCALE, v.w * SCORE_SCALE, fragment.z, fragment.w);
    q[i * 32 + lane_now()] = fragment;
  }
  sync();
  Warp w;
  read(w, q);
  w.sum += shuffle_xor(w.sum, 1);
  w.sum += shuffle_xor(w.sum, 2);
  const int lane = lane_now();
  if (lane % 4 == 0 && lane / 4 < MOST_HEADS) max_sums[warp * MOST_HEADS + lane / 4] = make_float2(w.largest, w.sum);
  w.store(sums + warp * MOST_HEADS * CACHE_DIM);
  sync();
  const Row out = a.out.row<HEADS * HEAD_DIM>(row);
  auto finish = [&](int i, const float (&v)[2], bool live) {
    const int dim = i % CACHE_DIM, column = (first_head + i / CACHE_DIM) * HEAD_DIM + dim;
    live = live && dim < HEAD_DIM;
    if (live && out.values) *(float2*)(out.values + column) = make_float2(v[0], v[1]);
    store_group<2>(out, column, v, {1.f, 1.f}, live);
  };
  const u64 first = ((u64)row * HEADS + first_head) * MAX_SPLITS;
  outputs(thread, heads, [&](int i, bool live) {
    const int head = i / CACHE_DIM, dim = i % CACHE_DIM;
    float largest = -INFINITY, sum = 0.f, v[2] = {};
#pragma unroll
    for (int k = 0; k < ATTEND_WARPS; ++k) largest = fmaxf(largest, max_sums[k * MOST_HEADS + head].x);
#pragma unroll
    for (int k = 0; k < ATTEND_WARPS; ++k) {
      const float2 m = max_sums[k * MOST_HEADS + head], x = *(const float2*)(sums + k * MOST_HEADS * CACHE_DIM + i);
      const float scale = exp2_near(m.x - largest);
      sum = fmaf(m.y, scale, sum);
      v[0] = fmaf(x.x, scale, v[0]), v[1] = fmaf(x.y, scale, v[1]);
    }
    if (count == 1) {
      v[0] /= sum, v[1] /= sum;
      finish(i, v, live);
    } else {
      const u64 at = first + head * MAX_SPLITS + split;
      *(float2*)(a.partial + at * CACHE_DIM + dim) = make_float2(v[0], v[1]);
      if (dim == 0) a.partial_max_sum[at] = make_float2(largest, sum);
    }
  });
  if (count == 1) return;
  sync();
  if (thread == 0) *is_last = atomic_add_ordered(arrived, 1) == (u32)count - 1;
  sync();
  if (*is_last) {
    if (thread == 0) *arrived = 0;
    auto make_weights = [&] {
      join_weights(thread, a.partial_max_sum + first, heads, count, weights);
      sync();
    };
    join(thread, a.partial + first * CACHE_DIM, heads, count, weights, make_weights, finish);
  }
}
