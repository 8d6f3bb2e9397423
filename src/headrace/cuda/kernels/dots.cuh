// Dot products of tiles with rows of x in shared memory: int8 groups (activations.cuh) by integer dots, or floats.
// Sums are in an order that depends on the columns alone: a row's result is bit-equal whoever computes it.
#pragma once
#include "activations.cuh"
#include "blocks.cuh"

struct X {
  const int4* quants;
  const uint2* scales;
  const float* values;
  int columns;  // from row to row
};

// Where a lane's groups of x lie in a slice of 1,024 columns, in bytes: worked out once, not for every tile. Groups and slots
// are permuted bits, so that lane and i can be taken apart.
template <int TYPE> struct Slots {
  int quants_of_0 = 0, scales_of_0 = 0;
  DEVICE explicit Slots(int lane) {
    if constexpr (TYPE == NONE) return;
    const int group = Block<TYPE == NONE ? F32 : TYPE>::group(lane & 15, 0);
    quants_of_0 = kept(16 * quant_slot(group)), scales_of_0 = kept(8 * scale_slot(group));
  }
  DEVICE int quants(int i) const { return quants_of_0 ^ 16 * quant_slot(Block<TYPE>::group(0, i)); }
  DEVICE int scales(int i) const { return scales_of_0 ^ 8 * scale_slot(Block<TYPE>::group(0, i)); }
};

// sum[t × LANE_ROWS + r] = this lane's share of the r-th of its rows of a tile against row t of x: the tile of a slice, of
// so many blocks a row; wait() returns it when it is there. sum_transposed<16> adds the shares up.
template <int TYPE, int N_ROWS, bool FLOATS, class Wait>
DEVICE void dot_tile(float (&sum)[N_ROWS * LANE_ROWS], Wait&& wait, const X& x, const Slots<TYPE>& slots, int slice, int blocks, int lane) {
  if constexpr (TYPE != NONE) {
    using B = Block<TYPE>;
    const int l = lane & 15, first_row = lane / 16 * LANE_ROWS;
    auto absent = [&](int i) { return B::SIZE == 32 && blocks % 2 && B::block(l, i >> 1) >= blocks; };
    if constexpr (FLOATS) {
      const u8* tile = wait();
      if (!B::active(l, blocks)) return;
#pragma unroll
      for (int r = 0; r < LANE_ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float w[16];
          group_values<TYPE>(w, tile, blocks, first_row + r, l, i);
          if (absent(i)) continue;
          const int column = (slice * (TILE_COLUMNS / GROUP) + B::group(l, i)) * GROUP;
#pragma unroll
          for (int t = 0; t < N_ROWS; ++t) {
            const float4* at = (const float4*)(x.values + t * x.columns + column);
            float s = sum[t * LANE_ROWS + r];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float4 v = at[j];
              s = fmaf(w[4 * j], v.x, s); s = fmaf(w[4 * j + 1], v.y, s);
              s = fmaf(w[4 * j + 2], v.z, s); s = fmaf(w[4 * j + 3], v.w, s);
            }
            sum[t * LANE_ROWS + r] = s;
          }
        }
      }
    } else {
      int4 quants[4] = {};
      float low[4] = {}, high[4] = {}, sums[B::WEIGHTS] = {};
      auto load = [&](int t) {
#pragma unroll
        for (int i = 0; i < B::WEIGHTS; ++i) sums[i] = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int before = t * (padded(x.columns) / GROUP) + slice * (TILE_COLUMNS / GROUP);
          quants[i] = *(const int4*)((const u8*)x.quants + (before * 16 + slots.quants(i)));
          const uint2 s = *(const uint2*)((const u8*)x.scales + (before * 8 + slots.scales(i)));
          constexpr float of[2] = {1.f, 0.0625f};
          low[i] = low_scale(s) * of[B::SIXTEENFOLD >> i & 1], high[i] = high_scale(s) * of[B::SIXTEENFOLD >> i & 1];
          if (absent(i)) low[i] = high[i] = 0.f;
          else sums[B::weight(i)] += group_sum(s);
        }
      };
      if (N_ROWS == 1 && B::active(l, blocks)) load(0);
      const u8* tile = wait();
      if (!B::active(l, blocks)) return;
      // Integer sums as floats for one addition: 12,582,912 + i has i in its low bits.
      auto dots = [](u32 a, u32 b, int x, int y) {
        const int i = B::SIGNED ? dp4a((int)b, y, dp4a((int)a, x, 0x4b400000)) : dp4a(b, y, dp4a(a, x, 0x4b400000));
        return bits_to_float((u32)i) - 12582912.f;
      };
      auto dot = [&](const Share& s) {
        float parts[B::WEIGHTS] = {}, v = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& part = parts[B::weight(i)];
          part = fmaf(low[i], dots(s.q[i][0], s.q[i][1], quants[i].x, quants[i].y), part);
          part = fmaf(high[i], dots(s.q[i][2], s.q[i][3], quants[i].z, quants[i].w), part);
        }
#pragma unroll
        for (int i = 0; i < B::WEIGHTS; ++i) v = fmaf(s.w[i].y, sums[i], fmaf(s.w[i].x, parts[i], v));
        return v;
      };
      if constexpr (N_ROWS == 1) {
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) {
          Share s;
          B::unpack(s, tile, blocks, first_row + r, l);
          sum[r] = dot(s);
        }
      } else {
        Share s[LANE_ROWS];
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) B::unpack(s[r], tile, blocks, first_row + r, l);
#pragma unroll
        for (int t = 0; t < N_ROWS; ++t) {
          load(t);
#pragma unroll
          for (int r = 0; r < LANE_ROWS; ++r) sum[t * LANE_ROWS + r] = dot(s[r]);
        }
      }
    }
  }
}

// Shared memory for rows of x.
template <int COLUMNS, int N_ROWS, bool FLOATS> constexpr int X_BYTES_OF = FLOATS ? N_ROWS * COLUMNS * 4 : N_ROWS * padded(COLUMNS) / GROUP * 24;

template <int COLUMNS, int N_ROWS, bool FLOATS> DEVICE X x_at(const u8* shared) {
  return {(const int4*)shared, (const uint2*)(shared + N_ROWS * padded(COLUMNS)), (const float*)shared, COLUMNS};
}

constexpr int X_LOADS = 4;  // of x, under way in a thread

// Rows of x from `first_row` on into shared memory. WARP_COUNT warps call. meanwhile(): once the first loads are on their way.
template <int COLUMNS, int N_ROWS, bool FLOATS, bool NORMED, int WARP_COUNT, class Meanwhile>
DEVICE void load_x(const Rows& in, const float* gain, int first_row, int rows, u8* shared, Meanwhile&& meanwhile) {
  constexpr int THREADS = WARP_COUNT * 32;
  if (FLOATS) meanwhile();
  for (int t = 0; t < rows; ++t) {
    const Row row = in.row<COLUMNS>(first_row + t);
    if constexpr (FLOATS) {
      float* x = (float*)shared + t * COLUMNS;
      for (int i = threadIdx.x; i < COLUMNS; i += THREADS) x[i] = load_fresh(row.values + i) * (NORMED ? gain[i] : 1.f);
    } else {
      constexpr int N = padded(COLUMNS) / GROUP, EACH = (N + N / 2 + THREADS - 1) / THREADS, AT_ONCE = EACH < X_LOADS ? EACH : X_LOADS;
      int4* quants = (int4*)shared + t * N;
      int4* scales = (int4*)(shared + N_ROWS * N * 16) + t * (N / 2);
#pragma unroll 1
      for (int first = 0; first < N + N / 2; first += AT_ONCE * THREADS) {
        int4 v[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (const int i = first + threadIdx.x + k * THREADS; i < N + N / 2)
            v[k] = load_fresh(i < N ? row.quants + i : (const int4*)row.scales + i - N);
        if (t == 0 && first == 0) meanwhile();
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (const int i = first + threadIdx.x + k * THREADS; i < N + N / 2) *(i < N ? quants + i : scales + i - N) = v[k];
      }
    }
  }
}

// 1/rms of a row of x: a warp asks for its squares early, and adds them up when others need not wait for it.
template <int COLUMNS> struct RowNorm {
  static constexpr int N = COLUMNS / GROUP, EACH = (N + 31) / 32;
  float squares[EACH];
  DEVICE void load(const Rows& in, int row, int lane) {
    const float* const from = in.row<COLUMNS>(row).squares;
#pragma unroll
    for (int k = 0; k < EACH; ++k) squares[k] = lane + 32 * k < N ? load_fresh(from + lane + 32 * k) : 0.f;
  }
  DEVICE float inverse_rms(float eps) const {
    float s = 0.f;
#pragma unroll
    for (int k = 0; k < EACH; ++k) s += squares[k];
    return rsqrtf(warp_sum(s) * (1.f / COLUMNS) + eps);
  }
};
