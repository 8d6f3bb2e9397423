// Y = X Wᵀ for 2 to 16 rows of x, straight from the packed tiles on tensor cores: as fast as one row, since the
// weights' bytes are what takes time, as long as their unpacking stays well below it.
//
// Columns go by stripes of 256. A warp holds x of one stripe in registers, half precision (half_fragments.cuh), and
// multiplies with it all of the block's rows of W, 16 at a time, before it goes on to its next stripe. Weights go from
// device memory to registers, half a tile of 16 × 256 ahead, unpacked there by one multiplication and addition for
// two; L2 is asked for them AHEAD tiles before, the first ones while the previous kernel still runs. Blocks have
// equal bytes. The warps' sums meet in shared memory, added up in an order that depends on K alone: a row's result is
// bit-equal whoever travels with it, on any grid.
//
// Macros: K; TYPE0…2, N0…2; PAIRED, NORM, EPS, EPILOGUE as in matvec.cu; UNIT_ROWS (16), GRID (segments.cuh); TOKENS
// (8 or 16); WARPS, STRIPE_WARPS (of them, so many share the stripes, the others the rows); PASS_UNITS (whose sums
// there is room for); AHEAD; and the epilogue's own.
#include "gemm_epilogues.cuh"
#include "half_fragments.cuh"
#include "segments.cuh"

constexpr int STRIPES = brain_tiles(K) / 4, ROW_WARPS = WARPS / STRIPE_WARPS, TOKEN_TILES = TOKENS / 8;
constexpr int AREAS = STRIPE_WARPS < STRIPES ? STRIPE_WARPS : STRIPES;  // of sums
constexpr bool UNLIKE = PAIRED && TYPE1 != TYPE0;
constexpr int PASS_TILES = PASS_UNITS * (PAIRED ? 2 : 1), PITCH = 20;  // 8 × 4 lanes' sums meet no bank twice
constexpr int STAGE_BYTES = TOKENS * 512, SUM_FLOATS = PASS_TILES * TOKENS * PITCH;
constexpr int SHARED_BYTES = WARPS * STAGE_BYTES + AREAS * SUM_FLOATS * 4 + TOKENS * 4;
constexpr int UNITS0 = S0::ROWS_PADDED / UNIT_ROWS, UNITS1 = PAIRED ? 0 : S1::ROWS_PADDED / UNIT_ROWS;
constexpr int UNITS = UNITS0 + UNITS1 + S2::ROWS_PADDED / UNIT_ROWS;

struct SkinnyArgs {
  const u8* weights[3];
  const float* bias[3];
  Rows in;
  Epilogue out;
  int n_rows;
  STAMPS
};

// Units whose sums come together, all of one type; of a pair of unlike types first gate's rows, then up's.
struct Pass {
  int unit, units;
  bool up;
  DEVICE int tiles() const { return units * (PAIRED && !UNLIKE ? 2 : 1); }
  DEVICE bool complete() const { return !UNLIKE || up; }
};
DEVICE int end_of_type(int unit) {
  if (!PAIRED && TYPE1 != TYPE0 && unit < UNITS0) return UNITS0;
  if (!PAIRED && TYPE2 != TYPE1 && unit < UNITS0 + UNITS1) return UNITS0 + UNITS1;
  return UNITS;
}
DEVICE Pass pass_from(int unit, int last) { return {unit, min(min(PASS_UNITS, last - unit), end_of_type(unit) - unit), false}; }
DEVICE Pass next(const Pass& p, int last) {
  return p.complete() ? pass_from(p.unit + p.units, last) : Pass{p.unit, p.units, true};
}

// A unit's matrix, and which of its units it is.
struct Place { int segment, unit; };
DEVICE Place place(int unit) {
  if (PAIRED || TYPE1 == NONE || unit < UNITS0) return {0, unit};
  if (TYPE2 == NONE || unit < UNITS0 + UNITS1) return {1, unit - UNITS0};
  return {2, unit - UNITS0 - UNITS1};
}

// The tiles of a pass's sixteen rows number `tile`. Those of the same eight lie GROUP_BYTES after one another.
template <int TYPE> DEVICE const u8* rows_of(const SkinnyArgs& a, const Pass& p, int tile) {
  const bool up = PAIRED && (p.up || tile >= p.units);
  const Place at = place(p.unit + (up && !p.up ? tile - p.units : tile));
  const int s = up ? 1 : at.segment;
  return (s == 0 ? a.weights[0] : s == 1 ? a.weights[1] : a.weights[2]) + Tiles<TYPE, K>::offset(at.unit * (UNIT_ROWS / TILE_ROWS), 0);
}

template <int TYPE> struct Of { static constexpr int value = TYPE; };
// Calls f with the type of a pass: one copy of the code for each type, not for each matrix.
template <class F> DEVICE void with_type(const Pass& p, F&& f) {
  const int s = p.up ? 1 : place(p.unit).segment;
  if (s == 0 || (s == 1 && TYPE1 == TYPE0) || (s == 2 && TYPE2 == TYPE0)) f(Of<TYPE0>());
  else if constexpr (TYPE1 != NONE) {
    if (s == 1 || TYPE2 == TYPE1) f(Of<TYPE1>());
    else if constexpr (TYPE2 != NONE) f(Of<TYPE2>());
  }
}

#if ARCH >= 80
struct Warp { int lane, stripe, row; };  // its first stripe and its first tile

// Goes through a warp's tiles before it, and asks L2 for them: of the four tiles of 1,024 columns that four warps
// (fewer at the end of a row) share, each asks for its own.
struct Scout {
  Pass pass;
  int stripe, tile, last;
  DEVICE Scout(const Warp& w, const Pass& p, int last_unit) : pass(p), stripe(w.stripe), tile(w.row), last(last_unit) { skip(w); }
  DEVICE void skip(const Warp& w) {
    while (pass.unit < last && tile >= pass.tiles()) pass = next(pass, last), tile = w.row;
  }
  DEVICE void go(const SkinnyArgs& a, const Warp& w) {
    if (pass.unit >= last || stripe >= STRIPES) return;
    with_type(pass, [&](auto type) {
      using T = Tiles<type.value, K>;
      const int slice = stripe / 4, sharing = min(4, STRIPES - 4 * slice);
      const u8* rows = rows_of<type.value>(a, pass, tile);
      for (int i = stripe % 4; i < 4; i += sharing) prefetch_l2(rows + T::offset(i, slice), T::bytes(slice));
    });
    if ((tile += ROW_WARPS) < pass.tiles()) return;
    tile = w.row;
    if ((stripe += STRIPE_WARPS) < STRIPES) return;
    stripe = w.stripe, pass = next(pass, last);
    skip(w);
  }
};

// x of a warp's next stripe on its way into the warp's own memory, as it lies in device memory.
DEVICE void copy_x(const SkinnyArgs& a, const Warp& w, int stripe, u8* stage) {
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {  // rows beyond the last: the last
    const u8* row = (const u8*)a.in.row<K>(min(i, a.n_rows - 1)).brain + (u64)(stripe * 4 + w.lane / 8) * (BRAIN_TILE * 2);
    copy_async16(stage + (w.lane / 8 * TOKENS + i) * 128 + w.lane % 8 * 16, row + w.lane % 8 * 16);
  }
  copy_commit();
}
DEVICE void load_x(const SkinnyArgs& a, const Warp& w, const u8* stage, HalfColumns (&x)[TOKEN_TILES]) {
  const int line = w.lane >> 2, quad = w.lane & 3;
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) {
    const int swizzle = (a.in.first + min(8 * t + line, a.n_rows - 1)) & 7;
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int piece = 0; piece < 8; ++piece)
        x[t].w[step][piece / 2][piece % 2] = load32(stage + (step * TOKENS + 8 * t + line) * 128 + (piece ^ swizzle) * 16 + quad * 4);
    to_halves(x[t]);
  }
}

// All stripes of a warp × all of its tiles of a pass. sums: the warp's area. When it begins and when it ends, x of the
// warp's first stripe is on its way.
template <int TYPE> DEVICE void multiply(const SkinnyArgs& a, const Warp& w, const Pass& pass, Scout& scout, u8* stage, float* sums) {
  using W = Weights<TYPE>;
  using T = Tiles<TYPE, K>;
  const int line = w.lane >> 2, quad = w.lane & 3, tiles = pass.tiles();
  typename W::Raw upper, lower;
  auto at = [&](int stripe, int tile) {
    const int slice = stripe / 4;
    return At{rows_of<TYPE>(a, pass, tile) + T::offset(line / TILE_ROWS, slice), T::blocks(slice), line % TILE_ROWS, quad, stripe % 4, slice};
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
      scout.go(a, w);
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
      float* const to = sums + ((pass.up ? pass.units : 0) + tile) * (TOKENS * PITCH) + 2 * quad * PITCH + line;
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* const sum = to + (8 * t + (i & 1)) * PITCH + 8 * (i >> 1);
          const float v = part[t][i] * ((i < 2 ? of_upper : of_lower).unit * x[t].unit[i & 1]);
          *sum = stripe == w.stripe ? v : *sum + v;
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
  Pass pass = pass_from(first, last);
  dependents_launch();
  Scout scout(w, pass, last);
  for (int i = 0; i < AHEAD; ++i) scout.go(a, w);  // weights wait for no kernel
  BEGIN(a);
  if (w.stripe < STRIPES) copy_x(a, w, w.stripe, stage);
  if (NORM) inverse_rms(a, inverse);
#if !PAIRED
  auto fetch = [&](const Output& o) { return a.out.fetch(a.out.where(o.token), o.token, o.segment, o.n, o.count); };
  Output mine = output(a, pass, threadIdx.x);
  Ready ready = fetch(mine);
#endif
  for (; pass.unit < last; pass = next(pass, last)) {
    if (w.stripe < STRIPES && w.row < pass.tiles())
      with_type(pass, [&](auto type) { multiply<type.value>(a, w, pass, scout, stage, sums + w.stripe * SUM_FLOATS); });
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
