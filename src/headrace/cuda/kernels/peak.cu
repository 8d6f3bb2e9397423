// As many products as a multiprocessor can make from registers: the ceilings of arithmetic.
// Macros: INTEGER (1: dp4a, four products of bytes at once; 0: fmaf), ITERATIONS, WARPS.
#include "primitives.cuh"

struct PeakArgs {
  u32* sink;
  STAMPS
};

constexpr int SHARED_BYTES = 0, CHAINS = 8;  // of dependent products, a thread

KERNEL(WARPS * 32, 1) peak(ARGS(PeakArgs, a)) {
  dependents_launch();
  BEGIN(a);
  const int x = (int)(threadIdx.x * 0x01010101u), y = (int)(blockIdx.x | 1);
  int sums[CHAINS];
  float totals[CHAINS];
#pragma unroll
  for (int i = 0; i < CHAINS; ++i) sums[i] = i, totals[i] = (float)i;
  for (int n = 0; n < ITERATIONS; ++n)
#pragma unroll
    for (int i = 0; i < CHAINS; ++i)
      if (INTEGER) sums[i] = dp4a(x, sums[i], y);
      else totals[i] = fmaf(totals[i], 0.999f, (float)y);
  u32 all = 0;
#pragma unroll
  for (int i = 0; i < CHAINS; ++i) all ^= (u32)sums[i] ^ float_to_bits(totals[i]);
  if (all == 0x9e3779b9u) *a.sink = all;  // never, but the compiler cannot know
}
HOST_ENTRY(peak, PeakArgs)
