// Grouped-query attention of each row over its slot's cache, split over the positions: a block has one row, the query
// heads of one tile, and one split (attend.cuh).
//
// Macros: those of attend.cuh; PREFETCH (steps of a warp).
#include "attend.cuh"

constexpr int SHARED_BYTES = ATTEND_BYTES;

struct AttendArgs {
  Attention attention;
  STAMPS
};

KERNEL(ATTEND_WARPS * 32, 1) attend(ARGS(AttendArgs, args)) {
  DYNAMIC_SHARED(shared);
  const Attention& a = args.attention;
  dependents_launch();
  const Target target(a.cache, blockIdx.z, blockIdx.x);
  const int split = blockIdx.y, warp = threadIdx.x >> 5;
  u64 page = target.first_page(a.cache, split, warp);
  if (split < target.splits.count) {
    int base = first_base(target.splits, split, warp);
    u64 of_step = page;
#pragma unroll
    for (int i = 0; i < PREFETCH; ++i, base += ATTEND_WARPS * STEP) {
      if (base >= range_of(target.splits, split, target.position).high) break;
      if (i) of_step = a.cache.page(target.slot, base);
      prefetch(a.cache, of_step, target.kv_head, base);
    }
  }
  BEGIN(args);
  u32* const arrived = a.arrived + blockIdx.z * gridDim.x + blockIdx.x;
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
    attend_split(a, target, one, shared, arrived, threadIdx.x, read, sync_block);
  }
}
HOST_ENTRY(attend, AttendArgs)
