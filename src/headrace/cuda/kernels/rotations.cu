// The angles of rotary embedding of a step's rows, for all heads and layers that share their frequencies.
// Macros: those of kv_cache.cuh.
#include "kv_cache.cuh"

struct RotationsArgs {
  const int* positions;  // [rows]
  const double* turns;   // [ROPE_DIM / 2], see rotation()
  float2* out;           // [rows, ROPE_DIM / 2]: cosine and sine, times MAGNITUDE
  int n_rows;
  STAMPS
};

constexpr int SHARED_BYTES = 0, PAIRS = ROPE_DIM / 2;

KERNEL(256, 1) rotations(ARGS(RotationsArgs, a)) {
  dependents_launch();
  BEGIN(a);
  const int i = blockIdx.x * 256 + threadIdx.x, row = i / PAIRS, pair = i % PAIRS;
  if (row >= a.n_rows) return;
  const Rotation r = rotation(2 * pair + 1, load_fresh(a.positions + row), a.turns[pair]);
  a.out[i] = make_float2(r.cosine, r.sine);
}
HOST_ENTRY(rotations, RotationsArgs)
