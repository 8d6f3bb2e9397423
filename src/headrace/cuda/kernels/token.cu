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
#include "attend.cuh"
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
constexpr int HALF_PAGE = HEAD_BYTES / 2, READERS = 2;  // of a stage: two warps, or one that counts twice
template <class T> constexpr int STAGE_TILES = 4 * T::MAX_BYTES <= STAGE_BYTES ? 4 : 2;
// A warp may wait for a stage when that of the round before has arrived, or it would take the one before that for it.
static_assert(WARPS <= STAGES && 2 * ATTEND_WARPS - 2 <= STAGES && AHEAD < STAGES);
static_assert(HALF_PAGE <= STAGE_BYTES);
constexpr int RING_BYTES = STAGES * STAGE_BYTES, TABLE_BYTES = LAYERS * (sizeof(Layer) + PRODUCTS * sizeof(Units));
constexpr int WORK_BYTES = larger(X_BYTES_OF<WIDEST, 1, false> + PARTIALS * 4 + 16, (ATTEND_BYTES + 15) / 16 * 16);
constexpr int SHARED_BYTES = RING_BYTES + 2 * STAGES * 8 + TABLE_BYTES + 16 + WORK_BYTES;

struct Stage {
  u8* memory;
  u64 *full, *empty;  // its copy has arrived; its readers are done
  u32 parity;
  DEVICE const u8* wait() const {
    barrier_wait(full, parity);
    return memory;
  }
  DEVICE void release(int readers) const {  // the whole warp calls, which counts for so many
    sync_warp();
    if (lane_now() < readers) barrier_arrive(empty);
  }
};

struct Shared {
  u8* ring;
  u64 *full, *empty;  // [STAGES]
  Layer* layers;
  Units* units;       // [LAYERS, PRODUCTS]
  u32* target;        // what the grid's barrier counts to
  u8* work;           // of one operation: x, sums and 1/rms, or attention's
  DEVICE explicit Shared(u8* p)
      : ring(p), full((u64*)(p + RING_BYTES)), empty(full + STAGES), layers((Layer*)(empty + STAGES)),
        units((Units*)(layers + LAYERS)), target((u32*)(units + LAYERS * PRODUCTS)), work((u8*)(target + 4)) {}
  DEVICE Stage stage(u32 n) const {
    const u32 i = n % STAGES;
    return {ring + i * STAGE_BYTES, full + i, empty + i, n / STAGES & 1};
  }
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
struct Producer {
  const Shared& s;
  u32 n = 0;
  DEVICE void put(const void* source, u32 bytes) {
    const Stage stage = s.stage(n), before = s.stage(n - AHEAD);
    barrier_wait(stage.empty, stage.parity ^ 1);
    if (n >= AHEAD) barrier_wait(before.full, before.parity);
    barrier_arrive_expect(stage.full, bytes);
    copy_bulk(stage.memory, source, bytes, stage.full);
    ++n;
  }
  template <int OP> DEVICE void product(const Layer& layer, const Units& units) {
    using O = Of<OP>;
#pragma unroll 1
    for (int m = 0; m < O::MATRICES; ++m) {
      const Stretch here = O::stretch(m, units);
      const int tiles = here.groups * O::SLICES;
      with_type(layer.types[O::FIRST + m], [&](auto type) {
        using T = Tiles<decltype(type)::value, O::COLUMNS>;
        const u8* source = layer.weights[O::FIRST + m] + (u64)here.first * T::GROUP_BYTES;
        for (int t = 0; t < tiles; t += STAGE_TILES<T>) {
          const u32 bytes = T::span(t, min(t + STAGE_TILES<T>, tiles));
          put(source, bytes);
          source += bytes;
        }
      });
    }
  }
  // Of each page of the block's splits: the keys of 32 positions, twice where there are more, and the values of half of
  // the dims, twice. written: what the barrier has counted when this token's keys and values are.
  DEVICE void attention(const Cache& cache, const u32* arrivals, u32 written) {
    for (int item = blockIdx.x;; item += GRID) {
      const Target target(cache, 0, item % HEADS_APART);
      if (item >= HEADS_APART * target.splits.count) return;
      const Range range = range_of(target.splits, item / HEADS_APART, target.position);
      int position = range.low / PAGE_SIZE * PAGE_SIZE;
      for (u64 page = cache.page(target.slot, position), next = page; position < range.high; position += PAGE_SIZE, page = next) {
        if (position + PAGE_SIZE < range.high) next = cache.page(target.slot, position + PAGE_SIZE);
        if (position + PAGE_SIZE > target.position) {
          wait_at_least(arrivals, written);
          fence_async();
        }
        const Cached *keys = cache.key(page, target.kv_head, 0), *values = cache.value(page, target.kv_head, 0);
        put(keys, HALF_PAGE);
        if (range.high - position > STEP) put((const u8*)keys + HALF_PAGE, HALF_PAGE);
        put(values, HALF_PAGE);
        put((const u8*)values + HALF_PAGE, HALF_PAGE);
      }
    }
  }
};

// The block's tiles of a product, of which the first stage is n, to `partial`. A warp takes a stage.
template <int OP> DEVICE void multiply(const Shared& s, const Layer& layer, const Units& units, const X& x, float* partial, u32& n) {
  using O = Of<OP>;
  const int lane = lane_now(), value = lane % 16 / 4, row = lane / 16 * LANE_ROWS + value % LANE_ROWS;
  int k = threadIdx.x >> 5, groups = 0;  // k: the warp's next stage; groups: of the matrices before
#pragma unroll 1
  for (int m = 0; m < O::MATRICES; ++m) {
    const int here = O::stretch(m, units).groups, tiles = here * O::SLICES;
    with_type(layer.types[O::FIRST + m], [&](auto type) {
      constexpr int TYPE = decltype(type)::value;
      using T = Tiles<TYPE, O::COLUMNS>;
      const int stages = (tiles + STAGE_TILES<T> - 1) / STAGE_TILES<T>;
      for (; k < stages; k += WARPS) {
        const Stage stage = s.stage(n + k);
        const u8* const memory = stage.wait();
        const int first = k * STAGE_TILES<T>;
#pragma unroll
        for (int t = first; t < first + STAGE_TILES<T>; t += 2) {  // two at a time
          float sum[2 * LANE_ROWS] = {};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float one[LANE_ROWS] = {};
            auto tile = [&] { return memory + T::span(first, t + i); };
            if (t + i < tiles) dot_tile<TYPE, O::COLUMNS, 1, false>(one, tile, x, (t + i) % O::SLICES, lane);
#pragma unroll
            for (int r = 0; r < LANE_ROWS; ++r) sum[i * LANE_ROWS + r] = one[r];
          }
          const float total = sum_transposed<16>(sum);
          const int mine = t + value / LANE_ROWS;
          if (lane % 4 == 0 && mine < tiles) partial[((groups + mine / O::SLICES) * TILE_ROWS + row) * O::PITCH + mine % O::SLICES] = total;
        }
        stage.release(READERS);
      }
      n += stages, k -= stages;
    });
    groups += here;
  }
}

// One product of all of the block's units: waits for x, and leaves the results to `out`.
template <int OP, class Epilogue> DEVICE void consume(const Shared& s, const Layer& layer, const Units& units, const Rows& in, const Epilogue& out, Grid& grid, u32& n) {
  using O = Of<OP>;
  const int count = units.last - units.first, outputs = count * O::UNIT_ROWS;
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
  multiply<OP>(s, layer, units, x_at<O::COLUMNS, 1, false>(s.work), partial, n);
  sync_threads(1, CONSUMERS);

  auto result = [&](int local) {  // sum over the slices, in order
    const float* p = partial + local * O::PITCH;
    float v = p[0];
#pragma unroll
    for (int i = 1; i < O::SLICES; ++i) v += p[i];
    return O::NORM ? v * *inverse_rms : v;
  };
  for (int i = threadIdx.x; i < (outputs + 31) / 32 * 32; i += CONSUMERS) {
    if (i >= CONSUMERS) {
      mine = O::output(units.first, count, 1, i);
      ready = out.prepare(0, mine.segment, mine.n, mine.live);
      out.fetch(ready, 0, mine.n, mine.live);
      bias = bias_of(mine);
    }
    const int local = i < outputs ? i : 0;  // all of a pair's first matrix come before the second's
    if constexpr (O::PAIRED) out.finish(ready, 0, mine.n, result(local), result(outputs + local), mine.live);
    else out.finish(ready, 0, mine.segment, mine.n, result(local) + bias, mine.live);
  }
  if (OP == QKV) fence_async();  // the ring's copies read what was written to the cache
  grid.arrive();
}

// 32 positions of a page in the ring: a stage of their keys, and two of values.
struct InRing {
  const Shared& s;
  u32 keys_at, values_at;  // their stages' numbers
  int half;                // of the page
  bool both;               // halves are wanted
  DEVICE void scores(float (&score)[4][2], const uint4* q) const {
    const Stage keys = s.stage(keys_at);
    const uint4* const first = (const uint4*)keys.wait() + (lane_now() & 3);
    add_scores(score, q, [&](int tile, int j) { return first[key_position(tile) * (CACHE_DIM / 8) + 4 * j]; });
    keys.release(READERS);
  }
  DEVICE void values(float (&accumulator)[CACHE_DIM / 8][4], const float (&p)[4][2], int count) const {
    constexpr int TILES = CACHE_DIM / 16;  // of 8 dims, in a stage
    const int lane = lane_now(), place = (lane >> 2) * (PAGE_SIZE / 8) + half * (STEP / 8) + (lane & 3);
    const uint4* first = nullptr;
    add_values(accumulator, p, [&](int d) {
      if (d % TILES == 0) first = (const uint4*)s.stage(values_at + d / TILES).wait() + place;
      return first[d % TILES * PAGE_SIZE];
    }, count);
    for (u32 i = 0; i < 2; ++i) s.stage(values_at + i).release(both ? READERS / 2 : READERS);
  }
};

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
    const int first = range.low / PAGE_SIZE, end = range.high;
    auto read = [&](Warp& w, const uint4* q) {
      for (int base = first_base(target.splits, split, warp); base < end; base += ATTEND_WARPS * STEP) {
        const int half = base / STEP % 2;
        const bool both = end - base + half * STEP > STEP;
        const u32 of_page = n + 4 * (base / PAGE_SIZE - first);
        w.step(q, InRing{s, of_page + half, of_page + (both ? 2 : 1), half, both}, base, range.low, end);
      }
    };
    if (warp < ATTEND_WARPS)
      attend_split(a, target, split, s.work, a.arrived + item % HEADS_APART, thread, read, [] { sync_threads(2, ATTEND_WARPS * 32); });
    n += 4 * ((end - 1) / PAGE_SIZE - first + 1) - ((end - 1) % PAGE_SIZE < STEP);
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
    for (int i = 0; i < STAGES; ++i) barrier_init(s.full + i, 1), barrier_init(s.empty + i, READERS);
    barrier_init_fence();
  }
  sync_block();
  dependents_launch();
  Attention attention = a.attention;
  auto use = [&](const Layer& layer) { attention.cache.keys = layer.keys, attention.cache.values = layer.values; };
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x > CONSUMERS) return;
    Producer producer{s};
    u32 written = 0;
    for (int l = 0; l < LAYERS; ++l) {
      const Layer& layer = s.layers[l];
      const Units* of = s.units + l * PRODUCTS;
      producer.product<QKV>(layer, of[QKV]);
      if (l == 0) {  // weights were there before; a cache, and the counter, are as the kernel before leaves them
        dependency_wait();
        written = load_fresh(a.barrier + 1) + GRID;
      }
      use(layer);
      producer.attention(attention.cache, a.barrier, written + l * (BARRIERS * GRID));
      producer.product<OUT>(layer, of[OUT]);
      producer.product<GATE_UP>(layer, of[GATE_UP]);
      producer.product<DOWN>(layer, of[DOWN]);
    }
    return;
  }
  u32 n = 0;
  dependency_wait();
  if (threadIdx.x == 0) *s.target = load_fresh(a.barrier + 1);
  Grid grid = {a.barrier, s.target GIVE_STAMPS(a)};
  for (int l = 0; l < LAYERS; ++l) {
    const Layer& layer = s.layers[l];
    const Units* of = s.units + l * PRODUCTS;
    use(layer);
    consume<QKV>(s, layer, of[QKV], a.x, Rotary<Q_ROWS>{(float*)attention.q, attention.cache, a.turns}, grid, n);
    attend(attention, s, grid, n);
    consume<OUT>(s, layer, of[OUT], attention.out, Residual<D_MODEL>{a.x, layer.gains[0]}, grid, n);
    consume<GATE_UP>(s, layer, of[GATE_UP], a.x, Product<D_FF>{a.hidden}, grid, n);
    consume<DOWN>(s, layer, of[DOWN], a.hidden, Residual<D_MODEL>{a.x, layer.gains[1]}, grid, n);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {  // all have read the counter as it was: they have arrived since
    wait_at_least(a.barrier, *s.target);
    a.barrier[1] = *s.target;
  }
#endif
}
HOST_ENTRY_TOGETHER(token, TokenArgs)
