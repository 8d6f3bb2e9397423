// Heads of q, k and v after their projection, for families that normalise q and k first (the others
// do this in the projection's epilogue): norm, rotary embedding, and k and v into the cache. One warp
// a head. Macros: HEADS, EPS, Q_NORM, K_NORM, and those of kv_cache.cuh.
#include "kv_cache.cuh"

struct RotaryArgs {
  const float* qkv;  // [rows, (HEADS + 2 KV_HEADS) × HEAD_DIM]
  const float *q_gain, *k_gain;
  float* q;          // [rows, HEADS × HEAD_DIM]
  Cache cache;
  const double* turns;
  STAMPS
};

constexpr int SHARED_BYTES = 0, PAIRS = (HEAD_DIM / 2 + 31) / 32;

KERNEL(32, 1) rotary(ARGS(RotaryArgs, a)) {
  const int lane = threadIdx.x, row = blockIdx.y, slot_head = blockIdx.x;
  const bool is_q = slot_head < HEADS, is_k = !is_q && slot_head < HEADS + KV_HEADS;
  dependents_launch();
  BEGIN(a);
  const float* in = a.qkv + ((u64)row * (HEADS + 2 * KV_HEADS) + slot_head) * HEAD_DIM;
  float v[PAIRS][2];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const int dim = 2 * (lane + 32 * i);
    const float2 pair = dim < HEAD_DIM ? load_fresh((const float2*)(in + dim)) : make_float2(0.f, 0.f);
    v[i][0] = pair.x;
    v[i][1] = pair.y;
    squares += pair.x * pair.x + pair.y * pair.y;
  }
  const bool normed = (is_q && Q_NORM) || (is_k && K_NORM);
  const float inverse = rsqrtf(warp_sum(squares) * (1.f / HEAD_DIM) + EPS);
  const float* gain = is_q ? a.q_gain : a.k_gain;
  const int position = load_fresh(a.cache.positions + row);
  const u64 page = a.cache.page(load_fresh(a.cache.slots + row), position);
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const int dim = 2 * (lane + 32 * i);
    const bool live = dim < HEAD_DIM;
    float x = v[i][0], y = v[i][1];
    if (live && normed) x *= inverse * gain[dim], y *= inverse * gain[dim + 1];
    const float x0 = x;
    if (is_q || is_k) {
      x = rotate(x0, y, rotation(dim, position, turns_of(dim, a.turns)));
      y = rotate(y, x0, rotation(dim + 1, position, turns_of(dim, a.turns)));
    }
    if (is_q) {
      if (live) *(float2*)(a.q + ((u64)row * HEADS + slot_head) * HEAD_DIM + dim) = make_float2(x, y);
      continue;
    }
    const int head = slot_head - HEADS - (is_k ? 0 : KV_HEADS);
    const Spot spot = is_k ? a.cache.key_spot(page, head, position, dim) : a.cache.value_spot(page, head, position, dim);
    store_cached(spot, is_k ? 1 : PAGE_SIZE, {x, y}, dim % CACHE_GROUP == 0, live);
  }
}
HOST_ENTRY(rotary, RotaryArgs)
