// Rows of floats to what a matvec reads: values × gain as int8 groups, and the sums of squares for its
// norm. For rows that come from outside; inside a step each producer does this itself.
// Macros: K (the width), WARPS.
#include "activations.cuh"

struct QuantiseArgs {
  const float* source;  // [rows, K]
  const float* gain;    // [K]; null: 1
  Rows x;               // its values are written, too
  STAMPS
};

constexpr int SHARED_BYTES = 0;

KERNEL(WARPS * 32, 1) quantise(ARGS(QuantiseArgs, a)) {
  dependents_launch();
  BEGIN(a);
  const int column = blockIdx.x * WARPS * 32 + threadIdx.x;
  const bool live = column < K;
  const Row x = a.x.row<K>(blockIdx.y);
  const float v = live ? load_fresh(a.source + (u64)blockIdx.y * K + column) : 0.f;
  if (live) x.values[column] = v;
  store_group(x, column, v, live && a.gain ? a.gain[column] : 1.f, live);
}
HOST_ENTRY(quantise, QuantiseArgs)
