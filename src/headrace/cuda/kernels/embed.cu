// Token ids to the residual stream: one 1,024-column slice of a row of the (tiled, quantised)
// embedding a block, scaled, and quantised for the first layer's norm. Macros: TYPE, K (the width), SCALE, WARPS.
#include "activations.cuh"
#include "blocks.cuh"

struct EmbedArgs {
  const u8* weights;
  const int* tokens;  // [rows]
  Rows x;
  const float* gain;  // of the first norm
  STAMPS
};

constexpr int PITCH = GROUP + 1;  // groups are stored by one lane each, and read by one lane a value
constexpr int SHARED_BYTES = TILE_COLUMNS / GROUP * PITCH * 4;

KERNEL(WARPS * 32, 1) embed(ARGS(EmbedArgs, a)) {
  using T = Tiles<TYPE, K>;
  using B = Block<TYPE>;
  DYNAMIC_SHARED(shared);
  float* const values = (float*)shared;
  const int lane = threadIdx.x & 31, slice = blockIdx.x, start = slice * TILE_COLUMNS;
  dependents_launch();
  BEGIN(a);
  const int token = load_fresh(a.tokens + blockIdx.y);
  const int blocks = T::blocks(slice);
  if (lane < 16 && threadIdx.x < 32 && B::active(lane, blocks)) {
    const u8* tile = a.weights + T::offset(token / TILE_ROWS, slice);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[GROUP];
      group_values<TYPE>(v, tile, blocks, token % TILE_ROWS, lane, i);
#pragma unroll
      for (int j = 0; j < GROUP; ++j) values[B::group(lane, i) * PITCH + j] = SCALE * v[j];
    }
  }
  sync_block();
  const Row x = a.x.row<K>(blockIdx.y);
#pragma unroll
  for (int i = threadIdx.x; i < TILE_COLUMNS; i += WARPS * 32) {
    const bool live = start + i < K;
    float v = 0.f;
    if (live) x.values[start + i] = v = values[i / GROUP * PITCH + i % GROUP];
    store_group(x, start + i, v, live ? a.gain[start + i] : 0.f, live);
  }
}
HOST_ENTRY(embed, EmbedArgs)
