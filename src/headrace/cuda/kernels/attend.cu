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
  const int first_split = blockIdx.y, warp = threadIdx.x >> 5, position = target.position, last = target.splits.count - 1;
  constexpr int STRIDE = ATTEND_WARPS * STEP;
  auto page_of = [&](int at) { return a.cache.page(target.slot, min(at, position)); };
  int base = first_base(target.splits, min(first_split, last), warp);
  u64 page = page_of(base), next_page = page_of(base + STRIDE);
  // What an earlier step wrote is asked for before the previous kernel has ended. Of several rows one may read another's.
  const bool older = base + STEP <= position && gridDim.z == 1;
  Keys keys;
  if (first_split <= last && base <= position) prefetch(a.cache, page, target.kv_head, base);
  if (older) keys.load(a.cache, page, target.kv_head, base);
  BEGIN(args);
  if (!older && base <= position) keys.load(a.cache, page, target.kv_head, base);
  u32* const arrived = a.arrived + blockIdx.z * gridDim.x + blockIdx.x;
  for (int split = first_split; split <= last; split += gridDim.y) {
    const Range range = range_of(target.splits, split, position);
    if (split != first_split) {
      base = first_base(target.splits, split, warp);
      page = page_of(base), next_page = page_of(base + STRIDE);
      if (base < range.high) keys.load(a.cache, page, target.kv_head, base);
    }
    auto read = [&](Warp& w, const uint4* q) {
      for (; base < range.high; base += STRIDE) {
        w.step(q, InMemory{a.cache, keys, page, next_page, target.kv_head, base, base + STRIDE, range.high}, base, range.low, range.high);
        page = next_page, next_page = page_of(base + 2 * STRIDE);
      }
    };
    attend_split(a, target, split, shared, arrived, threadIdx.x, read, sync_block);
  }
}
HOST_ENTRY(attend, AttendArgs)
