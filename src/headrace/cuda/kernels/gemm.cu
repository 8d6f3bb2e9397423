// Y = X Wᵀ on tensor cores, straight from the packed tiles: for the many rows of a prompt, where the products are
// the work, and nothing else may keep the tensor cores waiting; and for few, where the weights' bytes are.
//
// A block takes 128 rows of W and TOKENS rows of x at a time. Each of its eight warps unpacks its own 16 rows
// of W in registers, a step of 64 columns ahead (fragments.cuh), so W never lies in shared memory. x streams
// through a ring of stages there: on sm_90 and later warp 0 has tiles of up to eight kilobytes copied; before,
// all warps copy. Hopper multiplies by wgmma, four warps together and asynchronously, others by mma.
// Columns go by 256, four steps: what lies beyond K counts as zero.
//
// The columns may be split among SPLITS blocks, to give every multiprocessor as much: the last of them adds the
// parts up, in order. A row's result depends on that and the row, and on nothing else.
//
// Macros: K; TYPE0…2, N0…2; PAIRED, NORM, EPS, EPILOGUE as in matvec.cu; TOKENS (a power of two from 8 to 256); SPLITS;
// STAGE_STEPS (1, 2 or 4: the steps of a stage), STAGES; and the epilogue's own.
#include "fragments.cuh"
#include "gemm_epilogues.cuh"
#include "segments.cuh"
#include "wgmma.cuh"

constexpr int WARPS = 8, UNIT = 64, BLOCK = 4;  // steps
constexpr int BLOCKS = brain_tiles(K) / BLOCK;
// A step's weights are loaded so many steps before: as many as there are registers for.
constexpr int DISTANCE = TOKENS <= (WGMMA ? 128 : 32) ? 2 : 1;
constexpr int WIDE = TOKENS < 128 ? TOKENS : 128, PARTS = TOKENS / WIDE;  // of a wgmma
constexpr int TILE_ROWS_X = TOKENS < 64 ? TOKENS : 64, TILE_BYTES = 64 * STEP_COLUMNS * 2, COPY_BYTES = TILE_ROWS_X * STEP_COLUMNS * 2;
constexpr int STEP_BYTES = TOKENS * STEP_COLUMNS * 2, STAGE_BYTES = STAGE_STEPS * STEP_BYTES, AT_ONCE = TILE_ROWS_X;
// The outputs of so many warps are finished together: a group of 32 dims of a quantised cache is two warps'.
#if EPILOGUE == ROTARY && CACHE_Q8
constexpr int JOINED = 2;
#else
constexpr int JOINED = 1;
#endif
constexpr int PITCH = 16 * JOINED + 4, SLAB_BYTES = AT_ONCE * PITCH * 4 / JOINED, BARRIER_BYTES = (2 * STAGES * 8 + 15) / 16 * 16;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + WARPS * SLAB_BYTES + BARRIER_BYTES + TOKENS * 12 + 16;

// Units of 64 rows of W, each of one matrix; of a pair, 32 rows of gate and the same of up. Where outputs become
// activations, a unit's (a pair's two units') are those of one tile of them.
#define BY_TILES (EPILOGUE == RESIDUAL || EPILOGUE == PRODUCT)
constexpr int UNITS0 = (BY_TILES ? brain_tiles(N0) : (N0 + UNIT - 1) / UNIT) * (PAIRED ? 2 : 1);
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
  int n_rows, skip;  // of the rows, the first `skip` are nobody's
  STAMPS
};

// A warp's sixteen rows of W: those from `row` on; of a pair eight of each matrix.
struct Place { int segment, row; };

DEVICE Place place(int unit, int warp) {
  if (BY_TILES) {
    const int tile = PAIRED ? unit / 2 : unit, part = PAIRED ? unit % 2 * 4 + warp : 2 * warp;  // of eight
    return {0, tile / 4 * 256 + tile % 4 * 16 + part / 2 * 64 + part % 2 * 8};
  }
  int segment = 0;
  if (TYPE1 != NONE && unit >= UNITS0) unit -= UNITS0, segment = 1;
  if (TYPE2 != NONE && segment == 1 && unit >= UNITS1) unit -= UNITS1, segment = 2;
  return {segment, unit * UNIT + warp * 16};
}

#if ARCH >= 80
#include "x_ring.cuh"

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

DEVICE void pin(Operand& o) {
#if WGMMA
#pragma unroll
  for (int i = 0; i < 8; ++i) pin(o.w[i >> 1][i & 1]);
#endif
}

// Waits for what multiply() began.
DEVICE void multiplied(Sums& sums, Operand& upper, Operand& lower) {
#if WGMMA
  wgmma_wait();
#pragma unroll
  for (int p = 0; p < PARTS; ++p) pin(sums.part[p]);
#endif
  pin(upper), pin(lower);
}

// Asks L2 for a slice of the tiles of eight rows: a step is too short for the loads of the next to come from memory.
template <class T> DEVICE void prefetch(const u8* tiles, int slice) {
  if (slice >= T::SLICES) return;
  for (int tile = 0; tile < 2; ++tile) prefetch_l2(tiles + T::offset(tile, slice), T::bytes(slice));
}

// Where a warp's rows of W lie: the tiles of its first eight and of its last. UPPER, LOWER: their types.
template <int UPPER, int LOWER> struct Halves {
  using TU = Tiles<UPPER, K>;
  using TL = Tiles<LOWER, K>;
  const u8 *upper, *lower;
  DEVICE Halves(const GemmArgs& a, const Place& p) {
    auto pick = [&](int segment) { return segment == 0 ? a.weights[0] : segment == 1 ? a.weights[1] : a.weights[2]; };
    const int n = p.segment == 0 ? S0::ROWS_PADDED : p.segment == 1 ? S1::ROWS_PADDED : S2::ROWS_PADDED;
    const int row = min(p.row, n - (PAIRED ? 8 : 16));  // rows beyond the last: computed, not kept
    upper = pick(p.segment) + TU::offset(row / TILE_ROWS, 0);
    lower = PAIRED ? pick(1) + TL::offset(row / TILE_ROWS, 0) : upper + TL::offset(2, 0);
  }
  DEVICE void ask(int slice) const { prefetch<TU>(upper, slice), prefetch<TL>(lower, slice); }
};

// Calls f with the Halves of a place: one copy of the code for each type, not for each matrix.
template <class F> DEVICE void with_halves(const GemmArgs& a, const Place& p, F&& f) {
  const int s = p.segment;
  if constexpr (PAIRED) f(Halves<TYPE0, TYPE1>(a, p));
  else if (s == 0 || (s == 1 && TYPE1 == TYPE0) || (s == 2 && TYPE2 == TYPE0)) f(Halves<TYPE0, TYPE0>(a, p));
  else if constexpr (TYPE1 != NONE) {
    if (s == 1 || TYPE2 == TYPE1) f(Halves<TYPE1, TYPE1>(a, p));
    else if constexpr (TYPE2 != NONE) f(Halves<TYPE2, TYPE2>(a, p));
  }
}

// One unit: all columns. The first two slices have been asked for.
template <int UPPER, int LOWER> DEVICE void accumulate(Sums& sums, const Halves<UPPER, LOWER>& halves, XRing& ring) {
  using WU = Weights<UPPER>;
  using WL = Weights<LOWER>;
  using TU = Tiles<UPPER, K>;
  using TL = Tiles<LOWER, K>;
  const int line = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
  const int slice = ring.begin / STEPS_A_SLICE, first = ring.begin % STEPS_A_SLICE;
  const u64 tile = line / TILE_ROWS;
  At at = {halves.upper + TU::offset(tile, slice), TU::blocks(slice), line % TILE_ROWS, quad, first / BLOCK, slice};
  At other = {halves.lower + TL::offset(tile, slice), TL::blocks(slice), line % TILE_ROWS, quad, first / BLOCK, slice};
  const u64 apart = halves.lower - halves.upper;
  auto lower_at = [&] {  // of equal types, one place is enough
    At lower = UPPER == LOWER ? at : other;
    if (UPPER == LOWER) lower.tile += apart;
    return lower;
  };
  typename WU::Raw raw_upper;
  typename WL::Raw raw_lower;
  const int blocks = (ring.end - ring.begin) / BLOCK;
  int left = blocks - 1;
  auto load = [&](int quarter) {
    WU::load(raw_upper, at, quarter);
    WL::load(raw_lower, lower_at(), quarter);
  };
  struct Pair { Operand upper, lower; } even, odd;
  auto unpack = [&](Pair& p, int quarter) {
    unpack_brain<UPPER>(p.upper, raw_upper, quad, quarter);
    unpack_brain<LOWER>(p.lower, raw_lower, quad, quarter);
  };
  auto advance = [&] {  // what is loaded last is loaded again: cheaper than a branch
    if (left-- <= 0) return;
    at.advance<TU>();
    if (UPPER != LOWER) other.advance<TL>();
    if (at.block == 0) halves.ask(at.slice + 1);
  };
  auto load_ahead = [&](int quarter) {  // quarter: what was unpacked last
    const int next = (quarter + DISTANCE) % BLOCK;
    if (next == 0) advance();
    load(next);
  };
#pragma unroll
  for (int quarter = 0; quarter < DISTANCE; ++quarter) load(quarter);
#if WGMMA
  unpack(even, 0);
  load_ahead(0);
#endif
  auto step = [&](Pair& now, Pair& next, int quarter) {
#if WGMMA  // asynchronously: the next step is unpacked meanwhile
    multiply(sums, now.upper, now.lower, ring.wait(quarter));
    unpack(next, (quarter + 1) % BLOCK);
    load_ahead((quarter + 1) % BLOCK);
    ring.refill(quarter);
#else
    unpack(now, quarter);
    load_ahead(quarter);
    multiply(sums, now.upper, now.lower, ring.wait(quarter));
    ring.refill(quarter);
#endif
    multiplied(sums, now.upper, now.lower);
    ring.release(quarter);
  };
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
#pragma unroll
    for (int quarter = 0; quarter < BLOCK; quarter += 2) {
      step(even, odd, quarter);
      step(odd, even, quarter + 1);
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

#if PAIRED
// What follows: the products of gate and up, bfloat16, as rows of a tile of activations, and so to their place.
DEVICE void finish(const GemmArgs& a, const Sums& sums, u8* slabs, const float* inverse, const Where*, const Place& p, bool, int first_row, int rows) {
  const int line = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3, n = p.row + line;
  const int piece = n >> 1 & 7, within = (n >> 6 & 3) * 4 + (n & 1) * 2;  // as Row::brain_at has them
#pragma unroll
  for (int t = 0; t < TOKENS / 8; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * t + 2 * quad + i, at = 8 * t % WIDE / 2 + i;
      const float *part = sums.part[8 * t / WIDE], scale = NORM ? inverse[token] : 1.f;
      const float v = n < N0 ? activated(part[at] * scale, part[at + 2] * scale) : 0.f;  // columns beyond N0 stay zero
      *(u16*)(slabs + token * 128 + (piece ^ (token & 7)) * 16 + within) = (u16)pack_brain2(v, 0.f);
    }
  sync_block();
#pragma unroll 4
  for (int i = threadIdx.x; i < TOKENS * 8; i += WARPS * 32) {
    const int token = i / 8, from = i % 8;
    if (token < rows && token + first_row >= a.skip)
      *(uint4*)a.out.hidden.row<N0>(first_row + token).piece(p.row, from ^ (token & 7)) = *(const uint4*)(slabs + i * 16);
  }
  sync_block();
}
#else
// What follows: up to 64 tokens at a time through shared memory of the joined warps, four lanes of each a token.
DEVICE void finish(const GemmArgs& a, const Sums& sums, u8* slabs, const float* inverse, const Where* where, const Place& p, bool any, int first_row, int rows) {
  constexpr int BATCH = AT_ONCE < 32 ? AT_ONCE / 8 : 4, TOGETHER = 32 * JOINED;
  const int line = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3, part = threadIdx.x / 32 % JOINED;
  const int mine = threadIdx.x % TOGETHER / (4 * JOINED), column = threadIdx.x % (4 * JOINED) * 4, n = p.row - 16 * part + column;
  float* const slab = (float*)(slabs + threadIdx.x / TOGETHER * (JOINED * SLAB_BYTES));
  auto sync = [] { JOINED == 1 ? sync_warp() : sync_block(); };
  const int limit = p.segment == 0 ? N0 : p.segment == 1 ? N1 : N2, exist = any ? max(0, min(4, limit - n)) : 0;
  const float* bias = p.segment == 0 ? a.bias[0] : p.segment == 1 ? a.bias[1] : a.bias[2];
  float shift[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) shift[i] = bias && i < exist ? bias[n + i] : 0.f;
#pragma unroll
  for (int chunk = 0; chunk < TOKENS / AT_ONCE; ++chunk) {
#pragma unroll
    for (int t = 0; t < AT_ONCE / 8; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = chunk * AT_ONCE + 8 * t;
        slab[(8 * t + 2 * quad + (i & 1)) * PITCH + 16 * part + line + 8 * (i >> 1)] = sums.part[token / WIDE][token % WIDE / 2 + i];
      }
    sync();
#pragma unroll 1
    for (int first = mine; first < AT_ONCE; first += 8 * BATCH) {
      Ready ready[BATCH];
      auto token_of = [&](int i) { return chunk * AT_ONCE + first + 8 * i; };
      auto count_of = [&](int token) { return token < rows && token + first_row >= a.skip ? exist : 0; };
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int token = token_of(i);
        ready[i] = a.out.fetch(where[token], first_row + token, p.segment, n, count_of(token));
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int token = token_of(i);
        const float scale = NORM ? inverse[token] : 1.f;
        float4 y = *(const float4*)(slab + (first + 8 * i) * PITCH + column);
        y = make_float4(y.x * scale + shift[0], y.y * scale + shift[1], y.z * scale + shift[2], y.w * scale + shift[3]);
        a.out.finish(ready[i], first_row + token, p.segment, n, y, count_of(token));
      }
    }
    sync();
  }
}
#endif

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
  u8* const slabs = shared + STAGES * STAGE_BYTES;
  u64* const barriers = (u64*)(shared + STAGES * STAGE_BYTES + WARPS * SLAB_BYTES);
  float* const inverse = (float*)((u8*)barriers + BARRIER_BYTES);
  Where* const where = (Where*)(inverse + TOKENS);
  int* const last = (int*)(inverse + 3 * TOKENS);
  const int warp = threadIdx.x >> 5;
  // Blocks side by side have other rows of x and the same of W, which L2 then holds.
  const int first_row = blockIdx.x * TOKENS, rows = min(TOKENS, a.n_rows - first_row);
  const int pairs = PAIRS > (int)blockIdx.y ? (PAIRS - 1 - (int)blockIdx.y) / (int)gridDim.y + 1 : 0;
  auto split = [](int z) { return z * BLOCKS / SPLITS * BLOCK; };
  XRing ring(a.in, shared, barriers, first_row, rows, split(blockIdx.z), split(blockIdx.z + 1), pairs);
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
  auto unit_of = [&](int pair) { return 2 * pair + (warp >> 2); };
  auto place_of = [&](int pair) { return place(min(unit_of(pair), UNITS - 1), warp & 3); };
  auto ask_first = [&](const Place& p) {
    with_halves(a, p, [&](const auto& halves) {
      for (int ahead = 0; ahead < 2; ++ahead) halves.ask(ring.begin / STEPS_A_SLICE + ahead);
    });
  };
  if (pairs) ask_first(place_of(blockIdx.y));  // weights wait for no kernel
  BEGIN(a);
  sync_block();
  for (int s = 0; s < XRing::AHEAD; ++s) ring.request();
  if (NORM) inverse_rms(a, first_row, rows, inverse);
  for (int i = threadIdx.x; i < rows; i += WARPS * 32) where[i] = a.out.where(first_row + i);
  sync_block();
  for (int pair = blockIdx.y; pair < PAIRS; pair += gridDim.y) {
    const bool any = unit_of(pair) < UNITS;  // an odd number of units: the last pair computes one twice
    const Place p = place_of(pair);
    if (pair != blockIdx.y) ask_first(p);
    Sums sums = {};
    with_halves(a, p, [&](const auto& halves) { accumulate(sums, halves, ring); });
    if (SPLITS > 1 && !join(a, sums, pair, last)) continue;
    finish(a, sums, slabs, inverse, where, p, any, first_row, rows);
  }
#endif
}
HOST_ENTRY(gemm, GemmArgs)
