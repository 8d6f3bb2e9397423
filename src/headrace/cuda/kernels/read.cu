// Reads memory as fast as a plain kernel can: the ceiling that decode speed is measured against.
// Macros: WARPS.
#include "primitives.cuh"

struct ReadArgs {
  const uint4* source;
  u64 n;  // of uint4
  u32* sink;
  STAMPS
};

constexpr int SHARED_BYTES = 0, AT_ONCE = 8;

KERNEL(WARPS * 32, 1) read(ARGS(ReadArgs, a)) {
  dependents_launch();
  BEGIN(a);
  u32 sum = 0;
  const u64 threads = (u64)gridDim.x * WARPS * 32;
  for (u64 i = (u64)blockIdx.x * WARPS * 32 + threadIdx.x; i < a.n; i += threads * AT_ONCE) {
    uint4 v[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      v[j] = i + j * threads < a.n ? load_fresh(a.source + i + j * threads) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x9e3779b9u) *a.sink = sum;  // never, but the compiler cannot know
}
HOST_ENTRY(read, ReadArgs)
