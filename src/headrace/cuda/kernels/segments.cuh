// Up to three matrices that share x, one after the other. Macros: K; TYPE0…2, N0…2 (rows of each; TYPE
// NONE when absent).
#pragma once
#include "blocks.cuh"

template <int TYPE, int N> struct Segment {
  using T = Tiles<TYPE, K>;
  static constexpr int ROWS_PADDED = (N + 15) / 16 * 16, GROUP_BYTES = T::GROUP_BYTES, MAX_BYTES = T::MAX_BYTES;
  static DEVICE const u8* tile(const u8* weights, int group, int slice) { return weights + T::offset(group, slice); }
  static DEVICE u32 bytes(int slice) { return T::bytes(slice); }
};
template <int N> struct Segment<NONE, N> {
  static constexpr int ROWS_PADDED = 0, GROUP_BYTES = 0, MAX_BYTES = 0;
  static DEVICE const u8* tile(const u8*, int, int) { return nullptr; }
  static DEVICE u32 bytes(int) { return 0; }
};
using S0 = Segment<TYPE0, N0>;
using S1 = Segment<TYPE1, N1>;
using S2 = Segment<TYPE2, N2>;

constexpr int SLICES = (K + TILE_COLUMNS - 1) / TILE_COLUMNS;
