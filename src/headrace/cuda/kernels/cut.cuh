// How a product of up to three matrices of A, B and C rows that share x is cut into units of outputs, groups of four
// rows, and tiles: stacked, or a pair (gate and up: output i takes row i of both).
#pragma once
#include "blocks.cuh"

struct Place { int segment, group, slice; };

// Output i of some units: of row `row` of x, row `n` of matrix `segment`; its sums are at `local` (and, of a
// pair's second matrix, UNIT_ROWS further on).
struct Output { int row, segment, n, local; bool live; };

template <int COLUMNS, int UNIT, bool IS_PAIR, int A, int B, int C> struct Cut {
  static constexpr int SLICES = (COLUMNS + TILE_COLUMNS - 1) / TILE_COLUMNS, PITCH = SLICES | 1;
  static constexpr int UNIT_GROUPS = UNIT / TILE_ROWS * (IS_PAIR ? 2 : 1), UNIT_TILES = UNIT_GROUPS * SLICES;
  static constexpr int PADDED_A = (A + 15) / 16 * 16, PADDED_B = (B + 15) / 16 * 16;

  // Tile t of a block that starts at unit `first`.
  static DEVICE Place place(int first, int t) {
    const int g = t / SLICES, slice = t % SLICES;
    if (IS_PAIR) {
      constexpr int half = UNIT / TILE_ROWS;
      const int in_unit = g % (2 * half);
      return {in_unit >= half, (first + g / (2 * half)) * half + in_unit % half, slice};
    }
    const int group = first * (UNIT / TILE_ROWS) + g;
    constexpr int groups_a = PADDED_A / TILE_ROWS, groups_b = PADDED_B / TILE_ROWS;
    if (B == 0 || group < groups_a) return {0, group, slice};
    if (C == 0 || group < groups_a + groups_b) return {1, group - groups_a, slice};
    return {2, group - groups_a - groups_b, slice};
  }
  // Of `units` units from `unit` on, for `rows` rows of x.
  static DEVICE Output output(int unit, int units, int rows, int i) {
    const int outputs = units * UNIT;
    const bool live = i < outputs * rows;
    const int row = live && rows > 1 ? i / outputs : 0, o = live ? i - row * outputs : 0;
    int n = unit * UNIT + o, segment = 0;
    if (IS_PAIR) return {row, 0, n, o / UNIT * (2 * UNIT) + o % UNIT, live && n < A};
    if (B > 0 && n >= PADDED_A) n -= PADDED_A, segment = 1;
    if (C > 0 && segment == 1 && n >= PADDED_B) n -= PADDED_B, segment = 2;
    return {row, segment, n, o, live && n < (segment == 0 ? A : segment == 1 ? B : C)};
  }
};
