// A ring of shared memory that one thread fills by bulk copies and warps read; and attention over a cache that comes
// through it (in f16, on sm_90 and later).
#pragma once
#include "attend.cuh"

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

constexpr int HALF_PAGE = HEAD_BYTES / 2, READERS = 2;  // of a stage: two warps, or one that counts twice

template <int N, int BYTES> struct Stages {
  static_assert(HALF_PAGE <= BYTES && BYTES % 16 == 0);
  static constexpr int COUNT = N, MEMORY_BYTES = COUNT * BYTES, ALL_BYTES = MEMORY_BYTES + 2 * COUNT * 8;
  u8* memory;
  u64 *full, *empty;  // [COUNT]
  DEVICE explicit Stages(u8* p) : memory(p), full((u64*)(p + MEMORY_BYTES)), empty(full + COUNT) {}
  DEVICE void init() const {  // by one thread; then the block meets
    for (int i = 0; i < COUNT; ++i) barrier_init(full + i, 1), barrier_init(empty + i, READERS);
    barrier_init_fence();
  }
  DEVICE Stage operator()(u32 n) const {
    const u32 i = n % COUNT;
    return {memory + i * BYTES, full + i, empty + i, n / COUNT & 1};
  }
};

// The thread that fills stages: not more than UNDER_WAY of them are under way at a time.
//
// A warp may wait for a stage only when that of the round before has arrived, or it would take the one before that for it.
// Copies may overtake each other; that one has arrived says that all UNDER_WAY before it have. From one stage that it waits
// for to the next a warp goes at most 2 ATTEND_WARPS − 2 further: from a page's last to the second of ATTEND_WARPS / 2 later.
template <class S, int UNDER_WAY> struct Filler {
  static_assert(UNDER_WAY + 2 * ATTEND_WARPS - 2 <= S::COUNT);
  const S& stages;
  u32 n = 0;
  DEVICE void put(const void* source, u32 bytes) {
    const Stage stage = stages(n), before = stages(n - UNDER_WAY);
    barrier_wait(stage.empty, stage.parity ^ 1);
    if (n >= UNDER_WAY) barrier_wait(before.full, before.parity);
    barrier_arrive_expect(stage.full, bytes);
    copy_bulk(stage.memory, source, bytes, stage.full);
    ++n;
  }
  // Of each page of a split: the keys of 32 positions, twice where there are more, and the values of half of the dims,
  // twice. written() waits for this step's own keys and values.
  template <class Written> DEVICE void put_pages(const Cache& cache, const Target& target, int split, Written&& written) {
    const Range range = range_of(target.splits, split, target.position);
    int position = range.low / PAGE_SIZE * PAGE_SIZE;
    for (u64 page = cache.page(target.slot, position), next = page; position < range.high; position += PAGE_SIZE, page = next) {
      if (position + PAGE_SIZE < range.high) next = cache.page(target.slot, position + PAGE_SIZE);
      if (position + PAGE_SIZE > target.position) {
        written();
        fence_async();
      }
      const u8 *keys = (const u8*)cache.key(page, target.kv_head, 0), *values = (const u8*)cache.value(page, target.kv_head, 0);
      put(keys, HALF_PAGE);
      if (range.high - position > STEP) put(keys + HALF_PAGE, HALF_PAGE);
      put(values, HALF_PAGE);
      put(values + HALF_PAGE, HALF_PAGE);
    }
  }
};
// How many stages that are.
DEVICE int stages_of(const Range& r) {
  return 4 * ((r.high - 1) / PAGE_SIZE - r.low / PAGE_SIZE + 1) - ((r.high - 1) % PAGE_SIZE < STEP);
}

// 32 positions of a page in the ring: a stage of their keys, and two of values.
template <class S> struct InRing {
  const S& stages;
  u32 keys_at, values_at;  // their stages' numbers
  int half;                // of the page
  bool both;               // halves are wanted
  DEVICE void scores(float (&score)[4][2], const uint4* q) const {
    const Stage keys = stages(keys_at);
    const uint4* const first = (const uint4*)keys.wait() + (lane_now() & 3);
    add_scores(score, q, [&](int tile, int j) { return first[key_position(tile) * (CACHE_DIM / 8) + 4 * j]; });
    keys.release(READERS);
  }
  DEVICE void values(float (&accumulator)[CACHE_DIM / 16][4], const float (&p)[4][2], int count) const {
    constexpr int TILES = CACHE_DIM / 16;  // of 8 dims, in a stage
    const int lane = lane_now(), place = (lane >> 2) * (PAGE_SIZE / 8) + half * (STEP / 8) + (lane & 3);
    const uint4* first = nullptr;
    const Existing existing(count);
    add_values(accumulator, p, [&](int d) {
      if (d % TILES == 0) first = (const uint4*)stages(values_at + d / TILES).wait() + place;
      return existing.of(first[d % TILES * PAGE_SIZE]);
    });
    for (u32 i = 0; i < 2; ++i) stages(values_at + i).release(both ? READERS / 2 : READERS);
  }
};

// A warp's steps of a split, whose first stage is n.
template <class S> DEVICE void read_ring(Warp& w, const uint4* q, const S& stages, u32 n, const Range& range, int warp) {
  for (int base = first_base(range, warp); base < range.high; base += ATTEND_WARPS * STEP) {
    const int half = base / STEP % 2;
    const bool both = range.high - base + half * STEP > STEP;
    const u32 of_page = n + 4 * (base / PAGE_SIZE - range.low / PAGE_SIZE);
    w.step(q, InRing<S>{stages, of_page + half, of_page + (both ? 2 : 1), half, both}, base, range.low, range.high);
  }
}
