// The largest of a row's values: sub-blocks of SUB ids with their peaks, and thresholds found digit by digit
// in a histogram. Macros: VOCABULARY, SUB, BLOCKS, WARPS (sample.cu).
#pragma once
#include "primitives.cuh"

constexpr int SUBS = (VOCABULARY + SUB - 1) / SUB, CHUNK_SUBS = (SUBS + BLOCKS - 1) / BLOCKS, CHUNK = CHUNK_SUBS * SUB;
constexpr int THREADS = WARPS * 32, LANE_VALUES = SUB / 32, BINS = 2048, MAX_LOGPROBS = 100;

constexpr int WORK_BYTES = (larger(larger(2 * BINS * 4 + SUBS * 4, SUBS * 8), CHUNK * 8) + 15) / 16 * 16;
constexpr int LIST_BYTES = (SUBS * 2 + 15) / 16 * 16, SCRATCH_BYTES = (2 * WARPS + 4) * 8;
constexpr int SHARED_BYTES = WORK_BYTES + LIST_BYTES + SCRATCH_BYTES + MAX_LOGPROBS * 8;

struct Shared {
  u32 *low, *high;  // [BINS]: a histogram of 64-bit sums
  u32* peaks;       // [SUBS]
  u64* masses;      // [SUBS], over the three above
  u32* counts;      // [CHUNK], likewise: occurrences of an id, the top bit: recent
  float* bias;      // [CHUNK]
  u16* list;        // [SUBS]: sub-blocks to look at, ascending
  u64* scratch;     // [2 WARPS + 4]
  u64* best;        // [MAX_LOGPROBS]
  DEVICE explicit Shared(u8* memory)
      : low((u32*)memory), high(low + BINS), peaks(high + BINS), masses((u64*)memory), counts((u32*)memory),
        bias((float*)memory + CHUNK), list((u16*)(memory + WORK_BYTES)), scratch((u64*)(memory + WORK_BYTES + LIST_BYTES)),
        best(scratch + 2 * WARPS + 4) {}
};

// Orders as the floats do; NaN above all, so that it is noticed.
DEVICE u32 ordered(float v) {
  const u32 bits = float_to_bits(v);
  return v != v ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float unordered(u32 key) { return bits_to_float(key >> 31 ? key & 0x7fffffffu : ~key); }
DEVICE u64 full_key(float v, int id) { return (u64)ordered(v) << 32 | (u32)~id; }

DEVICE u64 fixed(float probability) { return (u64)(probability * 1099511627776.f); }  // 2^40; all of them fit in 2^58

template <class T> DEVICE T warp_max(T v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) {
    const T other = shuffle_xor(v, step);
    v = other > v ? other : v;
  }
  return v;
}
DEVICE u64 warp_total(u64 v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v += shuffle_xor(v, step);
  return v;
}
// The sum of v over the threads before this one; `total` of all. The block calls it together.
DEVICE u64 block_scan(u64 v, u64* scratch, u64& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u64 sum = v;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const u64 before = shuffle(sum, lane - step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) scratch[warp] = sum;
  sync_block();
  u64 base = 0, all = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w == warp) base = all;
    all += scratch[w];
  }
  total = all;
  sync_block();
  return base + sum - v;
}
DEVICE u64 block_total(u64 v, u64* scratch) {
  u64 total;
  block_scan(v, scratch, total);
  return total;
}
DEVICE u64 block_largest(u64 v, u64* scratch) {
  v = warp_max(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  sync_block();
  for (int w = 0; w < WARPS; ++w) v = scratch[w] > v ? scratch[w] : v;
  sync_block();
  return v;
}

// The values of one row that are worth a look: sub-blocks list[0 … n).
struct Candidates {
  const float* values;
  const u16* list;
  int n;
  // f(value, id, place in the list), a warp a sub-block, its lanes side by side.
  template <class F> DEVICE void each(F f) const {
    for (int i = threadIdx.x >> 5; i < n; i += WARPS)
#pragma unroll
      for (int j = 0; j < LANE_VALUES; ++j) {
        const int id = list[i] * SUB + j * 32 + (threadIdx.x & 31);
        if (id < VOCABULARY) f(load_fresh(values + id), id, i);
      }
  }
};

// The least key among the fewest largest ones that together weigh at least `target`. `each` calls
// its argument with every key; weigh(key) depends on the key's upper half alone. The whole of them must weigh `target`.
template <class Each, class Weigh> DEVICE u64 select(const Each& each, const Weigh& weigh, u64 target, Shared& s) {
  u64 threshold = 0;
  int shift = 64;
  for (int digit = 0; digit < 6; ++digit) {
    const int width = digit % 3 == 2 ? 10 : 11, above_shift = shift;
    shift -= width;
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.low[i] = s.high[i] = 0;
    sync_block();
    each([&](u64 key) {
      if (digit && key >> above_shift != threshold >> above_shift) return;
      const u64 w = weigh(key);
      const u32 bin = (u32)(key >> shift) & ((1u << width) - 1), low = (u32)w;
      const u32 old = atomic_add(s.low + bin, low), up = (u32)(w >> 32) + (old + low < old);
      if (up) atomic_add(s.high + bin, up);
    });
    sync_block();
    // Thread t has the bins below those of thread t − 1: largest first.
    constexpr int EACH = BINS / THREADS;
    const int top = BINS - 1 - (int)threadIdx.x * EACH;
    u64 mine = 0, total;
#pragma unroll
    for (int i = 0; i < EACH; ++i) mine += (u64)s.high[top - i] << 32 | s.low[top - i];
    u64 above = block_scan(mine, s.scratch, total);
    u64* const found = s.scratch + 2 * WARPS;
    if (above < target && target <= above + mine)
      for (int i = 0; i < EACH; ++i) {
        const u64 bin = (u64)s.high[top - i] << 32 | s.low[top - i];
        if (target <= above + bin) {
          found[0] = top - i;
          found[1] = above;
          found[2] = bin;
          break;
        }
        above += bin;
      }
    sync_block();
    threshold |= found[0] << shift;
    target -= found[1];
    const u64 bin = found[2];
    if (digit == 2) {  // the value is known: whole ones of its weight
      const u64 w = weigh(threshold);
      target = (target + w - 1) / w * w;
    }
    sync_block();
    if (target == bin) break;
  }
  return threshold;
}

// Sub-blocks whose peak reaches the k-th largest peak (all of them for k = 0): they hold the k largest values.
DEVICE Candidates candidates(const float* values, const u32* peaks, int k, Shared& s) {
  for (int i = threadIdx.x; i < SUBS; i += THREADS) s.peaks[i] = load_fresh(peaks + i);
  sync_block();
  u64 least = 0;
  if (k > 0 && k < SUBS) {
    auto each = [&](auto f) {
      for (int i = threadIdx.x; i < SUBS; i += THREADS) f((u64)s.peaks[i] << 32);
    };
    least = select(each, [](u64) { return (u64)1; }, k, s);
  }
  constexpr int EACH = (SUBS + THREADS - 1) / THREADS;
  const int first = threadIdx.x * EACH;
  u64 mine = 0, total;
  for (int i = first; i < min(first + EACH, SUBS); ++i) mine += s.peaks[i] >= least >> 32;
  u64 at = block_scan(mine, s.scratch, total);
  for (int i = first; i < min(first + EACH, SUBS); ++i)
    if (s.peaks[i] >= least >> 32) s.list[at++] = (u16)i;
  sync_block();
  return {values, s.list, (int)total};
}
