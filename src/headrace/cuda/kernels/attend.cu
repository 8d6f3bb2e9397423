// Grouped-query attention of each row over its slot's cache, split over the positions: a block has one row, the query
// heads of one tile, and one split (attend.cuh).
//
// Macros: those of attend.cuh; PREFETCH.
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
  const u64 page = target.first_page(a.cache, split, warp);
  if (PREFETCH && split < target.splits.count) {
    const int base = first_base(target.splits, split, warp);
    if (base <= target.position) prefetch(a.cache, page, target.kv_head, base);
  }
  BEGIN(args);
  if (split >= target.splits.count) return;
  u32* const arrived = a.arrived + blockIdx.z * gridDim.x + blockIdx.x;
  attend_splits(a, target, split, gridDim.y, page, shared, arrived, threadIdx.x, sync_block);
}
HOST_ENTRY(attend, AttendArgs)
