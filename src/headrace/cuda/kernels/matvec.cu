// y = W x on packed blocks, for up to three matrices that share x, with the norm before it and what
// follows it (EPILOGUE) in the same kernel. A tile stream: each warp copies 4 × 1,024 tiles of the
// block's rows into its own ring, asynchronously and ahead, and reduces them against x in shared
// memory. The first tiles are requested before the previous kernel has ended.
//
// RMSNorm is a scalar here: the producer of x stored x∘gain, and Σx²; y is multiplied by 1/rms.
// Integer dots, and sums in an order that depends neither on the grid nor on ROWS: a row's result is
// bit-equal whoever travels with it.
//
// EARLY stages are requested before the previous kernel has ended, the others behind x.
//
// Macros: ARCH; K; TYPE0…2, N0…2 (rows of each matrix; TYPE NONE when absent); PAIRED (gate and up:
// output i takes row i of both) or stacked; UNIT_ROWS (outputs a block takes at a time; 16 when they
// are quantised); ROWS (of x, at once); FLOAT_ACTIVATIONS; NORM, EPS; EPILOGUE; WARPS, STAGES, EARLY,
// PASS_UNITS, GRID; and the epilogue's own (epilogues.cuh).
#include "cut.cuh"
#include "dots.cuh"
#include "epilogues.cuh"
#include "segments.cuh"

#if EPILOGUE == STORE
using Epilogue = Store<N0, N1, N2>;
#elif EPILOGUE == ROTARY
using Epilogue = Rotary<N0>;
#elif EPILOGUE == RESIDUAL
using Epilogue = Residual<N0>;
#elif EPILOGUE == PRODUCT
using Epilogue = Product<N0>;
#endif
using Ready = Epilogue::Ready;

using Cuts = Cut<K, UNIT_ROWS, PAIRED, N0, TYPE1 == NONE ? 0 : N1, TYPE2 == NONE ? 0 : N2>;
constexpr int PITCH = Cuts::PITCH, UNIT_GROUPS = Cuts::UNIT_GROUPS;
constexpr int PASS_GROUPS = PASS_UNITS * UNIT_GROUPS;
constexpr int STAGE_BYTES = larger(S0::MAX_BYTES, larger(S1::MAX_BYTES, S2::MAX_BYTES));

constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int BARRIER_BYTES = (WARPS * STAGES * 8 + 15) / 16 * 16;
constexpr int X_BYTES = X_BYTES_OF<K, ROWS, FLOAT_ACTIVATIONS>;
constexpr int PARTIAL_BYTES = ROWS * PASS_GROUPS * TILE_ROWS * PITCH * 4;
constexpr int SHARED_BYTES = RING_BYTES + BARRIER_BYTES + X_BYTES + PARTIAL_BYTES + ROWS * 4;

template <int TYPE, class R> DEVICE void dot_type(float (&sum)[ROWS * LANE_ROWS], R& ring, const X& x, const Slots<TYPE>& slots, int slice) {
  if constexpr (TYPE != NONE)
    dot_tile<TYPE, ROWS, FLOAT_ACTIVATIONS>(sum, [&] { return ring.wait(); }, x, slots, slice, Tiles<TYPE, K>::blocks(slice), ring.lane);
}

// One copy of the code for each type, not for each matrix.
DEVICE bool has_type0(int segment) { return segment == 0 || (segment == 1 && TYPE1 == TYPE0) || (segment == 2 && TYPE2 == TYPE0); }
DEVICE bool has_type1(int segment) { return segment == 1 || TYPE2 == TYPE1; }  // of the others

struct MatvecArgs {
  const u8* weights[3];
  const float* bias[3];
  Rows in;               // x
  const float* in_gain;  // the norm's weight, for float activations only
  Epilogue out;
  int n_rows;            // of x
  STAMPS
};

DEVICE float bias_of(const MatvecArgs& a, const Output& o) {
  const float* bias = o.segment == 0 ? a.bias[0] : o.segment == 1 ? a.bias[1] : a.bias[2];
  return !PAIRED && bias && o.live ? bias[o.n] : 0.f;
}

KERNEL(WARPS * 32, 1) matvec(ARGS(MatvecArgs, a)) {
  DYNAMIC_SHARED(shared);
  u8* const x_memory = shared + RING_BYTES + BARRIER_BYTES;
  float* const partial = (float*)(x_memory + X_BYTES);
  float* const inverse_rms = partial + PARTIAL_BYTES / 4;
  const int lane = kept(threadIdx.x & 31), warp = threadIdx.x >> 5;
  const int first = first_unit(blockIdx.x), last = first_unit(blockIdx.x + 1);
  const int tiles = (last - first) * UNIT_GROUPS * SLICES;

  Ring<STAGES, STAGE_BYTES> ring(shared + warp * STAGES * STAGE_BYTES, (u64*)(shared + RING_BYTES) + warp * STAGES, lane);
  auto request = [&](int stage, int t) {
    if (t >= tiles) return ring.request(stage, nullptr, 0);
    const Place p = Cuts::place(first, t);
    const u8* const weights = p.segment == 0 ? a.weights[0] : p.segment == 1 ? a.weights[1] : a.weights[2];
    if (has_type0(p.segment)) ring.request(stage, S0::tile(weights, p.group, p.slice), S0::bytes(p.slice));
    else if (has_type1(p.segment)) ring.request(stage, S1::tile(weights, p.group, p.slice), S1::bytes(p.slice));
    else ring.request(stage, S2::tile(weights, p.group, p.slice), S2::bytes(p.slice));
  };
#pragma unroll 1
  for (int s = 0; s < EARLY; ++s) request(s, warp + s * WARPS);

  dependents_launch();
  const Slots<TYPE0> slots0(lane);
  const Slots<TYPE1> slots1(lane);
  const Slots<TYPE2> slots2(lane);
  const int first_row = blockIdx.y * ROWS, rows = min(ROWS, a.n_rows - first_row);
  // This thread's first output, in the first pass.
  Output mine = Cuts::output(first, min(PASS_UNITS, last - first), rows, threadIdx.x);
  Ready ready = a.out.prepare(first_row + mine.row, mine.segment, mine.n, mine.live);
  float bias = bias_of(a, mine);
  BEGIN(a);
  a.out.fetch(ready, first_row + mine.row, mine.n, mine.live);
  const int normed = WARPS - 1 - warp;  // the last warps: the first are busy with x
  RowNorm<K> norm;
  if (NORM && normed < rows) norm.load(a.in, first_row + normed, lane);
  load_x<K, ROWS, FLOAT_ACTIVATIONS, NORM, WARPS>(a.in, a.in_gain, first_row, rows, x_memory, [&] {
#pragma unroll 1
    for (int s = EARLY; s < STAGES; ++s) request(s, warp + s * WARPS);
  });
  sync_block();
  if (NORM && normed < rows) {
    const float v = norm.inverse_rms(EPS);
    if (lane == 0) inverse_rms[normed] = v;
  }
  a.out.settle(ready, mine.segment, mine.n, mine.live);
  const X x = x_at<K, ROWS, FLOAT_ACTIVATIONS>(x_memory);

  int t = warp;
  for (int unit = first; unit < last; unit += PASS_UNITS) {
    const int units = min(PASS_UNITS, last - unit), base = (unit - first) * UNIT_GROUPS;
    for (const int end = (base + units * UNIT_GROUPS) * SLICES; t < end; t += WARPS) {
      const Place p = Cuts::place(first, t);
      float sum[ROWS * LANE_ROWS] = {};
      if (has_type0(p.segment)) dot_type<TYPE0>(sum, ring, x, slots0, p.slice);
      else if (has_type1(p.segment)) dot_type<TYPE1>(sum, ring, x, slots1, p.slice);
      else dot_type<TYPE2>(sum, ring, x, slots2, p.slice);
      sync_warp();
      request(ring.stage, t + STAGES * WARPS);
      ring.advance();
      const float total = sum_transposed<16>(sum, lane);
      constexpr int share = 16 / (ROWS * LANE_ROWS);
      if (lane % share == 0) {
        const int value = lane % 16 / share, tile_row = lane / 16 * LANE_ROWS + value % LANE_ROWS;
        const int row = (t / SLICES - base) * TILE_ROWS + tile_row;
        partial[(value / LANE_ROWS * PASS_GROUPS * TILE_ROWS + row) * PITCH + p.slice] = total;
      }
    }
    sync_block();

    auto result = [&](int row, int local) {  // sum over the slices, in order
      const float* p = partial + (row * PASS_GROUPS * TILE_ROWS + local) * PITCH;
      float v = p[0];
#pragma unroll
      for (int s = 1; s < SLICES; ++s) v += p[s];
      return NORM ? v * inverse_rms[row] : v;
    };
    const int all = units * UNIT_ROWS * rows;
    for (int i = threadIdx.x; i < (all + 31) / 32 * 32; i += WARPS * 32) {
      if (i != threadIdx.x || unit != first) {
        mine = Cuts::output(unit, units, rows, i);
        ready = a.out.prepare(first_row + mine.row, mine.segment, mine.n, mine.live);
        a.out.fetch(ready, first_row + mine.row, mine.n, mine.live);
        a.out.settle(ready, mine.segment, mine.n, mine.live);
        bias = bias_of(a, mine);
      }
#if PAIRED
      const float gate = result(mine.row, mine.local), up = result(mine.row, mine.local + UNIT_ROWS);
      a.out.finish(ready, first_row + mine.row, mine.n, gate, up, mine.live);
#else
      a.out.finish(ready, first_row + mine.row, mine.segment, mine.n, result(mine.row, mine.local) + bias, mine.live);
#endif
    }
    if (unit + PASS_UNITS < last) sync_block();
  }
}
HOST_ENTRY(matvec, MatvecArgs)
