// Y = X Wᵀ for the many rows of a prompt, on tensor cores, straight from the packed tiles: what matmul.cu does
// for few rows. Here the products are the work, so nothing else may keep the tensor cores waiting.
//
// A block takes 128 rows of W and TOKENS rows of x at a time. Each of its eight warps unpacks its own 16 rows
// of W in registers, a step of 64 columns ahead (fragments.cuh), so W never lies in shared memory. x streams
// through a ring of stages there: on sm_90 and later warp 0 has tiles of eight kilobytes copied; before, all
// warps copy. Hopper multiplies by wgmma, four warps together and asynchronously, others by mma.
//
// A row's result depends on nothing but the row: columns are summed in order, in one accumulator.
//
// Macros: K; TYPE0…2, N0…2; PAIRED, NORM, EPS, EPILOGUE as in matvec.cu; TOKENS (64, 128 or 256); STAGES; and the
// epilogue's own.
#include "epilogues.cuh"
#include "fragments.cuh"
#include "segments.cuh"

constexpr int WARPS = 8, UNIT = 64, TILE_BYTES = 64 * STEP_COLUMNS * 2;
constexpr int STEPS = (K + STEP_COLUMNS - 1) / STEP_COLUMNS, WIDE = TOKENS < 128 ? TOKENS : 128, PARTS = TOKENS / WIDE;
constexpr int STAGE_BYTES = TOKENS / 64 * TILE_BYTES, PITCH = 20, AT_ONCE = 64;
constexpr int SLAB_BYTES = AT_ONCE * PITCH * 4, BARRIER_BYTES = (2 * STAGES * 8 + 15) / 16 * 16;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + WARPS * SLAB_BYTES + BARRIER_BYTES + TOKENS * 4;

// Units of 64 rows of W, each of one matrix; of a pair, 32 rows of gate and the same of up.
constexpr int UNITS0 = PAIRED ? (N0 + 31) / 32 : (N0 + UNIT - 1) / UNIT;
constexpr int UNITS1 = PAIRED || TYPE1 == NONE ? 0 : (N1 + UNIT - 1) / UNIT;
constexpr int UNITS2 = PAIRED || TYPE2 == NONE ? 0 : (N2 + UNIT - 1) / UNIT;
constexpr int UNITS = UNITS0 + UNITS1 + UNITS2, PAIRS = (UNITS + 1) / 2;

struct GemmArgs {
  const u8* weights[3];
  const float* bias[3];
  Rows in;    // whose first row begins a tile
  Epilogue out;
  int n_rows;
  STAMPS
};

// A warp's sixteen rows of W: eight from `upper` on, and eight from `lower` on.
struct Place { int segment, upper, lower; };

DEVICE Place place(int unit, int warp) {
  if (PAIRED) return {0, unit * 32 + warp * 8, unit * 32 + warp * 8};
  int segment = 0;
  if (TYPE1 != NONE && unit >= UNITS0) unit -= UNITS0, segment = 1;
  if (TYPE2 != NONE && segment == 1 && unit >= UNITS1) unit -= UNITS1, segment = 2;
  return {segment, unit * UNIT + warp * 16, unit * UNIT + warp * 16 + 8};
}

#if ARCH >= 80
// x of the next steps in shared memory: TOKENS rows × 64 columns a stage. A stage is filled again AHEAD steps
// before its use: at once where a barrier of the block says that everybody has read it; else a step later.
struct XRing {
  static constexpr int AHEAD = ARCH >= 90 ? STAGES - 2 : STAGES - 1;
  const u8* x;  // the block's first tile
  u8* stages;
  u64 *full, *empty;
  int tiles, steps, step = 0, requested = 0;

  DEVICE XRing(const GemmArgs& a, u8* shared, u64* barriers, int first_row, int rows, int n_steps)
      : x((const u8*)(a.in.brain + (u64)((a.in.first + first_row) / 64) * (brain_tiles(K) * BRAIN_TILE))),
        stages(shared), full(barriers), empty(barriers + STAGES), tiles((rows + 63) / 64), steps(n_steps) {}
  DEVICE const u8* tile(int i, int s) const { return x + ((u64)i * brain_tiles(K) + s % STEPS) * TILE_BYTES; }

  DEVICE void request() {
    const int s = requested++;
    u8* stage = stages + s % STAGES * STAGE_BYTES;
#if ARCH >= 90
    if (threadIdx.x >= 32 || s >= steps) return;
    barrier_wait(&empty[s % STAGES], (s / STAGES & 1) ^ 1);
    if (threadIdx.x == 0) barrier_arrive_expect(&full[s % STAGES], tiles * TILE_BYTES);
    sync_warp();
    if (threadIdx.x < tiles) copy_bulk(stage + threadIdx.x * TILE_BYTES, tile(threadIdx.x, s), TILE_BYTES, &full[s % STAGES]);
#else
    constexpr int PIECES = TILE_BYTES / 16;
    if (s < steps)
      for (int i = threadIdx.x; i < tiles * PIECES; i += WARPS * 32)
        copy_async16(stage + i * 16, tile(i / PIECES, s) + i % PIECES * 16);
    copy_commit();
#endif
  }
  DEVICE const u8* wait() {
#if ARCH >= 90
    request();
    barrier_wait(&full[step % STAGES], step / STAGES & 1);
#else
    copy_wait<STAGES - 2>();
    sync_block();  // what was read a step ago is free
    request();
#endif
    return stages + step % STAGES * STAGE_BYTES;
  }
  DEVICE void release() {
#if ARCH >= 90
    sync_warp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(&empty[step % STAGES]);
#endif
    ++step;
  }
};

struct Sums { float part[PARTS][WIDE / 2]; };  // [rows line and line + 8] × [tokens 8t + 2q, + 1], as mma has them

// sums += this warp's 16 × 64 weights × all tokens' 64 columns.
DEVICE void multiply(Sums& sums, const Operand& upper, const Operand& lower, const u8* x) {
#if WGMMA
  wgmma_fence();
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const u32 a[4] = {upper.w[g][0], lower.w[g][0], upper.w[g][1], lower.w[g][1]};
#pragma unroll
    for (int p = 0; p < PARTS; ++p) wgmma_brain<WIDE>(sums.part[p], a, x + p * (WIDE * 128) + g * 32);
  }
  wgmma_commit();
#else
  const int lane = threadIdx.x & 31, line = lane >> 2, quad = lane & 3;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const u32 a[4] = {upper.w[g][0], lower.w[g][0], upper.w[g][1], lower.w[g][1]};
#pragma unroll
    for (int t = 0; t < TOKENS / 8; ++t) {
      const u8* row = x + (8 * t + line) * 128 + quad * 4;
      float(&d)[4] = *(float(*)[4])&sums.part[t * 8 / WIDE][t * 4 % (WIDE / 2)];
      mma_brain(d, a, load32(row + ((2 * g) ^ line) * 16), load32(row + ((2 * g + 1) ^ line) * 16));
    }
  }
#endif
}

// One unit: all columns. UPPER and LOWER: the types of a lane's two rows.
template <int UPPER, int LOWER> DEVICE void accumulate(Sums& sums, const GemmArgs& a, XRing& ring, const Place& p) {
  if constexpr (UPPER != NONE && LOWER != NONE) {
    using WU = Weights<UPPER>;
    using WL = Weights<LOWER>;
    using TU = Tiles<UPPER, K>;
    using TL = Tiles<LOWER, K>;
    const int line = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
    const int lower_segment = PAIRED ? 1 : p.segment;
    auto pick = [&](int segment) { return segment == 0 ? a.weights[0] : segment == 1 ? a.weights[1] : a.weights[2]; };
    const int n = p.segment == 0 ? S0::ROWS_PADDED : p.segment == 1 ? S1::ROWS_PADDED : S2::ROWS_PADDED;
    const int u = min(p.upper + line, n - 1), l = min(p.lower + line, n - 1);  // rows beyond the last: computed, not kept
    const u8* upper_tiles = pick(p.segment) + TU::offset(u / TILE_ROWS, 0);
    const u8* lower_tiles = pick(lower_segment) + TL::offset(l / TILE_ROWS, 0);
    typename WU::Raw raw_upper;
    typename WL::Raw raw_lower;
    auto at_upper = [&](int s) {
      const int slice = s / STEPS_A_SLICE;
      return At{upper_tiles + slice * TU::FULL_BYTES, TU::blocks(slice), u % TILE_ROWS, s % STEPS_A_SLICE, quad};
    };
    auto at_lower = [&](int s) {
      const int slice = s / STEPS_A_SLICE;
      return At{lower_tiles + slice * TL::FULL_BYTES, TL::blocks(slice), l % TILE_ROWS, s % STEPS_A_SLICE, quad};
    };
    auto load = [&](int s) {
      WU::load(raw_upper, at_upper(s));
      WL::load(raw_lower, at_lower(s));
    };
    Operand upper, lower, next_upper, next_lower;
    auto unpack = [&](int s) {
      WU::unpack(next_upper, raw_upper, at_upper(s));
      WL::unpack(next_lower, raw_lower, at_lower(s));
    };
    load(0);
    unpack(0);
    load(min(1, STEPS - 1));
#pragma unroll 1
    for (int s = 0; s < STEPS; ++s) {
      upper = next_upper;
      lower = next_lower;
      multiply(sums, upper, lower, ring.wait());
      if (s + 1 < STEPS) {
        unpack(s + 1);
        load(min(s + 2, STEPS - 1));
      }
#if WGMMA
      wgmma_wait();
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) pin(sums.part[i / (WIDE / 2)][i % (WIDE / 2)]);
#pragma unroll
      for (int i = 0; i < 8; ++i) pin(upper.w[i >> 1][i & 1]), pin(lower.w[i >> 1][i & 1]);
#endif
      ring.release();
    }
  }
}

// What follows: 64 tokens at a time through the warp's own shared memory, sixteen lanes a token.
DEVICE void finish(const GemmArgs& a, const Sums& sums, float* slab, const float* inverse, const Place& p, bool any, int first_row, int rows) {
  constexpr int OUTPUTS = PAIRED ? 8 : 16, TOKENS_A_WARP = 32 / OUTPUTS, BATCH = 4;
  const int lane = threadIdx.x & 31, line = lane >> 2, quad = lane & 3;
  const int o = lane % OUTPUTS, n = p.upper + o;
  const int limit = p.segment == 0 ? N0 : p.segment == 1 ? N1 : N2;
  const float* bias = p.segment == 0 ? a.bias[0] : p.segment == 1 ? a.bias[1] : a.bias[2];
  const float shift = !PAIRED && bias && n < limit ? bias[n] : 0.f;
#pragma unroll
  for (int chunk = 0; chunk < TOKENS / AT_ONCE; ++chunk) {
#pragma unroll
    for (int t = 0; t < AT_ONCE / 8; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = chunk * AT_ONCE + 8 * t;
        slab[(8 * t + 2 * quad + (i & 1)) * PITCH + line + 8 * (i >> 1)] = sums.part[column / WIDE][column % WIDE / 2 + i];
      }
    sync_warp();
#pragma unroll 1
    for (int t = lane / OUTPUTS; t < AT_ONCE; t += BATCH * TOKENS_A_WARP) {
      Ready ready[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int token = chunk * AT_ONCE + t + i * TOKENS_A_WARP, row = first_row + min(token, rows - 1);
        const bool live = any && token < rows && n < limit;
        ready[i] = a.out.prepare(row, p.segment, n, live);
        a.out.fetch(ready[i], row, n, live);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int token = chunk * AT_ONCE + t + i * TOKENS_A_WARP, row = first_row + min(token, rows - 1);
        const bool live = any && token < rows && n < limit;
        const float scale = NORM ? inverse[min(token, rows - 1)] : 1.f, *y = slab + (t + i * TOKENS_A_WARP) * PITCH;
#if PAIRED
        a.out.finish(ready[i], row, n, y[o] * scale, y[o + 8] * scale, live);
#else
        a.out.finish(ready[i], row, p.segment, n, y[o] * scale + shift, live);
#endif
      }
    }
    sync_warp();
  }
}

// 1/rms of each row, a warp a row.
DEVICE void inverse_rms(const GemmArgs& a, int first_row, int rows, float* inverse) {
  const int lane = threadIdx.x & 31;
  for (int t = threadIdx.x >> 5; t < rows; t += WARPS) {
    const float* squares = a.in.row<K>(first_row + t).squares;
    float s = 0.f;
#pragma unroll 8
    for (int i = lane; i < K / GROUP; i += 32) s += load_fresh(squares + i);
    s = warp_sum(s);
    if (lane == 0) inverse[t] = rsqrtf(s * (1.f / K) + EPS);
  }
}
#endif

KERNEL(WARPS * 32, 1) gemm(ARGS(GemmArgs, a)) {
#if ARCH >= 80
  DYNAMIC_SHARED(shared);
  float* const slabs = (float*)(shared + STAGES * STAGE_BYTES);
  u64* const barriers = (u64*)(shared + STAGES * STAGE_BYTES + WARPS * SLAB_BYTES);
  float* const inverse = (float*)((u8*)barriers + BARRIER_BYTES);
  const int warp = threadIdx.x >> 5;
  // Blocks side by side have other rows of x and the same of W, which L2 then holds.
  const int first_row = blockIdx.x * TOKENS, rows = min(TOKENS, a.n_rows - first_row);
  const int pairs = PAIRS > (int)blockIdx.y ? (PAIRS - 1 - (int)blockIdx.y) / (int)gridDim.y + 1 : 0;
  XRing ring(a, shared, barriers, first_row, rows, pairs * STEPS);
#if ARCH >= 90
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&ring.full[s], 1);
      barrier_init(&ring.empty[s], WARPS);
    }
    barrier_init_fence();
  }
#endif
  dependents_launch();
  BEGIN(a);
  sync_block();
  for (int s = 0; s < XRing::AHEAD; ++s) ring.request();
  if (NORM) inverse_rms(a, first_row, rows, inverse);
  sync_block();
  for (int pair = blockIdx.y; pair < PAIRS; pair += gridDim.y) {
    const int unit = 2 * pair + (warp >> 2);
    const bool any = unit < UNITS;  // an odd number of units: the last pair computes one twice
    const Place p = place(any ? unit : UNITS - 1, warp & 3);
    Sums sums = {};
    const int s = p.segment;  // one copy of the code for each type, not for each matrix
    if (PAIRED) accumulate<TYPE0, TYPE1>(sums, a, ring, p);
    else if (s == 0 || (s == 1 && TYPE1 == TYPE0) || (s == 2 && TYPE2 == TYPE0))
      accumulate<TYPE0, TYPE0>(sums, a, ring, p);
    else if (s == 1 || TYPE2 == TYPE1) accumulate<TYPE1, TYPE1>(sums, a, ring, p);
    else accumulate<TYPE2, TYPE2>(sums, a, ring, p);
    finish(a, sums, slabs + warp * (SLAB_BYTES / 4), inverse, p, any, first_row, rows);
  }
#endif
}
HOST_ENTRY(gemm, GemmArgs)
