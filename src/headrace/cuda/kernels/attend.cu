// Grouped-query attention of each row over its slot's cache, split over the positions: a block has one row, the query
// heads of one tile, and one split (attend.cuh).
//
// Macros: those of attend.cuh.
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
  const int first_split = blockIdx.y, warp = threadIdx.x >> 5;
  u64 page = target.first_page(a.cache, first_split, warp);
  if (first_split < target.splits.count) {
    const int base = first_base(target.splits, first_split, warp);
    if (base <= target.position) prefetch(a.cache, page, target.kv_head, base);
  }
  BEGIN(args);
  u32* const arrived = a.arrived + blockIdx.z * gridDim.x + blockIdx.x;
  for (int split = first_split; split < target.splits.count; split += gridDim.y) {
    auto read = [&](Warp& w, const uint4* q) {
      const Range range = range_of(target.splits, split, target.position);
      int base = first_base(target.splits, split, warp);
      if (split != first_split && base < range.high) page = a.cache.page(target.slot, base);
      for (; base < range.high; base += ATTEND_WARPS * STEP) {
        w.step(q, InMemory{a.cache, page, target.kv_head, base}, base, range.low, range.high);
        if (base + ATTEND_WARPS * STEP < range.high) page = a.cache.page(target.slot, base + ATTEND_WARPS * STEP);
      }
    };
    attend_split(a, target, split, shared, arrived, threadIdx.x, read, sync_block);
  }
}
HOST_ENTRY(attend, AttendArgs)
