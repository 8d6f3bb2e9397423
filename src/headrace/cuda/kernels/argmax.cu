// The token of the largest logit (the lowest id of equals), and the next step's inputs: the token, its
// position, and the id in host memory for the host to poll. One launch; the block that finishes last
// joins the others. Macros: VOCABULARY, WARPS.
#include "primitives.cuh"

struct ArgmaxArgs {
  const float* logits;  // [VOCABULARY]
  u64* best;            // [grid]: (ordered logit, ~id) of each block
  u32* arrived;         // zero between launches
  int* token;           // of the next step
  int* position;        // of the next step
  u64* step;            // tokens made so far
  u64* ring;            // host memory, [ring_size]: step + 1 in the upper half, the id in the lower
  int ring_size;
};

constexpr int SHARED_BYTES = (WARPS + 1) * 8;

// A key that orders as (logit, then lower id). NaN counts as the lowest logit.
DEVICE u64 key(float logit, int id) {
  const u32 bits = float_to_bits(logit != logit ? -INFINITY : logit);
  return (u64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | (u32)~id;
}
DEVICE u64 block_max(u64 v, u64* scratch) {
  for (int step = 16; step; step >>= 1) {
    const u64 other = shuffle_xor(v, step);
    v = other > v ? other : v;
  }
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  sync_block();
  for (int w = 0; w < WARPS; ++w) v = scratch[w] > v ? scratch[w] : v;
  sync_block();
  return v;
}

KERNEL(WARPS * 32, 1) argmax(ARGS(ArgmaxArgs, a)) {
  DYNAMIC_SHARED(shared);
  u64* const scratch = (u64*)shared;
  int* const is_last = (int*)(scratch + WARPS);
  dependents_launch();
  dependency_wait();
  u64 best = 0;
  for (int i = blockIdx.x * WARPS * 32 + threadIdx.x; i < VOCABULARY; i += gridDim.x * WARPS * 32) {
    const u64 k = key(load_fresh(a.logits + i), i);
    best = k > best ? k : best;
  }
  best = block_max(best, scratch);
  if (threadIdx.x == 0) {
    a.best[blockIdx.x] = best;
    fence_device();
    *is_last = atomic_add(a.arrived, 1) == gridDim.x - 1;
  }
  sync_block();
  if (!*is_last) return;
  fence_device();
  best = 0;
  for (u32 i = threadIdx.x; i < gridDim.x; i += WARPS * 32) {
    const u64 k = load_fresh(a.best + i);
    best = k > best ? k : best;
  }
  best = block_max(best, scratch);
  if (threadIdx.x) return;
  *a.arrived = 0;
  const int id = (int)~(u32)best;
  const u64 step = *a.step + 1;
  *a.step = step;
  *a.token = id;
  *a.position += 1;
  store_release_system(a.ring + (step - 1) % a.ring_size, step << 32 | (u32)id);
}
HOST_ENTRY(argmax, ArgmaxArgs)
