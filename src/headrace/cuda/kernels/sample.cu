// The next token of each row from its logits, and the next step's inputs: sampling.py on the device.
//
//     bias -> repetition penalty -> presence and frequency penalties -> top_k -> top_p -> min_p -> draw
//
// Phase 1, BLOCKS blocks a row: penalties into `shaped`, and the largest value of every sub-block of SUB
// ids. Phase 2, the block of a row that ends last: what the truncations keep is always the first so many
// in the order (larger logit, then lower id), so each truncation is one threshold on a 64-bit key of both,
// found digit by digit in a histogram (of counts for top_k, of probability for top_p). Only sub-blocks
// whose largest value reaches the k-th largest of all of these are looked at.
//
// Probabilities are fixed-point, so sums have no order: the same seed gives the same token always. The
// generator and its use are those of sampling.py (Philox4x32-10; Salmon et al. 2011).
//
// Macros: VOCABULARY; SUB (a multiple of 32, VOCABULARY / SUB at most 4,096); BLOCKS (a row); WARPS.
#include "selection.cuh"

constexpr int MAX_BIAS = 1024, RECORD = 1 + 2 * MAX_LOGPROBS;

struct Request {  // of one row; arguments.py has its twin
  float temperature, top_p, log_min_p, repetition, presence, frequency;
  int top_k, repeat_last_n;
  int n_prompt, length;  // tokens of the prompt, and of prompt and answer so far
  int n_bias, n_logprobs;  // n_logprobs −1: none wanted
  u32 seed[2];
  u32 step;  // tokens this row has made, as the host counts them
  u32 unused;
};

static_assert(sizeof(Request) == 64);

DEVICE Request read(const Request* p) {
  union { uint4 words[4]; Request request; } r;
#pragma unroll
  for (int i = 0; i < 4; ++i) r.words[i] = load_fresh((const uint4*)p + i);
  return r.request;
}

struct SampleArgs {
  const float* logits;   // [rows, VOCABULARY]
  float* shaped;         // [rows, VOCABULARY]: after penalties, where a request has any
  u32* peaks;            // [rows, 2, SUBS]: largest key of each sub-block of the logits, and of the shaped ones
  float2* sums;          // [rows, BLOCKS]: (maximum, Σ exp) of a block's logits
  u32* arrived;          // [rows], zero between launches
  Request* requests;     // [rows]
  int* history;          // [rows, capacity]: the tokens so far, of rows with penalties
  const int* bias_ids;   // [rows, MAX_BIAS]
  const float* bias;     // [rows, MAX_BIAS]
  int *tokens, *positions;  // [rows] of the next step; null: there is none
  u64* ring;             // host memory, [ring_size, rows]: step + 1 in the upper half, the id in the lower
  u32* reports;          // host memory, [ring_size, rows, RECORD]: log-probability, then (id, log-probability) pairs
  int capacity, ring_size;
  STAMPS
};

DEVICE void philox(u32 (&c)[4], u32 k0, u32 k1) {
  for (int round = 0; round < 10; ++round) {
    const u64 a = (u64)0xD2511F53u * c[0], b = (u64)0xCD9E8D57u * c[2];
    const u32 next[4] = {(u32)(b >> 32) ^ c[1] ^ k0, (u32)b, (u32)(a >> 32) ^ c[3] ^ k1, (u32)a};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}
DEVICE double uniform(const Request& q) {
  u32 c[4] = {(u32)(q.length - q.n_prompt), 0, 0, 0};
  philox(c, q.seed[0], q.seed[1]);
  return ((double)(c[0] >> 5) * 67108864.0 + (double)(c[1] >> 6)) * (1.0 / 9007199254740992.0);
}

// The first id, ascending, at which the running probability of the kept ones exceeds u of their total.
DEVICE int draw(const Candidates& c, u64 least, float largest, const Request& q, Shared& s) {
  const int lane = threadIdx.x & 31;
  auto weigh = [&](float v, int id) { return full_key(v, id) >= least ? fixed(expf((v - largest) / q.temperature)) : 0; };
  for (int i = threadIdx.x >> 5; i < c.n; i += WARPS) {
    u64 sum = 0;
#pragma unroll
    for (int j = 0; j < LANE_VALUES; ++j) {
      const int id = c.list[i] * SUB + j * 32 + lane;
      if (id < VOCABULARY) sum += weigh(load_fresh(c.values + id), id);
    }
    sum = warp_total(sum);
    if (lane == 0) s.masses[i] = sum;
  }
  sync_block();
  constexpr int EACH = (SUBS + THREADS - 1) / THREADS;
  const int first = threadIdx.x * EACH;
  u64 mine = 0, total;
  for (int i = first; i < min(first + EACH, c.n); ++i) mine += s.masses[i];
  u64 before = block_scan(mine, s.scratch, total);
  const u64 target = (u64)(uniform(q) * (double)total);
  u64* const found = s.scratch + 2 * WARPS;
  if (before <= target && target < before + mine)
    for (int i = first; i < min(first + EACH, c.n); ++i) {
      if (target < before + s.masses[i]) {
        found[0] = i;
        found[1] = before;
        break;
      }
      before += s.masses[i];
    }
  sync_block();
  if (threadIdx.x < 32) {
    u64 running = found[1];
    int chosen = -1;
    for (int j = 0; j < LANE_VALUES; ++j) {
      const int id = c.list[found[0]] * SUB + j * 32 + lane;
      u64 sum = id < VOCABULARY ? weigh(load_fresh(c.values + id), id) : 0;
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const u64 left = shuffle(sum, lane - step);
        if (lane >= step) sum += left;
      }
      const bool reaches = running + sum > target;
      const u64 lowest = ~warp_max(reaches ? ~(u64)id : (u64)0);
      if (chosen < 0 && ~lowest) chosen = (int)lowest;
      running += shuffle(sum, 31);
    }
    if (lane == 0) found[2] = (u64)chosen;
  }
  sync_block();
  return (int)found[2];
}

// The token of a row, or −1 when its largest logit is not finite.
DEVICE int choose(const float* values, const u32* peaks, const Request& q, Shared& s) {
  u64 best = 0;
  for (int i = threadIdx.x; i < SUBS; i += THREADS) {
    const u64 key = (u64)load_fresh(peaks + i) << 32 | (u32)~i;
    best = key > best ? key : best;
  }
  best = block_largest(best, s.scratch);
  const u32 peak = (u32)(best >> 32);
  if (peak >= ordered(INFINITY) || peak <= ordered(-INFINITY)) return -1;
  const float largest = unordered(peak);
  if (q.temperature == 0.f) {  // the lowest id of the largest value, in the first sub-block that has it
    const int start = (int)~(u32)best * SUB;
    u64 lowest = 0;
    for (int j = threadIdx.x; j < SUB; j += THREADS)
      if (start + j < VOCABULARY && ordered(load_fresh(values + start + j)) == peak) lowest = (u32)~(start + j);
    return (int)~(u32)block_largest(lowest, s.scratch);
  }
  const Candidates c = candidates(values, peaks, q.top_k, s);
  auto each = [&](auto f) { c.each([&](float v, int id, int) { f(full_key(v, id)); }); };
  u64 least = 0;
  if (q.top_k > 0 && q.top_k < VOCABULARY) least = select(each, [](u64) { return (u64)1; }, q.top_k, s);
  if (q.top_p < 1.f) {
    auto weigh = [&](u64 key) { return key >= least ? fixed(expf(unordered((u32)(key >> 32)) - largest)) : 0; };
    auto weigh_value = [&](u64 key) { return weigh(key | 0xffffffffu); };  // of equal values all weigh the same
    u64 mine = 0;
    each([&](u64 key) { mine += weigh(key); });
    const u64 total = block_total(mine, s.scratch);
    auto kept = [&](auto f) { each([&](u64 key) { if (key >= least) f(key); }); };
    const double wanted = (double)q.top_p * (double)total;
    u64 target = (u64)wanted;
    target += (double)target < wanted;
    target = target < 1 ? 1 : target > total ? total : target;
    const u64 nucleus = select(kept, weigh_value, target, s);
    least = nucleus > least ? nucleus : least;
  }
  const u64 floor = (u64)ordered(largest + q.log_min_p) << 32;
  least = floor > least ? floor : least;
  return draw(c, least, largest, q, s);
}

// The log-probabilities of the token and of the n likeliest, by the model's own logits.
DEVICE void report(const float* logits, const u32* peaks, const float2* sums, int token, int n, u32* out, Shared& s) {
  float largest = -INFINITY, total = 0.f;
  for (int b = 0; b < BLOCKS; ++b) largest = fmaxf(largest, load_fresh(sums + b).x);
  for (int b = 0; b < BLOCKS; ++b) {
    const float2 part = load_fresh(sums + b);
    total = fmaf(part.y, expf(part.x - largest), total);
  }
  const float log_total = largest + logf(total);
  if (threadIdx.x == 0) out[0] = float_to_bits(load_fresh(logits + token) - log_total);
  if (n == 0) return;
  const Candidates c = candidates(logits, peaks, n, s);
  auto each = [&](auto f) { c.each([&](float v, int id, int) { f(full_key(v, id)); }); };
  const u64 least = select(each, [](u64) { return (u64)1; }, n, s);
  if (threadIdx.x == 0) s.low[0] = 0;
  sync_block();
  each([&](u64 key) {
    if (key >= least) s.best[atomic_add(s.low, 1)] = key;
  });
  sync_block();
  for (int i = threadIdx.x; i < n; i += THREADS) {
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += s.best[j] > s.best[i];
    out[1 + 2 * rank] = ~(u32)s.best[i];
    out[2 + 2 * rank] = float_to_bits(unordered((u32)(s.best[i] >> 32)) - log_total);
  }
}

// What penalties need to know of the ids first … first + CHUNK − 1.
DEVICE void read_history(const SampleArgs& a, const Request& q, int row, int first, Shared& s) {
  for (int i = threadIdx.x; i < CHUNK; i += THREADS) s.counts[i] = 0, s.bias[i] = 0.f;
  sync_block();
  const bool repeats = q.repetition != 1.f, counts = q.presence != 0.f || q.frequency != 0.f;
  const int recent = q.repeat_last_n < 0 ? 0 : max(0, q.length - q.repeat_last_n);
  const int start = min(repeats ? recent : q.length, counts ? q.n_prompt : q.length);
  for (int i = start + threadIdx.x; i < q.length; i += THREADS) {
    const int at = load_fresh(a.history + (u64)row * a.capacity + i) - first;
    if (at < 0 || at >= CHUNK) continue;
    if (repeats && i >= recent) atomic_or(s.counts + at, 0x80000000u);
    if (counts && i >= q.n_prompt) atomic_add(s.counts + at, 1);
  }
  for (int i = threadIdx.x; i < q.n_bias; i += THREADS) {
    const int at = a.bias_ids[row * MAX_BIAS + i] - first;
    if (at >= 0 && at < CHUNK) s.bias[at] = a.bias[row * MAX_BIAS + i];
  }
  sync_block();
}

DEVICE float penalised(float v, const Request& q, u32 counted, float bias) {
  v += bias;
  if (counted >> 31) v = v > 0.f ? v / q.repetition : v * q.repetition;
  const u32 times = counted & 0x7fffffffu;
  return times ? v - (q.presence + (float)times * q.frequency) : v;
}

KERNEL(WARPS * 32, 1) sample(ARGS(SampleArgs, a)) {
  DYNAMIC_SHARED(shared);
  Shared s(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.y, rows = gridDim.y;
  dependents_launch();
  BEGIN(a);
  const Request q = read(a.requests + row);
  const bool shapes = q.n_bias || q.repetition != 1.f || q.presence != 0.f || q.frequency != 0.f;
  const float* const logits = a.logits + (u64)row * VOCABULARY;
  float* const shaped = a.shaped + (u64)row * VOCABULARY;
  u32* const peaks = a.peaks + (u64)row * 2 * SUBS;
  const int first_sub = blockIdx.x * CHUNK_SUBS;
  if (shapes) read_history(a, q, row, first_sub * SUB, s);
  float largest = -INFINITY, sum = 0.f;
  for (int sub = first_sub + warp; sub < min(first_sub + CHUNK_SUBS, SUBS); sub += WARPS) {
    u32 peak[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < LANE_VALUES; ++j) {
      const int id = sub * SUB + j * 32 + lane, at = id - first_sub * SUB;
      if (id >= VOCABULARY) continue;
      const float v = load_fresh(logits + id);
      peak[0] = max(peak[0], ordered(v));
      if (shapes) {
        const float w = penalised(v, q, s.counts[at], s.bias[at]);
        shaped[id] = w;
        peak[1] = max(peak[1], ordered(w));
      }
      if (q.n_logprobs >= 0) {
        const float now = fmaxf(largest, v);
        sum = sum * expf(largest - now) + expf(v - now);
        largest = now;
      }
    }
    peak[0] = warp_max(peak[0]);
    if (lane == 0) peaks[sub] = peak[0];
    if (shapes) {
      peak[1] = warp_max(peak[1]);
      if (lane == 0) peaks[SUBS + sub] = peak[1];
    }
  }
  if (q.n_logprobs >= 0) {
    float* const scratch = (float*)s.scratch;
    const float all = unordered((u32)block_largest((u64)ordered(largest), s.scratch));
    sum = block_sum<WARPS>(largest == -INFINITY ? 0.f : sum * expf(largest - all), scratch);
    if (threadIdx.x == 0) a.sums[row * BLOCKS + blockIdx.x] = make_float2(all, sum);
  }
  sync_block();
  u64* const is_last = s.scratch + 2 * WARPS;
  if (threadIdx.x == 0) *is_last = atomic_add_ordered(a.arrived + row, 1) == gridDim.x - 1;
  sync_block();
  if (!*is_last) return;
  sync_block();
  const int id = shapes ? choose(shaped, peaks + SUBS, q, s) : choose(logits, peaks, q, s);
  const u64 cell = (u64)(q.step % a.ring_size) * rows + row;
  if (q.n_logprobs >= 0 && id >= 0) {  // the host reads it once it has seen the id
    report(logits, peaks, a.sums + row * BLOCKS, id, q.n_logprobs, a.reports + cell * RECORD, s);
    fence_system();
  }
  sync_block();
  if (threadIdx.x) return;
  a.arrived[row] = 0;
  if (a.history && q.length < a.capacity) a.history[(u64)row * a.capacity + q.length] = id;
  a.requests[row].length = q.length + 1;
  a.requests[row].step = q.step + 1;
  if (a.tokens) {
    a.tokens[row] = max(id, 0);
    a.positions[row] += 1;
  }
  store_system(a.ring + cell, (u64)(q.step + 1) << 32 | (u32)id);
}
HOST_ENTRY(sample, SampleArgs)
