// Grouped-query attention of each row over its slot's cache, split over the positions: a block has one row, the query
// heads of one tile, and one split (attend.cuh). With RING the cache comes through shared memory (attend_ring.cuh), as
// much of it as fits before the previous kernel has ended; else straight to registers.
//
// Macros: those of attend.cuh; RING: stages, or 0.
#if RING
#include "attend_ring.cuh"
#else
#include "attend.cuh"
#endif

struct AttendArgs {
  Attention attention;
  STAMPS
};

#if RING
using AttendRing = Stages<RING, HALF_PAGE>;
constexpr int RING_BYTES = AttendRing::ALL_BYTES, PRODUCERS = 32;
#else
constexpr int RING_BYTES = 0, PRODUCERS = 0;
#endif
constexpr int SHARED_BYTES = RING_BYTES + ATTEND_BYTES, READING = ATTEND_WARPS * 32;

KERNEL(READING + PRODUCERS, BLOCKS) attend(ARGS(AttendArgs, args)) {
  DYNAMIC_SHARED(shared);
  const Attention& a = args.attention;
  u8* const work = shared + RING_BYTES;
  u32* const arrived = a.arrived + blockIdx.z * gridDim.x + blockIdx.x;
  const int split = blockIdx.y, warp = threadIdx.x >> 5;
#if RING
  const AttendRing stages(shared);
  if (threadIdx.x == 0) stages.init();
  sync_block();
  dependents_launch();
  const Target target(a.cache, blockIdx.z, blockIdx.x);
  if (threadIdx.x >= READING) {
    if (threadIdx.x > READING) return;
    Filler<AttendRing, RING - (2 * ATTEND_WARPS - 2)> filler{stages};
    for (int one = split; one < target.splits.count; one += gridDim.y) filler.put_pages(a.cache, target, one, dependency_wait);
    return;
  }
  BEGIN(args);
  u32 n = 0;
  for (int one = split; one < target.splits.count; one += gridDim.y) {
    auto read = [&](Warp& w, const uint4* q) { read_ring(w, q, stages, n, target, one, warp); };
    attend_split(a, target, one, work, arrived, threadIdx.x, read, [] { sync_threads(1, READING); });
    n += stages_of(range_of(target.splits, one, target.position));
  }
#else
  dependents_launch();
  const Target target(a.cache, blockIdx.z, blockIdx.x);
  u64 page = target.first_page(a.cache, split, warp);
  if (split < target.splits.count) {
    const int base = first_base(target.splits, split, warp);
    if (base <= target.position) prefetch(a.cache, page, target.kv_head, base);
  }
  BEGIN(args);
  for (int one = split; one < target.splits.count; one += gridDim.y) {
    auto read = [&](Warp& w, const uint4* q) {
      const Range range = range_of(target.splits, one, target.position);
      int base = first_base(target.splits, one, warp);
      if (one != split && base < range.high) page = a.cache.page(target.slot, base);
      for (; base < range.high; base += ATTEND_WARPS * STEP) {
        w.step(q, InMemory{a.cache, page, target.kv_head, base}, base, range.low, range.high);
        if (base + ATTEND_WARPS * STEP < range.high) page = a.cache.page(target.slot, base + ATTEND_WARPS * STEP);
      }
    };
    attend_split(a, target, one, work, arrived, threadIdx.x, read, sync_block);
  }
#endif
}
HOST_ENTRY(attend, AttendArgs)
