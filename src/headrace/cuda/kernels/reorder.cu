// A chunk of a matrix from the file's rows into tiles (blocks.cuh), at load. Padding becomes zeros.
// Rows of q and k are permuted so that rotary pairs lie side by side (rope_dim > 0).
// Macros: VALUES, BLOCK_BYTES (a block, as tiles see it); PLANE_OFFSETS, PLANE_SIZES (layout.py).
#include "primitives.cuh"

struct ReorderArgs {
  const u8* source;  // file rows first_row …, `rows` of them
  u8* target;        // the whole matrix in tiles
  int n, k;          // of the whole matrix
  int first_row, rows;
  int head_dim, rope_dim;
  STAMPS
};

constexpr int SHARED_BYTES = 0, ROWS_A_GROUP = 4, SLICE = 1024;

KERNEL(256, 1) reorder(ARGS(ReorderArgs, a)) {
  constexpr int offsets[] = PLANE_OFFSETS, sizes[] = PLANE_SIZES, planes = sizeof sizes / sizeof *sizes;
  dependents_launch();
  BEGIN(a);
  const int group = a.first_row / ROWS_A_GROUP + blockIdx.x;
  auto tile_bytes = [&](int blocks) {
    int total = 0;
    for (int p = 0; p < planes; ++p) total += (ROWS_A_GROUP * blocks * sizes[p] + 15) / 16 * 16;
    return total;
  };
  const int full = tile_bytes(SLICE / VALUES), slices = a.k / SLICE, row_bytes = a.k / VALUES * BLOCK_BYTES;
  const int group_bytes = slices * full + tile_bytes(a.k % SLICE / VALUES);
  for (int at = 2 * threadIdx.x; at < group_bytes; at += 512) {
    const int slice = min(at / full, slices), blocks = slice < slices ? SLICE / VALUES : a.k % SLICE / VALUES;
    int offset = at - slice * full, plane = 0;
    for (int bytes; offset >= (bytes = (ROWS_A_GROUP * blocks * sizes[plane] + 15) / 16 * 16); ++plane) offset -= bytes;
    const int i = offset / sizes[plane], row_in_group = i / blocks, row = group * ROWS_A_GROUP + row_in_group;
    int from = row;
    if (const int dim = a.rope_dim ? row % a.head_dim : 0; dim < a.rope_dim)
      from = row - dim + dim / 2 + (dim & 1) * (a.rope_dim / 2);
    u16 value = 0;
    if (row_in_group < ROWS_A_GROUP && row < a.n) {
      const u64 block = (u64)(from - a.first_row) * row_bytes + (u64)(slice * (SLICE / VALUES) + i % blocks) * BLOCK_BYTES;
      const u8* p = a.source + block + offsets[plane] + offset % sizes[plane];
      value = (u16)(p[0] | p[1] << 8);
    }
    *(u16*)(a.target + (u64)group * group_bytes + at) = value;
  }
}
HOST_ENTRY(reorder, ReorderArgs)
