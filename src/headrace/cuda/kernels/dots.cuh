// Dot products of tiles with rows of x in shared memory: int8 groups (activations.cuh) by integer dots, or floats.
// Sums are in an order that depends on the columns alone: a row's result is bit-equal whoever computes it.
#pragma once
#include "activations.cuh"
#include "blocks.cuh"

struct X {
  const int4* quants;
  const uint2* scales;
  const float* values;
};

// sum[t × 4 + r] = this lane's share of tile row r against row t of x, whose rows have so many columns; wait() returns
// the tile when it is there.
template <int TYPE, int COLUMNS, int N_ROWS, bool FLOATS, class Wait>
DEVICE void dot_tile(float (&sum)[N_ROWS * TILE_ROWS], Wait&& wait, const X& x, int slice, int lane) {
  if constexpr (TYPE != NONE) {
    using B = Block<TYPE>;
    const int blocks = Tiles<TYPE, COLUMNS>::blocks(slice);
    const bool active = B::block(lane) < blocks;
    const int a = slice * (TILE_COLUMNS / GROUP) + B::group_a(lane), b = slice * (TILE_COLUMNS / GROUP) + B::group_b(lane);
    if constexpr (FLOATS) {
      const u8* tile = wait();
      if (!active) return;
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        float w[32];
        lane_values<TYPE>(w, tile, blocks, r, lane);
#pragma unroll
        for (int t = 0; t < N_ROWS; ++t) {
          const float4* xa = (const float4*)(x.values + t * COLUMNS + a * GROUP);
          const float4* xb = (const float4*)(x.values + t * COLUMNS + b * GROUP);
          float s = 0.f;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float4 v = i < 4 ? xa[i] : xb[i - 4];
            s = fmaf(w[4 * i], v.x, s); s = fmaf(w[4 * i + 1], v.y, s);
            s = fmaf(w[4 * i + 2], v.z, s); s = fmaf(w[4 * i + 3], v.w, s);
          }
          sum[t * TILE_ROWS + r] = s;
        }
      }
    } else {
      int4 xa = {}, xb = {};
      uint2 sa = {}, sb = {};
      auto load = [&](int t) {
        xa = x.quants[t * (padded(COLUMNS) / GROUP) + quant_slot(a)];
        xb = x.quants[t * (padded(COLUMNS) / GROUP) + quant_slot(b)];
        sa = x.scales[t * (padded(COLUMNS) / GROUP) + scale_slot(a)];
        sb = x.scales[t * (padded(COLUMNS) / GROUP) + scale_slot(b)];
      };
      if (N_ROWS == 1 && active) load(0);
      const u8* tile = wait();
      if (!active) return;
      // Integer sums as floats for one addition: 12,582,912 + i has i in its low bits.
      auto dots = [](int a, int b, int x, int y) {
        return bits_to_float((u32)dp4a(b, y, dp4a(a, x, 0x4b400000))) - 12582912.f;
      };
      auto dot = [&](const Share& s) {
        float a = low_scale(sa) * dots(s.a[0], s.a[1], xa.x, xa.y);
        float b = low_scale(sb) * dots(s.b[0], s.b[1], xb.x, xb.y);
        a = fmaf(high_scale(sa), dots(s.a[2], s.a[3], xa.z, xa.w), a);
        b = fmaf(high_scale(sb), dots(s.b[2], s.b[3], xb.z, xb.w), b);
        float v = s.wa.x * a;
        v = fmaf(s.wb.x, b, v);
        v = fmaf(s.wa.y, group_sum(sa), v);
        return fmaf(s.wb.y, group_sum(sb), v);
      };
      if constexpr (N_ROWS == 1) {
#pragma unroll
        for (int r = 0; r < TILE_ROWS; ++r) {
          Share s;
          B::unpack(s, tile, blocks, r * blocks + B::block(lane), lane & 7);
          sum[r] = dot(s);
        }
      } else {
        Share s[TILE_ROWS];
#pragma unroll
        for (int r = 0; r < TILE_ROWS; ++r) B::unpack(s[r], tile, blocks, r * blocks + B::block(lane), lane & 7);
#pragma unroll
        for (int t = 0; t < N_ROWS; ++t) {
          load(t);
#pragma unroll
          for (int r = 0; r < TILE_ROWS; ++r) sum[t * TILE_ROWS + r] = dot(s[r]);
        }
      }
    }
  }
}

// Shared memory for rows of x.
template <int COLUMNS, int N_ROWS, bool FLOATS> constexpr int X_BYTES_OF = FLOATS ? N_ROWS * COLUMNS * 4 : N_ROWS * padded(COLUMNS) / GROUP * 24;

template <int COLUMNS, int N_ROWS, bool FLOATS> DEVICE X x_at(const u8* shared) {
  return {(const int4*)shared, (const uint2*)(shared + N_ROWS * padded(COLUMNS)), (const float*)shared};
}

// Rows of x from `first_row` on into shared memory, and 1/rms of each. gain: the norm's, for floats. WARP_COUNT warps call.
template <int COLUMNS, int N_ROWS, bool FLOATS, bool NORMED, int WARP_COUNT>
DEVICE void load_x(const Rows& in, const float* gain, float eps, int first_row, int rows, u8* shared, float* inverse_rms) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (NORMED) {
    const int t = WARP_COUNT - 1 - warp;  // the last warps: the first are busy with x
    if (t < rows) {
      const float* squares = in.row<COLUMNS>(first_row + t).squares;
      float s = 0.f;
#pragma unroll 8
      for (int i = lane; i < COLUMNS / GROUP; i += 32) s += load_fresh(squares + i);
      s = warp_sum(s);
      if (lane == 0) inverse_rms[t] = rsqrtf(s * (1.f / COLUMNS) + eps);
    }
  }
  for (int t = 0; t < rows; ++t) {
    const Row row = in.row<COLUMNS>(first_row + t);
    if constexpr (FLOATS) {
      float* x = (float*)shared + t * COLUMNS;
      for (int i = threadIdx.x; i < COLUMNS; i += WARP_COUNT * 32) x[i] = load_fresh(row.values + i) * (NORMED ? gain[i] : 1.f);
    } else {
      constexpr int N = padded(COLUMNS) / GROUP;
      int4* quants = (int4*)shared + t * N;
      int4* scales = (int4*)(shared + N_ROWS * N * 16) + t * (N / 2);
      for (int i = threadIdx.x; i < N + N / 2; i += WARP_COUNT * 32) {
        if (i < N) quants[i] = load_fresh(row.quants + i);
        else scales[i - N] = load_fresh((const int4*)row.scales + i - N);
      }
    }
  }
}
