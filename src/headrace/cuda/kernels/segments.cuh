// Up to three matrices that share x, one after the other. Macros: K; TYPE0…2, N0…2 (rows of each; TYPE
// NONE when absent); and, where GRID blocks share them by units of UNIT_ROWS rows, these and PAIRED.
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

#ifdef GRID
// The first unit of block b, so that blocks read equally many bytes.
DEVICE int first_unit(u32 b) {
  constexpr u64 unit = UNIT_ROWS / TILE_ROWS;
  constexpr int units0 = S0::ROWS_PADDED / UNIT_ROWS, units1 = S1::ROWS_PADDED / UNIT_ROWS, units2 = S2::ROWS_PADDED / UNIT_ROWS;
  if constexpr (PAIRED || TYPE1 == NONE) return (int)(((u64)units0 * b + GRID - 1) / GRID);
  else {
    constexpr u64 cost0 = units0 * unit * S0::GROUP_BYTES, cost1 = units1 * unit * S1::GROUP_BYTES;
    u64 target = (cost0 + cost1 + units2 * unit * S2::GROUP_BYTES) * b / GRID;
    auto units = [](u64 bytes, u64 each) { return (int)((bytes + each - 1) / each); };
    if (target <= cost0) return units(target, unit * S0::GROUP_BYTES);
    target -= cost0;
    if (TYPE2 == NONE || target <= cost1) return units0 + units(target, unit * S1::GROUP_BYTES);
    return units0 + units1 + units(target - cost1, unit * larger(S2::GROUP_BYTES, 1));
  }
}
#endif
