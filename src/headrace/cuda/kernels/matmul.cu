// Y = X Wᵀ on tensor cores, for several rows of x (bfloat16) and up to three matrices that share them, with
// the norm before and what follows (EPILOGUE) in the same kernel: one read of the packed weights serves
// all rows. The tiles are matvec.cu's.
//
// A block takes units of MT × 16 rows of W, and streams their tiles and the same columns of x through shared
// memory, a slice of 1,024 columns at a time. Four warps share the columns of 16 rows: each unpacks its
// weights to bfloat16 in registers, as the rows' operand of the mma, and multiplies 8 rows of x at a time.
// Which column is which k of an mma is free as long as both operands agree: a lane's k are the columns that
// it unpacks. The four warps' sums meet in shared memory.
//
// A row's result depends on nothing but the row: not on ROWS, on its neighbours, or on the grid.
//
// Macros: K; TYPE0…2, N0…2; PAIRED, NORM, EPS, EPILOGUE as in matvec.cu; ROWS (of x, at once: 8, 16 or 32);
// WARPS (a multiple of 8); STAGES; and the epilogue's own.
#include "epilogues.cuh"
#include "fragments.cuh"
#include "segments.cuh"

constexpr int MT = WARPS / 4;  // of 16 rows of W each
constexpr int TILES = 4 * MT, TILE_BYTES = (larger(S0::MAX_BYTES, larger(S1::MAX_BYTES, S2::MAX_BYTES)) + 127) / 128 * 128;
constexpr int OUTPUTS = PAIRED ? 8 * MT : 16 * MT, NT = ROWS / 8;
constexpr int M_TILES = (S0::ROWS_PADDED + S1::ROWS_PADDED + S2::ROWS_PADDED) / 16, UNITS = (M_TILES + MT - 1) / MT;
constexpr int WEIGHT_BYTES = TILES * TILE_BYTES, X_BYTES = ROWS * TILE_COLUMNS * 2, PARTIAL_BYTES = 4 * ROWS * MT * 16 * 4;
constexpr int BARRIER_BYTES = (STAGES * 8 + 15) / 16 * 16;
constexpr int SHARED_BYTES = STAGES * (WEIGHT_BYTES + X_BYTES) + PARTIAL_BYTES + BARRIER_BYTES + ROWS * 4;

struct MatmulArgs {
  const u8* weights[3];
  const float* bias[3];
  Rows in;
  Epilogue out;
  int n_rows;
  STAMPS
};

struct Place { int segment, group; };  // group: of four rows

// Sixteen rows of W: the m-th of a pair are those of gate and of up, in turn.
DEVICE Place place(int m) {
  if (PAIRED) return {m & 1, (m >> 1) * 4};
  constexpr int m0 = S0::ROWS_PADDED / 16, m1 = S1::ROWS_PADDED / 16;
  if (TYPE1 == NONE || m < m0) return {0, 4 * m};
  if (TYPE2 == NONE || m < m0 + m1) return {1, 4 * (m - m0)};
  return {2, 4 * (m - m0 - m1)};
}
DEVICE u32 tile_bytes(int segment, int slice) {
  return segment == 0 ? S0::bytes(slice) : segment == 1 ? S1::bytes(slice) : S2::bytes(slice);
}
DEVICE const u8* tile_address(const MatmulArgs& a, const Place& p, int tile, int slice) {
  if (p.segment == 0) return S0::tile(a.weights[0], p.group + tile, slice);
  if (p.segment == 1) return S1::tile(a.weights[1], p.group + tile, slice);
  return S2::tile(a.weights[2], p.group + tile, slice);
}

#if ARCH < 90
// Copies of a slice's weights and x are one group.
DEVICE void copy16(void* target, const void* source) {
#if ARCH >= 80
  copy_async16(target, source);
#else
  *(uint4*)target = *(const uint4*)source;
#endif
}
#endif

// The tiles of one slice of a unit into a stage.
DEVICE void request_weights(const MatmulArgs& a, u8* stage, u64* barrier, int unit, int slice) {
#if ARCH >= 90
  if (threadIdx.x >= 32) return;
  const int tile = threadIdx.x, m = unit * MT + tile / 4;
  const bool mine = tile < TILES && m < M_TILES;
  const Place p = place(mine ? m : 0);
  const u32 bytes = mine ? tile_bytes(p.segment, slice) : 0;
  u32 all = bytes;
#pragma unroll
  for (int step = 16; step; step >>= 1) all += shuffle_xor(all, step);
  if (tile == 0) barrier_arrive_expect(barrier, all);
  sync_warp();
  if (mine) copy_bulk(stage + tile * TILE_BYTES, tile_address(a, p, tile % 4, slice), bytes, barrier);
#else
  for (int tile = 0; tile < TILES; ++tile) {
    const int m = unit * MT + tile / 4;
    if (m >= M_TILES) break;
    const Place p = place(m);
    const u32 bytes = tile_bytes(p.segment, slice);
    const u8* source = tile_address(a, p, tile % 4, slice);
    for (u32 i = threadIdx.x * 16; i < bytes; i += WARPS * 512) copy16(stage + tile * TILE_BYTES + i, source + i);
  }
#endif
}

// Where 8 columns of a row of x lie in a stage: unit u = column / 8. Lanes of a quarter warp read units of
// two rows, one half of each group of 16, and meet no bank twice.
DEVICE int x_slot(int row, int u) { return row * 128 + (u & 1) * 64 + ((u >> 1) ^ ((row & 1) * 7)); }

DEVICE void request_x(const MatmulArgs& a, u8* stage, int first_row, int rows, int slice) {
  constexpr int UNITS_A_ROW = TILE_COLUMNS / 8;
  const int units = min(UNITS_A_ROW, K / 8 - slice * UNITS_A_ROW);
  for (int i = threadIdx.x; i < ROWS * UNITS_A_ROW; i += WARPS * 32) {
    const int row = i / UNITS_A_ROW, u = i % UNITS_A_ROW;
    u8* target = stage + x_slot(row, u) * 16;
    if (row >= rows || u >= units) *(uint4*)target = make_uint4(0, 0, 0, 0);  // 0 × NaN is NaN
    else {
      const u16* source = a.in.row<K>(first_row + row).brain_at(slice * TILE_COLUMNS + u * 8);
#if ARCH >= 80
      copy_async16(target, source);
#else
      *(uint4*)target = load_fresh((const uint4*)source);
#endif
    }
  }
#if ARCH >= 80
  copy_commit();
#endif
}

// Sixteen weights of a lane (one group of one row) as bfloat16: w[j] holds columns 2j and 2j + 1.
template <bool SIGNED> DEVICE void to_brain(u32 (&w)[8], const int (&q)[4], float2 weigh) {
  const float offset = biased_offset<SIGNED>(weigh);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 pair[2];
    to_brain4<SIGNED>(pair, (u32)q[i], weigh.x, offset);
    w[2 * i] = pair[0];
    w[2 * i + 1] = pair[1];
  }
}
DEVICE void to_brain(u32 (&w)[8], const float* v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) w[i] = pack_brain2(v[2 * i], v[2 * i + 1]);
}

// Both groups (a, b) of virtual lane v of one tile row.
template <int TYPE> DEVICE void unpack_brain(u32 (&a)[8], u32 (&b)[8], const u8* tile, int blocks, int row, int v) {
  using B = Block<TYPE>;
  if (B::block(v) >= blocks) {
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = b[i] = 0;
  } else if constexpr (is_float_type(TYPE)) {
    float w[32];
    lane_values<TYPE>(w, tile, blocks, row, v);
    to_brain(a, w);
    to_brain(b, w + 16);
  } else {
    Share s;
    B::unpack(s, tile, blocks, row * blocks + B::block(v), v & 7);
    to_brain<TYPE == Q8_0>(a, s.a, s.wa);
    to_brain<TYPE == Q8_0>(b, s.b, s.wb);
  }
}

// One slice: this warp's quarter of the columns, its 16 rows of W, all rows of x.
template <int TYPE> DEVICE void multiply(float (&sum)[NT][4], const u8* tiles, const u8* x, int slice) {
  if constexpr (TYPE != NONE) {
    using B = Block<TYPE>;
    const int lane = threadIdx.x & 31, line = lane >> 2, quad = lane & 3, part = (threadIdx.x >> 5) & 3;
    const int blocks = Tiles<TYPE, K>::blocks(slice);
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
      const int v = 8 * part + 4 * round + quad;
      u32 w[2][2][8];  // [group a or b][upper or lower eight rows]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = line + 8 * half;
        unpack_brain<TYPE>(w[0][half], w[1][half], tiles + row / TILE_ROWS * TILE_BYTES, blocks, row % TILE_ROWS, v);
      }
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const int g = group ? B::group_b(v) : B::group_a(v);
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const uint4 low = *(const uint4*)(x + x_slot(8 * t + line, 2 * g) * 16);
          const uint4 high = *(const uint4*)(x + x_slot(8 * t + line, 2 * g + 1) * 16);
          const u32 b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const u32 rows[4] = {w[group][0][2 * j], w[group][1][2 * j], w[group][0][2 * j + 1], w[group][1][2 * j + 1]};
            mma_brain(sum[t], rows, b[2 * j], b[2 * j + 1]);
          }
        }
      }
    }
  }
}

// 1/rms of each row, a warp a row.
DEVICE void inverse_rms(const MatmulArgs& a, int first_row, int rows, float* inverse) {
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

// The sums of the four warps of each output, and what follows.
DEVICE void finish(const MatmulArgs& a, const float* partial, const float* inverse, int unit, int first_row, int rows) {
  constexpr int PITCH = MT * 16;
  auto total = [&](int t, int local) {
    float v = 0.f;
#pragma unroll
    for (int part = 0; part < 4; ++part) v += partial[(part * ROWS + t) * PITCH + local];
    return NORM ? v * inverse[t] : v;
  };
  for (int i = threadIdx.x; i < (rows * OUTPUTS + 31) / 32 * 32; i += WARPS * 32) {
    const int t = min(i / OUTPUTS, rows - 1), o = i % OUTPUTS, m = unit * MT + o / 16 * (PAIRED ? 2 : 1);
    const Place p = place(min(m, M_TILES - 1));
    const int n = p.group * 4 + o % 16;
    const bool live = i < rows * OUTPUTS && m < M_TILES && n < (p.segment == 0 ? N0 : p.segment == 1 ? N1 : N2);
    Ready ready = a.out.prepare(first_row + t, p.segment, n, live);
    a.out.fetch(ready, first_row + t, n, live);
#if PAIRED
    const int local = o / 16 * 32 + o % 16;
    a.out.finish(ready, first_row + t, n, total(t, local), total(t, local + 16), live);
#else
    const float* bias = p.segment == 0 ? a.bias[0] : p.segment == 1 ? a.bias[1] : a.bias[2];
    a.out.finish(ready, first_row + t, p.segment, n, total(t, o) + (bias && live ? bias[n] : 0.f), live);
#endif
  }
}

KERNEL(WARPS * 32, 1) matmul(ARGS(MatmulArgs, a)) {
  DYNAMIC_SHARED(shared);
  u8* const weights = shared;
  u8* const x = shared + STAGES * WEIGHT_BYTES;
  float* const partial = (float*)(x + STAGES * X_BYTES);
  u64* const barriers = (u64*)((u8*)partial + PARTIAL_BYTES);
  float* const inverse = (float*)((u8*)barriers + BARRIER_BYTES);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, line = lane >> 2, quad = lane & 3;
  // Blocks side by side have the same rows of W, and other rows of x: they share what L2 holds.
  const int first_row = blockIdx.x * ROWS, rows = min(ROWS, a.n_rows - first_row), first_unit = blockIdx.y, stride = gridDim.y;
  const int units = UNITS > first_unit ? (UNITS - 1 - first_unit) / stride + 1 : 0, steps = units * SLICES;
  auto unit_of = [&](int step) { return first_unit + step / SLICES * stride; };
#if ARCH >= 90
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) barrier_init(&barriers[s], 1);
    barrier_init_fence();
  }
  sync_block();
  for (int s = 0; s < min(STAGES, steps); ++s)
    request_weights(a, weights + s * WEIGHT_BYTES, &barriers[s], unit_of(s), s % SLICES);
#endif
  dependents_launch();
  BEGIN(a);
  auto request = [&](int step, bool with_weights) {
    const int s = step % STAGES;
    if (with_weights) request_weights(a, weights + s * WEIGHT_BYTES, &barriers[s], unit_of(step), step % SLICES);
    request_x(a, x + s * X_BYTES, first_row, rows, step % SLICES);
  };
  for (int s = 0; s < STAGES; ++s)
    if (s < steps) request(s, ARCH < 90);
#if ARCH >= 80
    else copy_commit();
#endif
  if (NORM) inverse_rms(a, first_row, rows, inverse);

  float sum[NT][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int s = step % STAGES, unit = unit_of(step), slice = step % SLICES;
#if ARCH >= 90
    barrier_wait(&barriers[s], step / STAGES & 1);
#endif
#if ARCH >= 80
    copy_wait<STAGES - 1>();
#endif
    sync_block();
    const int m = unit * MT + (warp >> 2);
    if (m < M_TILES) {
      const u8* tiles = weights + s * WEIGHT_BYTES + (warp >> 2) * 4 * TILE_BYTES;
      const int segment = place(m).segment;
      if (segment == 0) multiply<TYPE0>(sum, tiles, x + s * X_BYTES, slice);
      else if (segment == 1) multiply<TYPE1>(sum, tiles, x + s * X_BYTES, slice);
      else multiply<TYPE2>(sum, tiles, x + s * X_BYTES, slice);
    }
    if (slice == SLICES - 1) {
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          partial[((warp & 3) * ROWS + 8 * t + 2 * quad + (i & 1)) * (MT * 16) + (warp >> 2) * 16 + line + 8 * (i >> 1)] = sum[t][i];
          sum[t][i] = 0.f;
        }
    }
    sync_block();
    if (step + STAGES < steps) request(step + STAGES, true);
#if ARCH >= 80
    else copy_commit();
#endif
    if (slice == SLICES - 1) finish(a, partial, inverse, unit, first_row, rows);
  }
}
HOST_ENTRY(matmul, MatmulArgs)
