// x += rms_norm(y) ∘ post_gain, for families with a norm after a projection; then x∘gain quantised
// for the next operation. One block a row. Macros: K (the width), EPS, WARPS.
#include "activations.cuh"

struct PostNormArgs {
  const float* y;          // [rows, K]
  const float* post_gain;
  Rows x;
  const float* gain;
  STAMPS
};

constexpr int SHARED_BYTES = WARPS * 4;

KERNEL(WARPS * 32, 1) post_norm(ARGS(PostNormArgs, a)) {
  DYNAMIC_SHARED(shared);
  dependents_launch();
  BEGIN(a);
  const float* y = a.y + (u64)blockIdx.x * K;
  const Row x = a.x.row<K>(blockIdx.x);
  float squares = 0.f;
  for (int i = threadIdx.x; i < K; i += WARPS * 32) {
    const float v = load_fresh(y + i);
    squares = fmaf(v, v, squares);
  }
  const float inverse = rsqrtf(block_sum<WARPS>(squares, (float*)shared) * (1.f / K) + EPS);
  for (int i = threadIdx.x; i < (K + 31) / 32 * 32; i += WARPS * 32) {
    const bool live = i < K;
    float v = 0.f;
    if (live) x.values[i] = v = fmaf(load_fresh(y + i) * inverse, a.post_gain[i], load_fresh(x.values + i));
    store_group(x, i, v, live ? a.gain[i] : 0.f, live);
  }
}
HOST_ENTRY(post_norm, PostNormArgs)
