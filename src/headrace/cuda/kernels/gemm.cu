// Y = X Wᵀ on tensor cores, straight from the packed tiles: for the many rows of a prompt, where the products are
// the work, and nothing else may keep the tensor cores waiting; and for few, where the weights' bytes are.
//
// A block takes 128 rows of W and TOKENS rows of x at a time. Each of its eight warps unpacks its own 16 rows
// of W in registers, a step of 64 columns ahead (fragments.cuh), so W never lies in shared memory. x streams
// through a ring of stages there: on sm_90 and later warp 0 has tiles of eight kilobytes copied; before, all
// warps copy. Hopper multiplies by wgmma, four warps together and asynchronously, others by mma.
//
// The columns may be split among SPLITS blocks, to give every multiprocessor as much: the last of them adds the
// parts up, in order. A row's result depends on that and the row, and on nothing else.
//
// Macros: K; TYPE0…2, N0…2; PAIRED, NORM, EPS, EPILOGUE as in matvec.cu; TOKENS (a power of two from 8 to 256); SPLITS;
// STAGES; and the epilogue's own.
#include "epilogues.cuh"
#include "fragments.cuh"
#include "segments.cuh"

#define OVERLAP (WGMMA && TOKENS > 64)  // the next step is unpacked while one is multiplied

constexpr int WARPS = 8, UNIT = 64;
constexpr int STEPS = (K + STEP_COLUMNS - 1) / STEP_COLUMNS, GRAIN = STEPS % 4 ? 1 : 4;  // a split begins with a block of 256
constexpr int WIDE = TOKENS < 128 ? TOKENS : 128, PARTS = TOKENS / WIDE;  // of a wgmma
constexpr int TILE_ROWS_X = TOKENS < 64 ? TOKENS : 64, TILE_BYTES = 64 * STEP_COLUMNS * 2, COPY_BYTES = TILE_ROWS_X * STEP_COLUMNS * 2;
constexpr int STAGE_BYTES = TOKENS * STEP_COLUMNS * 2, PITCH = 20, AT_ONCE = TILE_ROWS_X;
constexpr int SLAB_BYTES = AT_ONCE * PITCH * 4, BARRIER_BYTES = (2 * STAGES * 8 + 15) / 16 * 16;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + WARPS * SLAB_BYTES + BARRIER_BYTES + TOKENS * 4 + 16;

// Units of 64 rows of W, each of one matrix; of a pair, 32 rows of gate and the same of up.
constexpr int UNITS0 = PAIRED ? (N0 + 31) / 32 : (N0 + UNIT - 1) / UNIT;
constexpr int UNITS1 = PAIRED || TYPE1 == NONE ? 0 : (N1 + UNIT - 1) / UNIT;
constexpr int UNITS2 = PAIRED || TYPE2 == NONE ? 0 : (N2 + UNIT - 1) / UNIT;
constexpr int UNITS = UNITS0 + UNITS1 + UNITS2, PAIRS = (UNITS + 1) / 2;

struct GemmArgs {
  const u8* weights[3];
  const float* bias[3];
  Rows in;         // whose first row begins a tile
  Epilogue out;
  float* partial;  // [token tiles, PAIRS, SPLITS, WARPS, TOKENS / 2, lane], if there are splits
  u32* arrived;    // [token tiles, PAIRS], zero between launches
  int n_rows;
  STAMPS
};

// A warp's sixteen rows of W: those from `row` on; of a pair eight of each matrix.
struct Place { int segment, row; };

DEVICE Place place(int unit, int warp) {
  if (PAIRED) return {0, unit * 32 + warp * 8};
  int segment = 0;
  if (TYPE1 != NONE && unit >= UNITS0) unit -= UNITS0, segment = 1;
  if (TYPE2 != NONE && segment == 1 && unit >= UNITS1) unit -= UNITS1, segment = 2;
  return {segment, unit * UNIT + warp * 16};
}

#if ARCH >= 80
struct Turn {  // a stage of the ring, and the parity of the round
  int stage = 0;
  u32 parity = 0;
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// x of the next steps in shared memory: TOKENS rows × 64 columns a stage. A stage is filled again AHEAD steps
// before its use: at once where a barrier of the block says that everybody has read it; else a step later.
struct XRing {
  static constexpr int AHEAD = ARCH >= 90 ? STAGES - 2 : STAGES - 1;
  const u8* const x;   // the block's first tile
  u8* const stages;
  u64 *const full, *const empty;
  const int tiles, begin, end;  // tiles of rows; the block's columns, in steps
  int left, column;    // steps still to request; the next
  Turn now, next;      // to use, to request

  DEVICE XRing(const GemmArgs& a, u8* shared, u64* barriers, int first_row, int rows, int first, int last, int units)
      : x((const u8*)a.in.brain + (u64)((a.in.first + first_row) / 64) * (brain_tiles(K) * TILE_BYTES) + (a.in.first + first_row) % 64 * 128),
        stages(shared), full(barriers), empty(barriers + STAGES), tiles((rows + 63) / 64), begin(first), end(last),
        left(units * (last - first)), column(first) {}
  DEVICE const u8* tile(int i) const { return x + ((u64)i * brain_tiles(K) + column) * TILE_BYTES; }

  DEVICE void request() {
    u8* stage = stages + next.stage * STAGE_BYTES;
#if ARCH >= 90
    if (threadIdx.x < 32 && left > 0) {
      barrier_wait(&empty[next.stage], next.parity ^ 1);
      if (threadIdx.x == 0) barrier_arrive_expect(&full[next.stage], tiles * COPY_BYTES);
      sync_warp();
      if (threadIdx.x < tiles) copy_bulk(stage + threadIdx.x * COPY_BYTES, tile(threadIdx.x), COPY_BYTES, &full[next.stage]);
    }
#else
    constexpr int PIECES = COPY_BYTES / 16;
    if (left > 0)
      for (int i = threadIdx.x; i < tiles * PIECES; i += WARPS * 32)
        copy_async16(stage + i * 16, tile(i / PIECES) + i % PIECES * 16);
    copy_commit();
#endif
    --left;
    if (++column == end) column = begin;
    next.advance();
  }
  DEVICE const u8* wait() {
#if ARCH >= 90
    request();
    barrier_wait(&full[now.stage], now.parity);
#else
    copy_wait<STAGES - 2>();
    sync_block();  // what was read a step ago is free
    request();
#endif
    return stages + now.stage * STAGE_BYTES;
  }
  DEVICE void release() {
#if ARCH >= 90
    sync_warp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(&empty[now.stage]);
#endif
    now.advance();
  }
};

struct Sums { float part[PARTS][WIDE / 2]; };  // [rows line and line + 8] × [tokens 8t + 2q, + 1], as mma has them

// sums += this warp's 16 × 64 weights × all tokens' 64 columns.
DEVICE void multiply(Sums& sums, const Operand& upper, const Operand& lower, const u8* x) {
#if WGMMA
  const u64 descriptor = wgmma_descriptor(x);
  wgmma_fence();
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const u32 a[4] = {upper.w[g][0], lower.w[g][0], upper.w[g][1], lower.w[g][1]};
#pragma unroll
    for (int p = 0; p < PARTS; ++p) wgmma_brain<WIDE>(sums.part[p], a, descriptor + (p * WIDE * 128 + g * 32) / 16);
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

// Waits for what multiply() began.
DEVICE void multiplied(Sums& sums, Operand& upper, Operand& lower) {
#if WGMMA
  wgmma_wait();
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) pin(sums.part[i / (WIDE / 2)][i % (WIDE / 2)]);
#pragma unroll
  for (int i = 0; i < 8; ++i) pin(upper.w[i >> 1][i & 1]), pin(lower.w[i >> 1][i & 1]);
#endif
}

// Asks L2 for a slice of the tiles of eight rows: with few tokens a step is too short for the loads of the next
// to come from memory.
template <class T> DEVICE void prefetch(const u8* tiles, int slice) {
  if (slice >= T::SLICES) return;
  for (int tile = 0; tile < 2; ++tile)
    for (u32 i = (threadIdx.x & 31) * 32; i < T::bytes(slice); i += 32 * 32) prefetch_l2(tiles + T::offset(tile, slice) + i);
}

// One unit: all columns. UPPER and LOWER: the types of a lane's two rows.
template <int UPPER, int LOWER> DEVICE void accumulate(Sums& sums, const GemmArgs& a, XRing& ring, const Place& p) {
  if constexpr (UPPER != NONE && LOWER != NONE) {
    using WU = Weights<UPPER>;
    using WL = Weights<LOWER>;
    using TU = Tiles<UPPER, K>;
    using TL = Tiles<LOWER, K>;
    const int line = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
    auto pick = [&](int segment) { return segment == 0 ? a.weights[0] : segment == 1 ? a.weights[1] : a.weights[2]; };
    const int n = p.segment == 0 ? S0::ROWS_PADDED : p.segment == 1 ? S1::ROWS_PADDED : S2::ROWS_PADDED;
    const int row = min(p.row, n - (PAIRED ? 8 : 16));  // rows beyond the last: computed, not kept
    const int slice = ring.begin / STEPS_A_SLICE, first = ring.begin % STEPS_A_SLICE;
    const u8 *upper_8 = pick(p.segment) + TU::offset(row / TILE_ROWS, 0);  // the tiles of eight rows
    const u8 *lower_8 = PAIRED ? pick(1) + TL::offset(row / TILE_ROWS, 0) : upper_8 + TL::offset(2, 0);
    const u64 tile = line / TILE_ROWS;
    At at = {upper_8 + TU::offset(tile, slice), TU::blocks(slice), line % TILE_ROWS, quad, first, slice};
    At other = {lower_8 + TL::offset(tile, slice), TL::blocks(slice), line % TILE_ROWS, quad, first, slice};
    const u64 apart = lower_8 - upper_8;
    auto lower_at = [&] {  // of equal types, one place is enough
      At lower = UPPER == LOWER ? at : other;
      if (UPPER == LOWER) lower.tile += apart;
      return lower;
    };
    typename WU::Raw raw_upper;
    typename WL::Raw raw_lower;
    // A block of one step, or of four.
    constexpr int BLOCK = larger(WU::STEPS, WL::STEPS);
    static_assert(GRAIN % BLOCK == 0);
    const int blocks = (ring.end - ring.begin) / BLOCK;
    int left = blocks - 1;
    auto load = [&](int quarter) {
      WU::load(raw_upper, at, quarter);
      WL::load(raw_lower, lower_at(), quarter);
    };
    auto unpack = [&](Operand& upper, Operand& lower, int quarter) {
      WU::unpack(upper, raw_upper, quad, quarter);
      WL::unpack(lower, raw_lower, quad, quarter);
    };
    auto advance = [&] {  // what is loaded last is loaded again: cheaper than a branch
      if (left-- <= 0) return;
      at.advance<TU, BLOCK>();
      if (UPPER != LOWER) other.advance<TL, BLOCK>();
      if (TOKENS <= 64 && at.step == 0) {
        prefetch<TU>(upper_8, at.slice + 1);
        prefetch<TL>(lower_8, at.slice + 1);
      }
    };
    if (TOKENS <= 64)
      for (int ahead = 0; ahead < 2; ++ahead) {
        prefetch<TU>(upper_8, slice + ahead);
        prefetch<TL>(lower_8, slice + ahead);
      }
    Operand upper, lower;
    load(0);
#if OVERLAP
    Operand next_upper, next_lower;
    unpack(next_upper, next_lower, 0);
    if (BLOCK == 1) advance();
    load(1 % BLOCK);
#endif
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
#pragma unroll
      for (int quarter = 0; quarter < BLOCK; ++quarter) {
#if OVERLAP
        upper = next_upper;
        lower = next_lower;
        multiply(sums, upper, lower, ring.wait());
        unpack(next_upper, next_lower, (quarter + 1) % BLOCK);
        if ((quarter + 2) % BLOCK == 0) advance();
        load((quarter + 2) % BLOCK);
#else
        unpack(upper, lower, quarter);
        if (quarter + 1 == BLOCK) advance();
        load((quarter + 1) % BLOCK);
        multiply(sums, upper, lower, ring.wait());
#endif
        multiplied(sums, upper, lower);
        ring.release();
      }
    }
  }
}

// The sums of all splits, in order; false in the blocks that are not the last to arrive.
DEVICE bool join(const GemmArgs& a, Sums& sums, int pair, int* last) {
  constexpr int OF_A_WARP = TOKENS / 2 * 32, OF_A_SPLIT = WARPS * OF_A_WARP;
  const u32 place = blockIdx.x * PAIRS + pair;
  float* const parts = a.partial + (u64)place * (SPLITS * OF_A_SPLIT) + (threadIdx.x >> 5) * OF_A_WARP + (threadIdx.x & 31);
  float* const mine = parts + blockIdx.z * OF_A_SPLIT;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) mine[i * 32] = sums.part[i / (WIDE / 2)][i % (WIDE / 2)];
  fence_device();
  sync_block();
  if (threadIdx.x == 0) *last = atomic_add(a.arrived + place, 1) == SPLITS - 1;
  sync_block();
  if (!*last) return false;
  fence_device();
  if (threadIdx.x == 0) a.arrived[place] = 0;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) {
    float v = 0.f;
#pragma unroll
    for (int split = 0; split < SPLITS; ++split) v += load_fresh(parts + split * OF_A_SPLIT + i * 32);
    sums.part[i / (WIDE / 2)][i % (WIDE / 2)] = v;
  }
  return true;
}

// What follows: 64 tokens at a time through the warp's own shared memory, sixteen lanes a token.
DEVICE void finish(const GemmArgs& a, const Sums& sums, float* slab, const float* inverse, const Place& p, bool any, int first_row, int rows) {
  constexpr int OUTPUTS = PAIRED ? 8 : 16, TOKENS_A_WARP = 32 / OUTPUTS, BATCH = TOKENS > 32 ? 4 : 2;
  const int lane = threadIdx.x & 31, line = lane >> 2, quad = lane & 3;
  const int o = lane % OUTPUTS, n = p.row + o;
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

// 1/rms of each row: eight lanes a row, all of their loads in flight.
DEVICE void inverse_rms(const GemmArgs& a, int first_row, int rows, float* inverse) {
  constexpr int GROUPS = K / GROUP;
  const int lane = threadIdx.x & 7;
  for (int t = threadIdx.x / 8; t < (rows + 3) / 4 * 4; t += WARPS * 4) {
    const float2* squares = (const float2*)a.in.row<K>(first_row + min(t, rows - 1)).squares;
    float2 s = {0.f, 0.f};
#pragma unroll 16
    for (int i = lane; i < GROUPS / 2; i += 8) {
      const float2 v = load_fresh(squares + i);
      s.x += v.x, s.y += v.y;
    }
    float sum = s.x + s.y;
#pragma unroll
    for (int step = 4; step; step >>= 1) sum += shuffle_xor(sum, step);
    if (lane == 0 && t < rows) inverse[t] = rsqrtf(sum * (1.f / K) + EPS);
  }
}
#endif

KERNEL(WARPS * 32, WGMMA && TOKENS <= 16 ? 2 : 1) gemm(ARGS(GemmArgs, a)) {
#if ARCH >= 80
  DYNAMIC_SHARED(shared);
  float* const slabs = (float*)(shared + STAGES * STAGE_BYTES);
  u64* const barriers = (u64*)(shared + STAGES * STAGE_BYTES + WARPS * SLAB_BYTES);
  float* const inverse = (float*)((u8*)barriers + BARRIER_BYTES);
  int* const last = (int*)(inverse + TOKENS);
  const int warp = threadIdx.x >> 5;
  // Blocks side by side have other rows of x and the same of W, which L2 then holds.
  const int first_row = blockIdx.x * TOKENS, rows = min(TOKENS, a.n_rows - first_row);
  const int pairs = PAIRS > (int)blockIdx.y ? (PAIRS - 1 - (int)blockIdx.y) / (int)gridDim.y + 1 : 0;
  auto split = [](int z) { return z * (STEPS / GRAIN) / SPLITS * GRAIN; };
  XRing ring(a, shared, barriers, first_row, rows, split(blockIdx.z), split(blockIdx.z + 1), pairs);
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
    if (SPLITS > 1 && !join(a, sums, pair, last)) continue;
    finish(a, sums, slabs + warp * (SLAB_BYTES / 4), inverse, p, any, first_row, rows);
  }
#endif
}
HOST_ENTRY(gemm, GemmArgs)
