// Y = X Wᵀ for 2 to 16 rows of x, straight from the packed tiles on tensor cores: as fast as one row, since the
// weights' bytes are what takes time, as long as their unpacking stays well below it.
//
// Columns go by stripes of 256. A warp holds x of one stripe in registers, half precision (half_fragments.cuh), and
// multiplies with it all of the block's rows of W, 16 at a time, before it goes on to its next stripe. Weights go from
// device memory to registers, half a tile of 16 × 256 ahead, unpacked there by one multiplication and addition for
// two; L2 is asked for them AHEAD tiles before, the first ones while the previous kernel still runs. Blocks have
// equal bytes. The warps' sums meet in shared memory, added up in an order that depends on the matrix alone: a row's
// result is bit-equal whoever travels with it, on any grid.
//
// Macros: K; TYPE0…2, N0…2; PAIRED, NORM, EPS, EPILOGUE as in matvec.cu; UNIT_ROWS (16), GRID (segments.cuh); TOKENS
// (8 or 16); AREAS (of sums: stripe s adds to number s % AREAS); WARPS, STRIPE_WARPS (of them, so many, at most AREAS,
// share the stripes, the others the rows); PASS_UNITS (whose sums there is room for); AHEAD; and the epilogue's own.
#include "gemm_epilogues.cuh"
#include "half_fragments.cuh"
#include "segments.cuh"

constexpr int STRIPES = brain_tiles(K) / 4, ROW_WARPS = WARPS / STRIPE_WARPS, TOKEN_TILES = TOKENS / 8;
constexpr bool UNLIKE = PAIRED && TYPE1 != TYPE0;
constexpr int PASS_TILES = PASS_UNITS * (PAIRED ? 2 : 1), PITCH = 20;  // 8 × 4 lanes' sums meet no bank twice
constexpr int STAGE_BYTES = TOKENS * 512, SUM_FLOATS = PASS_TILES * TOKENS * PITCH;
constexpr int SHARED_BYTES = WARPS * STAGE_BYTES + AREAS * SUM_FLOATS * 4 + TOKENS * 4;
constexpr int UNIT_GROUPS = UNIT_ROWS / TILE_ROWS, UNITS0 = S0::ROWS_PADDED / UNIT_ROWS, UNITS1 = PAIRED ? 0 : S1::ROWS_PADDED / UNIT_ROWS;
constexpr int UNITS = UNITS0 + UNITS1 + S2::ROWS_PADDED / UNIT_ROWS;

struct SkinnyArgs {
  const u8* weights[3];
  const float* bias[3];
  Rows in;
  Epilogue out;
  int n_rows;
  STAMPS
};

// A unit's matrix, and which of its units it is.
struct Place { int segment, unit; };
DEVICE Place place(int unit) {
  if (PAIRED || TYPE1 == NONE || unit < UNITS0) return {0, unit};
  if (TYPE2 == NONE || unit < UNITS0 + UNITS1) return {1, unit - UNITS0};
  return {2, unit - UNITS0 - UNITS1};
}

// Units whose sums come together, of one type and at most two matrices: their sixteen rows each, then of a pair of
// like types up's of the same; of unlike ones a pass of gate's comes first, then one of up's.
struct Pass {
  int unit, units, segment;
  int here;                   // so many tiles lie from `rows` on, the others from `beyond`, both at their number × UNIT
  const u8 *rows, *beyond;
  DEVICE Pass(const SkinnyArgs& a, int first, int last, bool up) : unit(first), units(0), segment(up), here(0), rows(nullptr), beyond(nullptr) {
    if (first >= last) return;
    units = min(PASS_UNITS, last - first);
    if (PAIRED) {
      here = UNLIKE ? PASS_TILES : units;
      rows = (up ? a.weights[1] : a.weights[0]) + (u64)first * (up ? S1::GROUP_BYTES : S0::GROUP_BYTES) * UNIT_GROUPS;
      beyond = a.weights[1] + ((u64)first * S1::GROUP_BYTES - (u64)here * S1::GROUP_BYTES) * UNIT_GROUPS;
      return;
    }
    const Place at = place(first);
    segment = at.segment;
    const int ends[3] = {UNITS0, UNITS0 + UNITS1, UNITS};
    const bool joined = (segment == 0 && TYPE1 == TYPE0) || (segment == 1 && TYPE2 == TYPE1 && TYPE2 != NONE);
    here = (segment == 0 ? ends[0] : segment == 1 ? ends[1] : ends[2]) - first;
    units = min(units, joined ? (segment == 0 ? ends[1] : ends[2]) - first : here);
    const u64 unit_bytes = (u64)(segment == 0 ? S0::GROUP_BYTES : segment == 1 ? S1::GROUP_BYTES : S2::GROUP_BYTES) * UNIT_GROUPS;
    rows = (segment == 0 ? a.weights[0] : segment == 1 ? a.weights[1] : a.weights[2]) + at.unit * unit_bytes;
    beyond = (segment == 0 ? a.weights[1] : a.weights[2]) - here * unit_bytes;
  }
  DEVICE int tiles() const { return units * (PAIRED && !UNLIKE ? 2 : 1); }
  DEVICE bool complete() const { return !UNLIKE || segment == 1; }
  template <int TYPE> DEVICE const u8* tile(int t) const {
    return (t < here ? rows : beyond) + (u64)t * (Tiles<TYPE, K>::GROUP_BYTES * UNIT_GROUPS);
  }
};
DEVICE Pass next(const SkinnyArgs& a, const Pass& p, int last) {
  return p.complete() ? Pass(a, p.unit + p.units, last, false) : Pass(a, p.unit, last, true);
}

template <int TYPE> struct Of { static constexpr int value = TYPE; };
// Calls f with the type of a pass: one copy of the code for each type, not for each matrix.
template <class F> DEVICE void with_type(const Pass& p, F&& f) {
  const int s = p.segment;
  if (s == 0 || (s == 1 && TYPE1 == TYPE0) || (s == 2 && TYPE2 == TYPE0)) f(Of<TYPE0>());
  else if constexpr (TYPE1 != NONE) {
    if (s == 1 || TYPE2 == TYPE1) f(Of<TYPE1>());
    else if constexpr (TYPE2 != NONE) f(Of<TYPE2>());
  }
}

#if ARCH >= 80
struct Warp { int lane, stripe, row; };  // its first stripe and its first tile

// Asks L2 for one of a warp's tiles, `tile` counted on into its next stripes: of the four tiles of 1,024 columns that
// four warps (fewer at the end of a row) share, each asks for its own.
template <int TYPE> DEVICE void ask(const Warp& w, const Pass& pass, int stripe, int tile) {
  using T = Tiles<TYPE, K>;
  const int own = (pass.tiles() - w.row + ROW_WARPS - 1) / ROW_WARPS * ROW_WARPS;
  while (tile >= pass.tiles()) tile -= own, stripe += STRIPE_WARPS;
  if (stripe >= STRIPES) return;
  const int slice = stripe / 4, sharing = min(4, STRIPES - 4 * slice);
  for (int i = stripe % 4; i < 4; i += sharing) prefetch_l2(pass.tile<TYPE>(tile) + T::offset(i, slice), T::bytes(slice));
}

// x of a warp's next stripe on its way into the warp's own memory, as it lies in device memory.
DEVICE void copy_x(const SkinnyArgs& a, const Warp& w, int stripe, u8* stage) {
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    if (i >= a.n_rows) break;
    const u8* row = (const u8*)a.in.row<K>(i).brain + (u64)(stripe * 4 + w.lane / 8) * (BRAIN_TILE * 2);
    copy_async16(stage + (w.lane / 8 * TOKENS + i) * 128 + w.lane % 8 * 16, row + w.lane % 8 * 16);
  }
  copy_commit();
}
DEVICE void load_x(const SkinnyArgs& a, const Warp& w, const u8* stage, HalfColumns (&x)[TOKEN_TILES]) {
  const int line = w.lane >> 2, quad = w.lane & 3;
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) {
    const int swizzle = (a.in.first + 8 * t + line) & 7;
    const bool exists = 8 * t + line < a.n_rows;
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int piece = 0; piece < 8; ++piece)
        x[t].w[step][piece / 2][piece % 2] =
            exists ? load32(stage + (step * TOKENS + 8 * t + line) * 128 + (piece ^ swizzle) * 16 + quad * 4) : 0u;
    to_halves(x[t]);
  }
}

// All stripes of a warp × all of its tiles of a pass. When it begins and when it ends, x of the
// warp's first stripe is on its way.
template <int TYPE> DEVICE void multiply(const SkinnyArgs& a, const Warp& w, const Pass& pass, u8* stage, float* sums) {
  using W = Weights<TYPE>;
  using T = Tiles<TYPE, K>;
  const int line = w.lane >> 2, quad = w.lane & 3, tiles = pass.tiles();
  typename W::Raw upper, lower;
  auto at = [&](int stripe, int tile) {
    const int slice = stripe / 4;
    return At{pass.tile<TYPE>(tile) + T::offset(line / TILE_ROWS, slice), T::blocks(slice), line % TILE_ROWS, quad, stripe % 4, slice};
  };
  auto load = [&](const At& from, int step) {
    At below = from;
    below.tile += T::offset(2, 0);
    W::load(upper, from, step);
    W::load(lower, below, step);
  };
  At now = at(w.stripe, w.row);
  load(now, 0);
  load(now, 1);
  HalfColumns x[TOKEN_TILES];
#pragma unroll 1
  for (int stripe = w.stripe; stripe < STRIPES; stripe += STRIPE_WARPS) {
    copy_wait<0>();
    sync_warp();
    load_x(a, w, stage, x);
    sync_warp();
    const int following = stripe + STRIPE_WARPS < STRIPES ? stripe + STRIPE_WARPS : w.stripe;
    copy_x(a, w, following, stage);
#pragma unroll 1
    for (int tile = w.row; tile < tiles; tile += ROW_WARPS) {
      ask<TYPE>(w, pass, stripe, tile + AHEAD * ROW_WARPS);
      W::begin(upper, quad);
      W::begin(lower, quad);
      HalfScales of_upper, of_lower;
      half_scales<TYPE>(of_upper, upper, quad);
      half_scales<TYPE>(of_lower, lower, quad);
      float part[TOKEN_TILES][4] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Operand u, l;
        unpack_halves<TYPE>(u, upper, of_upper, quad, step);
        unpack_halves<TYPE>(l, lower, of_lower, quad, step);
        // What is loaded last is loaded again: cheaper than a branch.
        if (step == 2) now = tile + ROW_WARPS < tiles ? at(stripe, tile + ROW_WARPS) : at(following, w.row);
        load(now, (step + 2) % 4);
#pragma unroll
        for (int g = 0; g < 4; ++g)
#pragma unroll
          for (int t = 0; t < TOKEN_TILES; ++t)
            mma_f16(part[t], make_uint4(u.w[g][0], l.w[g][0], u.w[g][1], l.w[g][1]), x[t].w[step][g][0], x[t].w[step][g][1]);
      }
      float* const to = sums + stripe % AREAS * SUM_FLOATS + ((UNLIKE && pass.segment ? pass.units : 0) + tile) * (TOKENS * PITCH) + 2 * quad * PITCH + line;
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* const sum = to + (8 * t + (i & 1)) * PITCH + 8 * (i >> 1);
          const float v = part[t][i] * ((i < 2 ? of_upper : of_lower).unit * x[t].unit[i & 1]);
          *sum = STRIPES <= AREAS || stripe < AREAS ? v : *sum + v;
        }
    }
  }
}

// Four neighbouring outputs of a row of x, `count` of which exist; `tile`: whose sums they are, of a pair gate's.
struct Output { int token, segment, n, count, tile; };
DEVICE Output output(const SkinnyArgs& a, const Pass& p, int i) {
  const bool live = i < p.units * a.n_rows * 4;
  const int tile = live ? i / 4 % p.units : 0;
  const Place at = place(p.unit + tile);
  const int n = at.unit * UNIT_ROWS + i % 4 * 4, limit = at.segment == 0 ? N0 : at.segment == 1 ? N1 : N2;
  return {live ? i / 4 / p.units : 0, at.segment, n, live ? max(0, min(4, limit - n)) : 0, tile};
}

DEVICE float4 sum_of(const float* sums, int tile, const Output& o, float scale) {
  const float* from = sums + (tile * TOKENS + o.token) * PITCH + o.n % UNIT_ROWS;
  float4 v = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int area = 0; area < AREAS; ++area) {
    const float4 part = *(const float4*)(from + area * SUM_FLOATS);
    v = make_float4(v.x + part.x, v.y + part.y, v.z + part.z, v.w + part.w);
  }
  return make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
}

// 1/rms of the rows, a warp each.
DEVICE void inverse_rms(const SkinnyArgs& a, float* inverse) {
  const int lane = threadIdx.x & 31;
  for (int t = threadIdx.x >> 5; t < a.n_rows; t += WARPS) {
    const float* squares = a.in.row<K>(t).squares;
    float s = 0.f;
#pragma unroll 8
    for (int i = lane; i < K / GROUP; i += 32) s += load_fresh(squares + i);
    s = warp_sum(s);
    if (lane == 0) inverse[t] = rsqrtf(s * (1.f / K) + EPS);
  }
}
#endif

KERNEL(WARPS * 32, 1) skinny(ARGS(SkinnyArgs, a)) {
#if ARCH >= 80
  DYNAMIC_SHARED(shared);
  float* const sums = (float*)(shared + WARPS * STAGE_BYTES);
  float* const inverse = sums + AREAS * SUM_FLOATS;
  const int warp = threadIdx.x >> 5;
  const Warp w = {(int)threadIdx.x & 31, warp % STRIPE_WARPS, warp / STRIPE_WARPS};
  u8* const stage = shared + warp * STAGE_BYTES;
  const int first = first_unit(blockIdx.x), last = first_unit(blockIdx.x + 1);
  Pass pass(a, first, last, false);
  auto busy = [&] { return w.stripe < STRIPES && w.row < pass.tiles(); };
  dependents_launch();
  if (busy())  // weights wait for no kernel
    with_type(pass, [&](auto type) {
      for (int i = 0; i < AHEAD; ++i) ask<type.value>(w, pass, w.stripe, w.row + i * ROW_WARPS);
    });
  BEGIN(a);
  if (w.stripe < STRIPES) copy_x(a, w, w.stripe, stage);
  if (NORM) inverse_rms(a, inverse);
#if !PAIRED
  auto fetch = [&](const Output& o) { return a.out.fetch(a.out.where(o.token), o.token, o.segment, o.n, o.count); };
  Output mine = output(a, pass, threadIdx.x);
  Ready ready = fetch(mine);
#endif
  for (; pass.unit < last; pass = next(a, pass, last)) {
    if (busy()) with_type(pass, [&](auto type) { multiply<type.value>(a, w, pass, stage, sums); });
    if (!pass.complete()) continue;
    sync_block();
    const int all = pass.units * a.n_rows * 4;
    for (int i = threadIdx.x; i < (all + 31) / 32 * 32; i += WARPS * 32) {
#if PAIRED
      const Output o = output(a, pass, i);
      const float scale = NORM ? inverse[o.token] : 1.f;
      const float4 gate = sum_of(sums, o.tile, o, scale), up = sum_of(sums, o.tile + pass.units, o, scale);
      if (o.count) a.out.finish(o.token, o.n, gate, up);
#else
      if (i != threadIdx.x || pass.unit != first) mine = output(a, pass, i), ready = fetch(mine);
      float4 y = sum_of(sums, mine.tile, mine, NORM ? inverse[mine.token] : 1.f);
      if (const float* bias = mine.segment == 0 ? a.bias[0] : mine.segment == 1 ? a.bias[1] : a.bias[2]) {
        float* const values[4] = {&y.x, &y.y, &y.z, &y.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j < mine.count) *values[j] += bias[mine.n + j];
      }
      a.out.finish(ready, mine.token, mine.segment, mine.n, y, mine.count);
#endif
    }
    sync_block();
  }
  copy_wait<0>();
#endif
}
HOST_ENTRY(skinny, SkinnyArgs)
