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
  Range range = range_of(target.splits, min(first_split, last), position);
  int base = first_base(range, warp);
  auto page_of = [&](int at) { return (u32)a.cache.page(target.slot, min(at, range.high - 1)); };
  u32 page = page_of(base), next_page = page_of(base + STRIDE);
  // What an earlier step wrote is asked for before the previous kernel has ended. Of several rows one may read another's.
  const bool any = first_split <= last && base < range.high, older = any && base + STEP <= position && gridDim.z == 1;
  Held held;
  if (older && Held::IS) held.load(a.cache, page, target.kv_head, base);
  else if (any) prefetch(a.cache, page, target.kv_head, base);
  BEGIN(args);
  float4 query = Held::IS ? query_of(a, target, warp) : float4{};
  if (any && !older) held.load(a.cache, page, target.kv_head, base);
#pragma unroll 1
  for (int split = first_split; split <= last; split += gridDim.y) {
    if (split != first_split) {
      range = range_of(target.splits, split, position);
      base = first_base(range, warp);
      page = page_of(base), next_page = page_of(base + STRIDE);
      if (Held::IS) query = query_of(a, target, warp);
      if (base < range.high) held.load(a.cache, page, target.kv_head, base);
    }
    auto read = [&](Warp& w, const uint4* q) {
#pragma unroll 1
      for (; base < range.high; base += STRIDE) {
        w.step(q, InMemory{a.cache, held, page, next_page, target.kv_head, base, base + STRIDE, range.high}, base, range.low, range.high);
        page = next_page, next_page = page_of(base + 2 * STRIDE);
      }
    };
    Target now = target;  // registers are few: what follows from these is worked out here, not before the loop
    now.splits.count = kept(now.splits.count);
    if (Held::IS) now.row = kept(now.row), now.first_head = kept(now.first_head), now.heads = kept(now.heads);
    u32* const arrived = a.arrived + kept(blockIdx.z) * gridDim.x + blockIdx.x;
    auto query_at = [&](int i) { return Held::IS && i == warp ? query : query_of(a, now, i); };
    attend_split(a, now, query_at, split, shared, arrived, threadIdx.x, read, sync_block);
  }
}
HOST_ENTRY(attend, AttendArgs)
