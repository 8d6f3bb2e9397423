// Grouped-query attention of a prompt's rows over their slots' caches, on tensor cores: what attend.cu does for
// one row of each slot. A block takes one kv head and TOKENS consecutive rows; a warp takes 16 or 32 of the rows
// for one query head. Keys and values pass through shared memory, STEP positions at a time, once for all of them:
// prompt_attend_mma.cuh and, where wgmma can, prompt_attend_wgmma.cuh.
//
// Queries, keys, values and probabilities are rounded to f16, as is the cache unless it is quantised; sums are f32. The result is bfloat16.
// Steps begin at multiples of STEP, and those a row does not see change nothing of it: a row is bit-equal
// whatever the chunk it comes in.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM (a multiple of 16), SCALE, WINDOW (0: none), SOFTCAP (0: none), HEAD_TILE (query heads
// of a block), WARPS (a multiple of it), STAGES, TOGETHER (by wgmma).
#include "activations.cuh"
#include "kv_cache.cuh"

constexpr int GROUP_HEADS = HEADS / KV_HEADS, HEAD_TILES = (GROUP_HEADS + HEAD_TILE - 1) / HEAD_TILE;
constexpr float LOG2_E = 1.4426950408889634f, SCALED = SOFTCAP > 0.f ? SCALE : SCALE * LOG2_E;

struct Span { int low, high; };  // the positions that a row sees

#if TOGETHER
#include "prompt_attend_wgmma.cuh"
#else
#include "prompt_attend_mma.cuh"
#endif
constexpr int TOKENS = WARPS / HEAD_TILE * MT * 16, SHARED_BYTES = RING_BYTES + Q_BYTES + 2 * TOKENS * 4;

struct PromptAttendArgs {
  const float* q;  // [rows, HEADS × HEAD_DIM], rotated
  Cache cache;
  Rows out;        // [rows, HEADS × HEAD_DIM], bfloat16
  int n_rows;
  STAMPS
};

KERNEL(WARPS * 32, BLOCKS) prompt_attend(ARGS(PromptAttendArgs, a)) {
#if ARCH >= 80
  DYNAMIC_SHARED(shared);
  uint4* const queries = (uint4*)(shared + RING_BYTES);  // [WARPS, MT, FRAGMENTS, lane]
  int* const positions = (int*)((u8*)queries + Q_BYTES);
  int* const slots = positions + TOKENS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, line = lane >> 2, quad = lane & 3;
  const int kv_head = blockIdx.x / HEAD_TILES, in_group = blockIdx.x % HEAD_TILES * HEAD_TILE + warp % HEAD_TILE;
  const int head = kv_head * GROUP_HEADS + min(in_group, GROUP_HEADS - 1), token = warp / HEAD_TILE * MT * 16;
  // The last rows see the most positions: they begin first.
  const int first_row = (gridDim.y - 1 - blockIdx.y) * TOKENS, rows = min(TOKENS, a.n_rows - first_row);
  dependents_launch();
  BEGIN(a);
  for (int i = threadIdx.x; i < rows; i += WARPS * 32) {
    positions[i] = load_fresh(a.cache.positions + first_row + i);
    slots[i] = load_fresh(a.cache.slots + first_row + i);
  }
  Warp w;
  w.load_query(a.q, queries, first_row, token, rows, head);
  // Runs of rows of one slot, nearly always one.
  for (int begin = 0, end; begin < rows; begin = end) {
    sync_block();
    const int slot = slots[begin];
    for (end = begin + 1; end < rows && slots[end] == slot;) ++end;
    const int start = (WINDOW ? max(0, positions[begin] + 1 - WINDOW) : 0) / STEP * STEP, high = positions[end - 1] + 1;
    Span spans[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = token + 16 * m + 8 * half + line;
        const bool mine = row >= begin && row < end;
        const int position = mine ? positions[row] : -1;
        spans[m][half] = {WINDOW ? position + 1 - WINDOW : 0, position + 1};
      }
    w.attend(a.cache, shared, queries, slot, kv_head, start, high, spans);
  }
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = w.sum[m][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int row = token + 16 * m + 8 * half + line;
      if (row >= rows || in_group >= GROUP_HEADS) continue;
      const Row out = a.out.row<HEADS * HEAD_DIM>(first_row + row);
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) {
        const float* c = w.accumulator[m][d] + 2 * half;
        *(u32*)out.brain_at(head * HEAD_DIM + 8 * d + 2 * quad) = pack_brain2(c[0] / sum, c[1] / sum);
      }
    }
#endif
}
HOST_ENTRY(prompt_attend, PromptAttendArgs)
