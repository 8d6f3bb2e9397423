// All layers of one row in one kernel: what matvec.cu and attend.cu do in five launches a layer, without the gaps
// between them. A block stays on its multiprocessor; its producer warp streams the tiles of all its products of all
// layers through one ring of shared memory, so that memory works on while the others finish an operation, wait for
// the other blocks at a barrier in device memory, and load the next x.
//
// A stage of the ring holds two or four tiles of a matrix, keys of 32 positions, or values of half of the dims of a page.
// Not more than AHEAD stages are under way at a time: more would fill the memory's queues, and the few loads that everybody
// waits for, of counters and activations, would queue behind them.
//
// Bit-equal to the launches it stands for: the same dots, epilogues and splits, in the same order.
//
// Macros: LAYERS, D_MODEL, D_FF, TYPES (a bit for each type of the weights), EPS, ACTIVATION; attend.cuh's and
// kv_cache.cuh's (of f16); WARPS, STAGE_BYTES and STAGES of the ring, AHEAD, PARTIALS (floats), GRID.
#include "attend_ring.cuh"
#include "cut.cuh"
#include "dots.cuh"
#include "epilogues.cuh"

enum { QKV, OUT, GATE_UP, DOWN, PRODUCTS };
constexpr int BARRIERS = PRODUCTS + 1, HEADS_APART = KV_HEADS * HEAD_TILES;  // barriers: of a layer

struct Units { int first, last; };     // of a block
struct Stretch { int first, groups; };  // of four rows, of one matrix
DEVICE constexpr int groups_of(int rows) { return (rows + 15) / 16 * 16 / TILE_ROWS; }

template <int FIRST_, bool NORM_, int K_, int UNIT, bool IS_PAIR, int A, int B = 0, int C = 0> struct Operation : Cut<K_, UNIT, IS_PAIR, A, B, C> {
  static constexpr int FIRST = FIRST_, COLUMNS = K_, UNIT_ROWS = UNIT;  // FIRST: of its matrices in Layer
  static constexpr bool NORM = NORM_, PAIRED = IS_PAIR;
  static constexpr int MATRICES = 1 + (B > 0) + (C > 0);
  // What a block's units have of matrix m: neighbours. A pair's are the same of both.
  static DEVICE Stretch stretch(int m, const Units& u) {
    const int first = u.first * (UNIT / TILE_ROWS), last = u.last * (UNIT / TILE_ROWS);
    if (IS_PAIR) return {first, last - first};
    constexpr int a = groups_of(A), b = groups_of(B), c = groups_of(C);
    const int before = m == 0 ? 0 : m == 1 ? a : a + b, all = m == 0 ? a : m == 1 ? b : c;
    const int from = max(first - before, 0), to = min(last - before, all);
    return {from, max(to - from, 0)};
  }
};
constexpr int Q_ROWS = HEADS * HEAD_DIM, KV_ROWS = KV_HEADS * HEAD_DIM;
template <int OP> struct Of;
template <> struct Of<QKV> : Operation<0, true, D_MODEL, TILE_ROWS, false, Q_ROWS, KV_ROWS, KV_ROWS> {};
template <> struct Of<OUT> : Operation<3, false, Q_ROWS, 16, false, D_MODEL> {};
template <> struct Of<GATE_UP> : Operation<4, true, D_MODEL, 16, true, D_FF, D_FF> {};
template <> struct Of<DOWN> : Operation<6, false, D_FF, 16, false, D_MODEL> {};
// Calls f with one of them. Only what is short may be in f: an operation that runs once a layer runs at the speed at
// which its instructions arrive.
template <class F> DEVICE void with_operation(int op, F&& f) {
  if (op == QKV) f(Of<QKV>{});
  else if (op == OUT) f(Of<OUT>{});
  else if (op == GATE_UP) f(Of<GATE_UP>{});
  else f(Of<DOWN>{});
}

struct Layer {
  const u8* weights[7];   // q, k, v, output, gate, up, down
  const float* bias[7];
  const float* gains[2];  // of the norms that read the residual stream after the output and after the down product
  u8 *keys, *values;
  int types[7], unused;
};

struct TokenArgs {
  const Layer* layers;   // [LAYERS]
  const Units* units;    // [GRID, LAYERS, PRODUCTS]
  Rows x, hidden;
  Attention attention;   // whose keys and values are each layer's own
  const double* turns;
  u32* barrier;          // how many arrivals there were, ever, and how many when the last launch ended
  STAMPS                 // two of each operation
};

#if ARCH >= 90
constexpr int WIDEST = larger(larger(D_MODEL, D_FF), Q_ROWS), CONSUMERS = WARPS * 32;
using TokenRing = Stages<STAGES, STAGE_BYTES>;
static_assert(AHEAD + WARPS <= STAGES);  // as Filler says
constexpr int TABLE_BYTES = LAYERS * (sizeof(Layer) + PRODUCTS * sizeof(Units));
constexpr int WORK_BYTES = larger(X_BYTES_OF<WIDEST, 1, false> + PARTIALS * 4 + 16, (ATTEND_BYTES + 15) / 16 * 16);
constexpr int SHARED_BYTES = TokenRing::ALL_BYTES + TABLE_BYTES + 16 + WORK_BYTES;

struct Shared {
  TokenRing stages;
  Layer* layers;
  Units* units;       // [LAYERS, PRODUCTS]
  u32* target;        // what the grid's barrier counts to
  u8* work;           // of one operation: x, sums and 1/rms, or attention's
  DEVICE explicit Shared(u8* p)
      : stages(p), layers((Layer*)(p + TokenRing::ALL_BYTES)), units((Units*)(layers + LAYERS)), target((u32*)(units + LAYERS * PRODUCTS)),
        work((u8*)(target + 4)) {}
};

template <int VALUE> struct Constant { static constexpr int value = VALUE; };
// Calls f with the type, one of TYPES, as a constant.
template <int TYPE = 0, class F> DEVICE void with_type(int type, F&& f) {
  constexpr int rest = TYPES >> TYPE;
  if constexpr (rest == 1) f(Constant<TYPE>{});  // the last
  else if constexpr ((rest & 1) == 0) with_type<TYPE + 1>(type, f);
  else if (type == TYPE) f(Constant<TYPE>{});
  else with_type<TYPE + 1>(type, f);
}

// Tiles of a matrix with so many columns. Where all have whole slices only, sizes are constants.
template <int TYPE> struct Stream {
  using B = Block<TYPE>;
  static constexpr bool WHOLE = D_MODEL % TILE_COLUMNS == 0 && D_FF % TILE_COLUMNS == 0 && Q_ROWS % TILE_COLUMNS == 0;
  static constexpr int FULL_BLOCKS = TILE_COLUMNS / B::SIZE, FULL_BYTES = B::bytes(FULL_BLOCKS);
  static constexpr int LARGEST = WHOLE || WIDEST >= TILE_COLUMNS ? FULL_BYTES : B::bytes(WIDEST / B::SIZE);
  static constexpr int STAGE_TILES = 4 * LARGEST <= STAGE_BYTES ? 4 : 2;
  int slices, tail_blocks;
  DEVICE explicit Stream(int columns) : slices((columns + TILE_COLUMNS - 1) / TILE_COLUMNS), tail_blocks(columns % TILE_COLUMNS / B::SIZE) {}
  DEVICE int blocks(int slice) const { return WHOLE || tail_blocks == 0 || slice < slices - 1 ? FULL_BLOCKS : tail_blocks; }
  DEVICE int group_bytes() const { return WHOLE || tail_blocks == 0 ? slices * FULL_BYTES : (slices - 1) * FULL_BYTES + B::bytes(tail_blocks); }
  // Of tiles `first` to `last`, counted through the slices of each group.
  DEVICE int span(int first, int last) const {
    if (WHOLE) return (last - first) * FULL_BYTES;
    return (last / slices - first / slices) * group_bytes() + (last % slices - first % slices) * FULL_BYTES;
  }
};

// The blocks' barrier between operations: what any wrote before arrive() all see after wait(). Consumers call both.
struct Grid {
  u32 *arrivals, *target;  // target, in shared memory, is the first thread's
  STAMPS                   // of the operation
  DEVICE void arrive() {
    sync_threads(1, CONSUMERS);
    if (threadIdx.x == 0) {
      NOTE(stamps + 1, global_time());
      add_release(arrivals, 1);
      *target += GRID;
    }
#if TIMED
    stamps += 2;
#endif
  }
  DEVICE void wait() const {
    if (threadIdx.x == 0) {
      wait_at_least(arrivals, *target);
      NOTE(stamps, ~global_time());
    }
    sync_threads(1, CONSUMERS);
  }
};

// The one thread that fills the ring.
struct Producer : Filler<TokenRing, AHEAD> {
  DEVICE void product(int op, const Layer& layer, const Units& units) {
    with_operation(op, [&](auto o) {
      using O = decltype(o);
#pragma unroll 1
      for (int m = 0; m < O::MATRICES; ++m) {
        const Stretch here = O::stretch(m, units);
        matrix(layer.types[O::FIRST + m], layer.weights[O::FIRST + m], O::COLUMNS, here);
      }
    });
  }
  DEVICE void matrix(int type, const u8* weights, int columns, const Stretch& here) {
    with_type(type, [&](auto constant) {
      const Stream<decltype(constant)::value> stream(columns);
      const int tiles = here.groups * stream.slices;
      const u8* source = weights + (u64)here.first * stream.group_bytes();
      for (int t = 0; t < tiles; t += stream.STAGE_TILES) {
        const int bytes = stream.span(t, min(t + stream.STAGE_TILES, tiles));
        put(source, bytes);
        source += bytes;
      }
    });
  }
  // written: what the barrier has counted when this token's keys and values are.
  DEVICE void attention(const Cache& cache, const u32* arrivals, u32 written) {
    for (int item = blockIdx.x;; item += GRID) {
      const Target target(cache, 0, item % HEADS_APART);
      if (item >= HEADS_APART * target.splits.count) return;
      put_pages(cache, target, item / HEADS_APART, [&] { wait_at_least(arrivals, written); });
    }
  }
};

// The block's tiles of one matrix, to `partial` [row, slice]. A warp takes a stage; k, counted from stage n on, is its next.
DEVICE void multiply(const Shared& s, int type, int groups, const X& x, float* partial, u32& n, int& k) {
  const int lane = lane_now();
  with_type(type, [&](auto constant) {
    constexpr int TYPE = decltype(constant)::value;
    using T = Stream<TYPE>;
    const T stream(x.columns);
    const Slots<TYPE> slots(lane);
    const int tiles = groups * stream.slices, pitch = stream.slices | 1, stages = (tiles + T::STAGE_TILES - 1) / T::STAGE_TILES;
    for (; k < stages; k += WARPS) {
      const Stage stage = s.stages(n + k);
      const u8* tile = stage.wait();
      const int first = k * T::STAGE_TILES;
      int slice = first % stream.slices, row = first / stream.slices * TILE_ROWS;
#pragma unroll 1
      for (int t = first; t < min(first + T::STAGE_TILES, tiles); t += 2) {  // two at a time
        float sum[2 * LANE_ROWS] = {};
        int places[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float one[LANE_ROWS] = {};
          places[i] = t + i < tiles ? row * pitch + slice : -1;
          const int blocks = stream.blocks(slice);
          if (t + i < tiles) dot_tile<TYPE, 1, false>(one, [&] { return tile; }, x, slots, slice, blocks, lane);
#pragma unroll
          for (int r = 0; r < LANE_ROWS; ++r) sum[i * LANE_ROWS + r] = one[r];
          tile += T::WHOLE ? T::FULL_BYTES : T::B::bytes(blocks);
          if (++slice == stream.slices) slice = 0, row += TILE_ROWS;
        }
        const float total = sum_transposed<16>(sum, lane);  // of one of the lanes' rows of one tile, in every fourth lane
        const int place = lane & 8 ? places[1] : places[0], tile_row = lane / 16 * LANE_ROWS + (lane >> 2 & 1);
        if (lane % 4 == 0 && place >= 0) partial[place + tile_row * pitch] = total;
      }
      stage.release(READERS);
    }
    n += stages, k -= stages;
  });
}

// What an epilogue loads before the products.
struct Ready { Rotary<Q_ROWS>::Ready rotary; Residual<D_MODEL>::Ready residual; };

// All products of a layer are these lines, with `op` known at run time, for the sake of the instruction cache.
DEVICE void product(int op, const Shared& s, const Layer& layer, const Units& units, const TokenArgs& a, const Cache& cache, Grid& grid, u32& n) {
  const Rotary<Q_ROWS> rotary = {(float*)a.attention.q, cache, a.turns};
  const Residual<D_MODEL> residual = {a.x, layer.gains[op == DOWN]};
  const Product<D_FF> activation = {a.hidden};
  float* const partial = (float*)(s.work + X_BYTES_OF<WIDEST, 1, false>);
  float* const inverse_rms = partial + PARTIALS;
  const int count = units.last - units.first;
  int outputs = 0;
  Output mine;
  Ready ready;
  float bias = 0.f;
  auto prepare = [&](int i) {
    with_operation(op, [&](auto o) {
      using O = decltype(o);
      outputs = count * O::UNIT_ROWS;
      mine = O::output(units.first, count, 1, i);
      const float* biases = layer.bias[O::FIRST + mine.segment];
      bias = !O::PAIRED && biases && mine.live ? biases[mine.n] : 0.f;
    });
    if (op == QKV) ready.rotary = rotary.prepare(0, mine.segment, mine.n, mine.live);
    else if (op != GATE_UP) ready.residual = residual.prepare(0, mine.segment, mine.n, mine.live);
  };
  auto fetch = [&] {
    if (op == QKV) rotary.settle(ready.rotary, mine.segment, mine.n, mine.live);
    else if (op != GATE_UP) residual.fetch(ready.residual, 0, mine.n, mine.live);
  };
  prepare(threadIdx.x);
  grid.wait();
  fetch();
  X x;
  with_operation(op, [&](auto o) {
    using O = decltype(o);
    if (O::NORM && threadIdx.x >> 5 == WARPS - 1) {
      RowNorm<O::COLUMNS> norm;
      norm.load(a.x, 0, lane_now());
      const float v = norm.inverse_rms(EPS);
      if (lane_now() == 0) *inverse_rms = v;
    }
    const Rows& in = O::NORM ? a.x : O::FIRST == Of<OUT>::FIRST ? a.attention.out : a.hidden;
    load_x<O::COLUMNS, 1, false, O::NORM, WARPS>(in, nullptr, 0, 1, s.work, [] {});
    x = x_at<O::COLUMNS, 1, false>(s.work);
  });
  sync_threads(1, CONSUMERS);
  const int pitch = ((x.columns + TILE_COLUMNS - 1) / TILE_COLUMNS) | 1;
  int k = threadIdx.x >> 5, matrices = 0, first = 0, rows = 0;
  with_operation(op, [&](auto o) { matrices = decltype(o)::MATRICES, first = decltype(o)::FIRST; });
#pragma unroll 1
  for (int m = 0; m < matrices; ++m) {
    Stretch here;
    with_operation(op, [&](auto o) { here = decltype(o)::stretch(m, units); });
    multiply(s, layer.types[first + m], here.groups, x, partial + rows * pitch, n, k);
    rows += here.groups * TILE_ROWS;
  }
  sync_threads(1, CONSUMERS);

  auto result = [&](int local) {  // sum over the slices, in order
    const float* p = partial + local * pitch;
    float v = p[0];
#pragma unroll 4
    for (int i = 1; i < (x.columns + TILE_COLUMNS - 1) / TILE_COLUMNS; ++i) v += p[i];
    return op == QKV || op == GATE_UP ? v * *inverse_rms : v;
  };
  for (int i = threadIdx.x; i < (outputs + 31) / 32 * 32; i += CONSUMERS) {
    if (i >= CONSUMERS) prepare(i), fetch();
    const int local = i < outputs ? i : 0;  // all of a pair's first matrix come before the second's
    const float v = result(local) + bias;
    if (op == QKV) rotary.finish(ready.rotary, 0, mine.segment, mine.n, v, mine.live);
    else if (op == GATE_UP) activation.finish({}, 0, mine.n, v, result(outputs + local), mine.live);
    else residual.finish(ready.residual, 0, mine.segment, mine.n, v, mine.live);
  }
  if (op == QKV) fence_async();  // the ring's copies read what was written to the cache
  grid.arrive();
}

// Splits of heads, in turns, by the first ATTEND_WARPS warps.
DEVICE void attend(const Attention& a, const Shared& s, Grid& grid, u32& n) {
  const int warp = threadIdx.x >> 5, thread = warp * 32 + lane_now();
  int item = blockIdx.x;
  Target target(a.cache, 0, item % HEADS_APART);
  grid.wait();
  for (; item < HEADS_APART * target.splits.count; item += GRID) {
    if (item >= GRID) target = Target(a.cache, 0, item % HEADS_APART);
    const int split = item / HEADS_APART;
    const Range range = range_of(target.splits, split, target.position);
    auto read = [&](Warp& w, const uint4* q) { read_ring(w, q, s.stages, n, range, warp); };
    if (warp < ATTEND_WARPS)
      attend_split(a, target, [&](int i) { return query_of(a, target, i); }, split, s.work, a.arrived + item % HEADS_APART, thread, read, [] { sync_threads(2, ATTEND_WARPS * 32); });
    n += stages_of(range);
  }
  grid.arrive();
}
#endif

KERNEL(WARPS * 32 + 32, 1) token(ARGS(TokenArgs, a)) {
#if ARCH >= 90
  DYNAMIC_SHARED(memory);
  const Shared s(memory);
  const u32* const table = (const u32*)a.layers;
  const u32* const units = (const u32*)(a.units + blockIdx.x * (LAYERS * PRODUCTS));
  for (u32 i = threadIdx.x; i < LAYERS * sizeof(Layer) / 4; i += blockDim.x) ((u32*)s.layers)[i] = table[i];
  for (u32 i = threadIdx.x; i < LAYERS * PRODUCTS * 2; i += blockDim.x) ((u32*)s.units)[i] = units[i];
  if (threadIdx.x == 0) s.stages.init();
  sync_block();
  dependents_launch();
  Attention attention = a.attention;
  auto use = [&](const Layer& layer) { attention.cache.keys = layer.keys, attention.cache.values = layer.values; };
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x > CONSUMERS) return;
    Producer producer{{s.stages}};
    u32 written = 0;
    for (int l = 0; l < LAYERS; ++l) {
      use(s.layers[l]);
      for (int op = 0; op < PRODUCTS; ++op) {
        producer.product(op, s.layers[l], s.units[l * PRODUCTS + op]);
        if (op > QKV) continue;
        if (l == 0) {  // weights were there before; a cache, and the counter, are as the kernel before leaves them
          dependency_wait();
          written = load_fresh(a.barrier + 1) + GRID;
        }
        producer.attention(attention.cache, a.barrier, written + l * (BARRIERS * GRID));
      }
    }
    return;
  }
  u32 n = 0;
  dependency_wait();
  if (threadIdx.x == 0) *s.target = load_fresh(a.barrier + 1);
  Grid grid = {a.barrier, s.target GIVE_STAMPS(a)};
  for (int l = 0; l < LAYERS; ++l) {
    use(s.layers[l]);
#pragma unroll 1
    for (int op = 0; op < PRODUCTS; ++op) {
      product(op, s, s.layers[l], s.units[l * PRODUCTS + op], a, attention.cache, grid, n);
      if (op == QKV) attend(attention, s, grid, n);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {  // all have read the counter as it was: they have arrived since
    wait_at_least(a.barrier, *s.target);
    a.barrier[1] = *s.target;
  }
#endif
}
HOST_ENTRY_TOGETHER(token, TokenArgs)
