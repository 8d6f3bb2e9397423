// gemm's activations on their way through shared memory. Uses gemm.cu's constants.
#pragma once
#include "activations.cuh"

struct Turn {  // a stage of the ring, and the parity of the round
  int stage = 0;
  u32 parity = 0;
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// x of the next steps in shared memory: TOKENS rows × 64 columns × STAGE_STEPS a stage. A stage is filled again when
// everybody has read it: a barrier of the block says so, or one of the stage, in the midst of the next step.
struct XRing {
  static constexpr int AHEAD = STAGES - 1;
  static constexpr bool FIXED = STAGES * STAGE_STEPS == BLOCK;  // a stage is always the same part of a block
  const u8* const x;   // the block's first tile
  u8* const stages;
  u64 *const full, *const empty;
  const int tiles, begin, end;  // tiles of rows; the block's columns, in steps
  int left, column;    // stages still to request; the next's first step
  Turn now, next;      // to use, to request

  DEVICE XRing(const Rows& in, u8* shared, u64* barriers, int first_row, int rows, int first, int last, int units)
      : x((const u8*)in.brain + (u64)((in.first + first_row) / 64) * (brain_tiles(K) * TILE_BYTES) + (in.first + first_row) % 64 * 128),
        stages(shared), full(barriers), empty(barriers + STAGES), tiles((rows + 63) / 64), begin(first), end(last),
        left(units * (last - first) / STAGE_STEPS), column(first) {}
  // Copy i of a stage: of a tile of 64 rows (if there are so many), and of a step.
  static constexpr int TILES = (TOKENS + 63) / 64, COPIES = TILES * STAGE_STEPS;
  DEVICE bool exists(int i) const { return i < COPIES && i % TILES < tiles; }
  DEVICE const u8* source(int i) const { return x + ((u64)(i % TILES) * brain_tiles(K) + column + i / TILES) * TILE_BYTES; }
  DEVICE u8* target(int i) const { return stages + next.stage * STAGE_BYTES + i / TILES * STEP_BYTES + i % TILES * COPY_BYTES; }

  DEVICE void request() {
#if ARCH >= 90
    if (threadIdx.x < 32 && left > 0) {
      barrier_wait(&empty[next.stage], next.parity ^ 1);
      if (threadIdx.x == 0) barrier_arrive_expect(&full[next.stage], tiles * STAGE_STEPS * COPY_BYTES);
      sync_warp();
      if (exists(threadIdx.x)) copy_bulk(target(threadIdx.x), source(threadIdx.x), COPY_BYTES, &full[next.stage]);
    }
#else
    constexpr int PIECES = COPY_BYTES / 16;
    if (left > 0)
      for (int i = threadIdx.x; i < COPIES * PIECES; i += WARPS * 32)
        if (exists(i / PIECES)) copy_async16(target(i / PIECES) + i % PIECES * 16, source(i / PIECES) + i % PIECES * 16);
    copy_commit();
#endif
    --left;
    if ((column += STAGE_STEPS) == end) column = begin;
    next.advance();
  }
  // x of a step: quarter `quarter` of a block.
  DEVICE const u8* wait(int quarter) {
    if (quarter % STAGE_STEPS == 0) {
      if (FIXED) now.stage = quarter / STAGE_STEPS, next.stage = (now.stage + AHEAD) % STAGES;
#if ARCH >= 90
      barrier_wait(&full[now.stage], now.parity);
#else
      copy_wait<STAGES - 2>();
      sync_block();  // what was read a stage ago is free
      request();
#endif
    }
    return stages + now.stage * STAGE_BYTES + quarter % STAGE_STEPS * STEP_BYTES;
  }
  DEVICE void refill(int quarter) {
#if ARCH >= 90
    if (quarter % STAGE_STEPS == 0) request();
#endif
  }
  DEVICE void release(int quarter) {
    if (quarter % STAGE_STEPS < STAGE_STEPS - 1) return;
#if ARCH >= 90
    sync_warp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(&empty[now.stage]);
#endif
    now.advance();
  }
};
