// Token ids to the residual stream: one row of the (tiled, quantised) embedding a block, scaled, and
// quantised for the first layer's norm. Macros: TYPE, K (the width), SCALE, WARPS.
#include "activations.cuh"
#include "blocks.cuh"

struct EmbedArgs {
  const u8* weights;
  const int* tokens;  // [rows]
  Rows x;
  const float* gain;  // of the first norm
};

constexpr int SHARED_BYTES = 0;

KERNEL(WARPS * 32, 1) embed(ARGS(EmbedArgs, a)) {
  using T = Tiles<TYPE, K>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  dependents_launch();
  dependency_wait();
  const int token = load_fresh(a.tokens + blockIdx.x);
  const Row x = a.x.row<K>(blockIdx.x);
  for (int slice = warp; slice < T::SLICES; slice += WARPS) {
    if (Block<TYPE>::block(lane) >= T::blocks(slice)) continue;
    float v[32];
    const u8* tile = a.weights + T::offset(token / TILE_ROWS, slice);
    lane_values<TYPE>(v, tile, T::blocks(slice), token % TILE_ROWS, lane);
    float* pa = x.values + slice * TILE_COLUMNS + Block<TYPE>::group_a(lane) * GROUP;
    float* pb = x.values + slice * TILE_COLUMNS + Block<TYPE>::group_b(lane) * GROUP;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      pa[i] = SCALE * v[i];
      pb[i] = SCALE * v[GROUP + i];
    }
  }
  sync_block();
  for (int i = threadIdx.x; i < (K + 31) / 32 * 32; i += WARPS * 32) {
    const bool live = i < K;
    store_group(x, i, live ? x.values[i] : 0.f, live ? a.gain[i] : 0.f, live);
  }
}
HOST_ENTRY(embed, EmbedArgs)
