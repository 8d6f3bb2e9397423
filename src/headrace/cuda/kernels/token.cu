// All layers of one row in one kernel: what matvec.cu and attend.cu do in five launches a layer, without the gaps
// between them. A block stays on its multiprocessor; its producer warp streams the tiles of all its products of all
// layers through one ring of shared memory, so that memory works on while the others finish an operation, wait for
// the other blocks at a barrier in device memory, and load the next x.
//
// A stage of the ring holds STAGE_TILES tiles. Not more than AHEAD stages are under way at a time: more would fill the
// memory's queues, and the few loads that everybody waits for, of counters and activations, would queue behind them.
//
// Bit-equal to the launches it stands for: the same dots, epilogues and splits, in the same order.
//
// Macros: LAYERS, D_MODEL, D_FF, TYPES (a bit for each type of the weights), EPS, ACTIVATION; attend.cuh's and
// kv_cache.cuh's; WARPS, TILE_BYTES and STAGES of the ring, AHEAD, PARTIALS (floats), ATTEND_GROUPS, GRID.
#include "attend.cuh"
#include "cut.cuh"
#include "dots.cuh"
#include "epilogues.cuh"

enum { QKV, OUT, GATE_UP, DOWN, PRODUCTS };

template <int FIRST_, bool NORM_, int K_, int UNIT, bool IS_PAIR, int A, int B = 0, int C = 0> struct Operation : Cut<K_, UNIT, IS_PAIR, A, B, C> {
  static constexpr int FIRST = FIRST_, COLUMNS = K_, UNIT_ROWS = UNIT;  // FIRST: of its matrices in Layer
  static constexpr bool NORM = NORM_, PAIRED = IS_PAIR;
};
constexpr int Q_ROWS = HEADS * HEAD_DIM, KV_ROWS = KV_HEADS * HEAD_DIM;
template <int OP> struct Of;
template <> struct Of<QKV> : Operation<0, true, D_MODEL, TILE_ROWS, false, Q_ROWS, KV_ROWS, KV_ROWS> {};
template <> struct Of<OUT> : Operation<3, false, Q_ROWS, 16, false, D_MODEL> {};
template <> struct Of<GATE_UP> : Operation<4, true, D_MODEL, 16, true, D_FF, D_FF> {};
template <> struct Of<DOWN> : Operation<6, false, D_FF, 16, false, D_MODEL> {};

struct Layer {
  const u8* weights[7];   // q, k, v, output, gate, up, down
  const float* bias[7];
  const float* gains[2];  // of the norms that read the residual stream after the output and after the down product
  u8 *keys, *values;
  int types[7], unused;
};
struct Units { int first, last; };  // of a block

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
constexpr int WIDEST = larger(larger(D_MODEL, D_FF), Q_ROWS), CONSUMERS = WARPS * 32, STAGE_TILES = 4;
constexpr int RING_BYTES = STAGES * STAGE_TILES * TILE_BYTES, TABLE_BYTES = LAYERS * (sizeof(Layer) + PRODUCTS * sizeof(Units));
constexpr int WORK_BYTES = larger(X_BYTES_OF<WIDEST, 1, false> + PARTIALS * 4 + 16, ATTEND_GROUPS * ((ATTEND_BYTES + 15) / 16 * 16));
constexpr int SHARED_BYTES = RING_BYTES + 2 * STAGES * 8 + TABLE_BYTES + WORK_BYTES;

struct Shared {
  u8* ring;
  u64 *full, *empty;  // [STAGES]
  Layer* layers;
  Units* units;       // [LAYERS, PRODUCTS]
  u8* work;           // of one operation: x, sums and 1/rms, or attention's
  DEVICE explicit Shared(u8* p)
      : ring(p), full((u64*)(p + RING_BYTES)), empty(full + STAGES), layers((Layer*)(empty + STAGES)),
        units((Units*)(layers + LAYERS)), work((u8*)(units + LAYERS * PRODUCTS)) {}
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

// The blocks' barrier between operations: what any wrote before arrive() all see after wait(). Consumers call both.
struct Grid {
  u32 *arrivals, target;
  STAMPS  // of the operation
  DEVICE void arrive() {
    sync_threads(1, CONSUMERS);
    if (threadIdx.x == 0) {
      NOTE(stamps + 1, global_time());
      add_release(arrivals, 1);
    }
    target += GRID;
#if TIMED
    stamps += 2;
#endif
  }
  DEVICE void wait() const {
    if (threadIdx.x == 0) {
      wait_at_least(arrivals, target);
      NOTE(stamps, ~global_time());
    }
    sync_threads(1, CONSUMERS);
  }
};

// Streams a block's tiles of one product, a stage at a time, by STAGE_TILES lanes; n: the stages before.
template <int OP> DEVICE void produce(const Shared& s, const Layer& layer, const Units& units, u32& n) {
  using O = Of<OP>;
  const int lane = threadIdx.x & 31, tiles = (units.last - units.first) * O::UNIT_TILES;
  for (int t = lane; t - lane < tiles; t += STAGE_TILES, ++n) {
    const Place p = O::place(units.first, t);
    const u8* source = nullptr;
    u32 bytes = 0;
    if (t < tiles)
      with_type(layer.types[O::FIRST + p.segment], [&](auto type) {
        using T = Tiles<decltype(type)::value, O::COLUMNS>;
        source = layer.weights[O::FIRST + p.segment] + T::offset(p.group, p.slice), bytes = T::bytes(p.slice);
      });
    const u32 stage = n % STAGES, before = n - AHEAD;
    barrier_wait(s.empty + stage, n / STAGES & 1 ^ 1);
    if (n >= AHEAD) barrier_wait(s.full + before % STAGES, before / STAGES & 1);
    if (t < tiles) {
      barrier_arrive_expect(s.full + stage, bytes);
      copy_bulk(s.ring + (stage * STAGE_TILES + lane) * TILE_BYTES, source, bytes, s.full + stage);
    } else {  // nobody will read what is not there
      barrier_arrive(s.full + stage);
      barrier_arrive(s.empty + stage);
    }
  }
}

// One product of all of the block's units: waits for x, and leaves the results to `out`.
template <int OP, class Epilogue> DEVICE void consume(const Shared& s, const Layer& layer, const Units& units, const Rows& in, const Epilogue& out, Grid& grid, u32& n) {
  using O = Of<OP>;
  const int lane = lane_now(), warp = threadIdx.x >> 5, count = units.last - units.first, tiles = count * O::UNIT_TILES;
  float* const partial = (float*)(s.work + X_BYTES_OF<WIDEST, 1, false>);
  float* const inverse_rms = partial + PARTIALS;
  auto bias_of = [&](const Output& o) {
    const float* bias = layer.bias[O::FIRST + o.segment];
    return !O::PAIRED && bias && o.live ? bias[o.n] : 0.f;
  };
  Output mine = O::output(units.first, count, 1, threadIdx.x);
  auto ready = out.prepare(0, mine.segment, mine.n, mine.live);
  float bias = bias_of(mine);
  grid.wait();
  out.fetch(ready, 0, mine.n, mine.live);
  load_x<O::COLUMNS, 1, false, O::NORM, WARPS>(in, nullptr, EPS, 0, 1, s.work, inverse_rms);
  sync_threads(1, CONSUMERS);
  const X x = x_at<O::COLUMNS, 1, false>(s.work);

  for (int t = warp; t < tiles; t += WARPS) {
    const Place p = O::place(units.first, t);
    const u32 number = n + t / STAGE_TILES, stage = number % STAGES;
    auto wait = [&] {
      barrier_wait(s.full + stage, number / STAGES & 1);
      return (const u8*)s.ring + (stage * STAGE_TILES + t % STAGE_TILES) * TILE_BYTES;
    };
    float sum[TILE_ROWS] = {};
    with_type(layer.types[O::FIRST + p.segment], [&](auto type) {
      dot_tile<decltype(type)::value, O::COLUMNS, 1, false>(sum, wait, x, p.slice, lane);
    });
    sync_warp();
    if (lane == 0) barrier_arrive(s.empty + stage);
    const float total = warp_sum_transposed(sum);
    if (lane % 8 == 0) partial[(t / O::SLICES * TILE_ROWS + lane / 8) * O::PITCH + p.slice] = total;
  }
  n += (tiles + STAGE_TILES - 1) / STAGE_TILES;
  sync_threads(1, CONSUMERS);

  auto result = [&](int local) {  // sum over the slices, in order
    const float* p = partial + local * O::PITCH;
    float v = p[0];
#pragma unroll
    for (int i = 1; i < O::SLICES; ++i) v += p[i];
    return O::NORM ? v * *inverse_rms : v;
  };
  const int outputs = count * O::UNIT_ROWS;
  for (int i = threadIdx.x; i < (outputs + 31) / 32 * 32; i += CONSUMERS) {
    if (i >= CONSUMERS) {
      mine = O::output(units.first, count, 1, i);
      ready = out.prepare(0, mine.segment, mine.n, mine.live);
      out.fetch(ready, 0, mine.n, mine.live);
      bias = bias_of(mine);
    }
    if constexpr (O::PAIRED) out.finish(ready, 0, mine.n, result(mine.local), result(mine.local + O::UNIT_ROWS), mine.live);
    else out.finish(ready, 0, mine.segment, mine.n, result(mine.local) + bias, mine.live);
  }
  grid.arrive();
}

// Groups of ATTEND_WARPS warps take splits of heads in turns.
DEVICE void attend(const Attention& a, u8* shared, Grid& grid) {
  constexpr int THREADS = ATTEND_WARPS * 32, HEADS_APART = KV_HEADS * HEAD_TILES, APART = GRID * ATTEND_GROUPS;
  const int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS / 32 * 32 + lane_now();
  if (group < ATTEND_GROUPS) {
    int item = blockIdx.x + GRID * group;
    Target target(a.cache, 0, item % HEADS_APART);
    u64 page = target.first_page(a.cache, item / HEADS_APART, thread >> 5);
    const int base = first_base(target.splits, item / HEADS_APART, thread >> 5);
    if (item < HEADS_APART * target.splits.count && base <= target.position) prefetch(a.cache, page, target.kv_head, base);
    grid.wait();
    while (item < HEADS_APART * target.splits.count) {
      attend_splits(a, target, item / HEADS_APART, target.splits.count, page, shared + group * ((ATTEND_BYTES + 15) / 16 * 16),
                    a.arrived + item % HEADS_APART, thread, [&] { sync_threads(2 + group, THREADS); });
      item += APART;
      target = Target(a.cache, 0, item % HEADS_APART);
      page = target.first_page(a.cache, item / HEADS_APART, thread >> 5);
    }
  } else {
    grid.wait();
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
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(s.full + i, STAGE_TILES), barrier_init(s.empty + i, STAGE_TILES);
    barrier_init_fence();
  }
  sync_block();
  dependents_launch();
  u32 n = 0;
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x >= CONSUMERS + STAGE_TILES) return;
    for (int l = 0; l < LAYERS; ++l) {
      const Units* of = s.units + l * PRODUCTS;
      produce<QKV>(s, s.layers[l], of[QKV], n);
      produce<OUT>(s, s.layers[l], of[OUT], n);
      produce<GATE_UP>(s, s.layers[l], of[GATE_UP], n);
      produce<DOWN>(s, s.layers[l], of[DOWN], n);
    }
    return;
  }
  dependency_wait();
  const u32 begun = load_fresh(a.barrier + 1);
  Grid grid = {a.barrier, begun GIVE_STAMPS(a)};
  Attention attention = a.attention;
  for (int l = 0; l < LAYERS; ++l) {
    const Layer& layer = s.layers[l];
    const Units* of = s.units + l * PRODUCTS;
    attention.cache.keys = layer.keys, attention.cache.values = layer.values;
    consume<QKV>(s, layer, of[QKV], a.x, Rotary<Q_ROWS>{(float*)attention.q, attention.cache, a.turns}, grid, n);
    attend(attention, s.work, grid);
    consume<OUT>(s, layer, of[OUT], attention.out, Residual<D_MODEL>{a.x, layer.gains[0]}, grid, n);
    consume<GATE_UP>(s, layer, of[GATE_UP], a.x, Product<D_FF>{a.hidden}, grid, n);
    consume<DOWN>(s, layer, of[DOWN], a.hidden, Residual<D_MODEL>{a.x, layer.gains[1]}, grid, n);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {  // all have read `begun`: they have arrived since
    wait_at_least(a.barrier, grid.target);
    a.barrier[1] = grid.target;
  }
#endif
}
HOST_ENTRY_TOGETHER(token, TokenArgs)
