// primitives.cuh for a CPU: every thread of a block is a fibre, blocks run one after another.
//
// What a GPU leaves undefined is made loud here. Shared memory starts as NaN; the target of an
// asynchronous copy is NaN (and, under AddressSanitizer, unreadable) until the copy completes, which
// happens at a random later time; fibres run in an order drawn from a seed, so that a missing barrier
// shows as a wrong result; a barrier that cannot be passed is reported as a deadlock.
#pragma once
#include "host_fibres.hpp"

DEVICE void sync_block() {
  host::Block& k = *host::block;
  const u32 g = k.generation;
  if (++k.arrived == k.alive) {
    k.arrived = 0;
    k.generation = g + 1;
  } else {
    host::wait_change(&k.generation, g);
  }
}
// `threads` of the block meet at barrier `id`, 1 to 15.
DEVICE void sync_threads(int id, u32 threads) {
  host::Block& k = *host::block;
  const u32 g = k.group_generations[id];
  if (++k.group_arrived[id] == threads) {
    k.group_arrived[id] = 0;
    k.group_generations[id] = g + 1;
  } else {
    host::wait_change(&k.group_generations[id], g);
  }
}
DEVICE void sync_warp() { host::meet({}); }
template <class T> DEVICE T shuffle(T v, int lane) {
  static_assert(sizeof(T) <= sizeof(host::Slot));
  host::Slot s{};
  memcpy(&s, &v, sizeof v);
  memcpy(&v, &host::meet(s)[lane & 31], sizeof v);
  return v;
}
template <class T> DEVICE T shuffle_xor(T v, int mask) { return shuffle(v, (int)(threadIdx.x & 31) ^ mask); }
DEVICE int lane_now() { return threadIdx.x & 31; }
DEVICE int kept(int v) { return v; }
DEVICE bool any_lane(bool p) {
  int any = p;
  for (int step = 16; step; step >>= 1) any |= shuffle_xor(any, step);
  return any;
}

DEVICE int dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
  return c;
}
DEVICE int dp4a(u32 a, int b, int c) {  // bytes of a are unsigned
  for (int i = 0; i < 4; ++i) c += (int)(uint8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
  return c;
}
DEVICE float half_to_float(u16 h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
DEVICE u16 float_to_half(float f) { _Float16 h = (_Float16)f; u16 u; memcpy(&u, &h, 2); return u; }
DEVICE float bits_to_float(u32 u) { float f; memcpy(&f, &u, 4); return f; }
DEVICE u32 float_to_bits(float f) { u32 u; memcpy(&u, &f, 4); return u; }
DEVICE float exp2_near(float x) { return exp2f(x); }
DEVICE float rsqrtf(float x) { return 1.f / sqrtf(x); }
DEVICE int __float2int_rn(float x) { return (int)nearbyintf(x); }
DEVICE void sincos_turns(float turns, float* s, float* c) {
  *s = (float)sin(2 * M_PI * turns);
  *c = (float)cos(2 * M_PI * turns);
}
DEVICE float divide_near(float x, float y) { return x / y; }
DEVICE u32 pack_halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
  auto one = [&](int shift) {
    auto half = [&](u32 word) { return (double)half_to_float((u16)(word >> shift)); };
    const _Float16 sum = (_Float16)(half(a) * half(b) + half(c));  // exact in double, so rounded once
    u16 bits;
    memcpy(&bits, &sum, 2);
    return (u32)bits << shift;
  };
  return one(0) | one(16);
}
DEVICE u32 subtract_halves(u32 a, u32 b) {
  return pack_halves(half_to_float((u16)a) - half_to_float((u16)b), half_to_float((u16)(a >> 16)) - half_to_float((u16)(b >> 16)));
}
DEVICE u32 multiply_halves(u32 a, u32 b) {
  return pack_halves(half_to_float((u16)a) * half_to_float((u16)b), half_to_float((u16)(a >> 16)) * half_to_float((u16)(b >> 16)));
}
template <class T> DEVICE T load_fresh(const T* p) { return *p; }
DEVICE void prefetch_l2(const void* p, u32 bytes) {  // AddressSanitizer sees it
  (void)*(const volatile u8*)p, (void)((const volatile u8*)p)[bytes - 1];
}
DEVICE void fence_device() {}
DEVICE void fence_system() {}
DEVICE u32 atomic_add(u32* p, u32 v) { const u32 old = *p; *p += v; return old; }
DEVICE u32 atomic_add_ordered(u32* p, u32 v) { return atomic_add(p, v); }
DEVICE void add_release(u32* p, u32 v) { *p += v; }
DEVICE void wait_at_least(const u32* p, u32 count) {
  while ((int)(*p - count) < 0) host::wait_change(p, *p);
}
DEVICE void atomic_or(u32* p, u32 v) { *p |= v; }
DEVICE void atomic_max(u64* p, u64 v) { *p = max(*p, v); }
DEVICE u64 global_time() { return (u64)std::chrono::steady_clock::now().time_since_epoch().count(); }
DEVICE void store_system(u64* p, u64 v) { *(volatile u64*)p = v; }
// What the kernel before writes may come as late as here: tests have it copied then (host.py's `late`).
DEVICE void dependency_wait() {
  for (; host::n_late > 0; --host::n_late) {
    const host::Late& one = host::late[host::n_late - 1];
    memcpy(one.to, one.from, one.bytes);
  }
}
DEVICE void dependents_launch() {}

DEVICE void mma_f16(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
  const host::Slot* lanes = host::meet({{a.x, a.y, a.z, a.w, b0, b1}});
  auto half = [](u32 word, int i) { return half_to_float((u16)(word >> (16 * i))); };
  const int lane = threadIdx.x & 31;
  for (int i = 0; i < 4; ++i) {
    const int row = i >> 1, column = (lane & 3) * 2 + (i & 1);  // row: 0 upper, 1 lower eight
    for (int k = 0; k < 16; ++k) {
      const int quad = (k & 7) >> 1, upper = k >> 3;
      d[i] += half(lanes[(lane & ~3) + quad].word[row + 2 * upper], k & 1) *
              half(lanes[column * 4 + quad].word[4 + upper], k & 1);
    }
  }
}

DEVICE float brain_at(u32 word, int i) { return bits_to_float(i ? word & 0xffff0000u : word << 16); }
DEVICE u32 pack_brain2(float low, float high) {
  auto round = [](float f) {
    const u32 bits = float_to_bits(f);
    return f != f ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
DEVICE u32 brain2_max(u32 a, u32 b) {
  return pack_brain2(fmaxf(brain_at(a, 0), brain_at(b, 0)), fmaxf(brain_at(a, 1), brain_at(b, 1)));
}
DEVICE u32 brain2_mul(u32 a, u32 b) { return pack_brain2(brain_at(a, 0) * brain_at(b, 0), brain_at(a, 1) * brain_at(b, 1)); }
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) {
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 from = selector >> (4 * i) & 7;
    out |= ((from < 4 ? a : b) >> (8 * (from & 3)) & 255u) << (8 * i);
  }
  return out;
}
DEVICE void mma_brain(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const host::Slot* lanes = host::meet({{a[0], a[1], a[2], a[3], b0, b1}});
  const int lane = threadIdx.x & 31;
  for (int i = 0; i < 4; ++i) {
    const int row = i >> 1, column = (lane & 3) * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) {
      const int quad = (k & 7) >> 1, upper = k >> 3;
      d[i] += brain_at(lanes[(lane & ~3) + quad].word[row + 2 * upper], k & 1) *
              brain_at(lanes[column * 4 + quad].word[4 + upper], k & 1);
    }
  }
}

// As Hopper's: nothing is read or added before the wait, so what changes too early shows.
namespace host {
template <int N, bool BRAIN_KIND> void wgmma_late(float* d, const u32 (&rows)[4][4], const u8* b, bool accumulate) {
  auto value = [](u32 word, int i) { return BRAIN_KIND ? brain_at(word, i) : half_to_float((u16)(word >> (16 * i))); };
  if (!accumulate) memset(d, 0, N / 2 * sizeof(float));
  const u32 quad = threadIdx.x & 3;
  for (int t = 0; t < N / 8; ++t)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) {
        const uintptr_t at = (uintptr_t)b + (8 * t + 2 * quad + (i & 1)) * 128 + k / 8 * 16;
        u16 x;
        memcpy(&x, (const u8*)(at ^ (at >> 7 & 7) << 4) + k % 8 * 2, 2);
        d[4 * t + i] += value(rows[(k & 7) >> 1][(i >> 1) + 2 * (k >> 3)], k & 1) * value(x, 0);
      }
}
}  // namespace host
DEVICE u64 wgmma_descriptor(const void* b) { return (u64)b >> 4; }
namespace host {
template <int N, bool BRAIN_KIND> void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
  const Slot* lanes = meet({{a[0], a[1], a[2], a[3]}});
  Wgmma late{wgmma_late<N, BRAIN_KIND>, accumulate, d, {}, (const u8*)(b << 4)};
  for (u32 q = 0; q < 4; ++q) memcpy(late.rows[q], lanes[(threadIdx.x & 28) + q].word, 16);
  auto& groups = block->fibres[block->current].wgmmas;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(late);
}
}  // namespace host
template <int N> DEVICE void wgmma_brain(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool more = true) { host::wgmma<N, true>(d, a, b, more); }
template <int N> DEVICE void wgmma_half(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool more = true) { host::wgmma<N, false>(d, a, b, more); }
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {
  auto& groups = host::block->fibres[host::block->current].wgmmas;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int PENDING = 0> DEVICE void wgmma_wait() {
  auto& groups = host::block->fibres[host::block->current].wgmmas;
  while (groups.size() > PENDING + 1) {
    for (auto& w : groups.front()) w.run(w.d, w.rows, w.b, w.accumulate);
    groups.erase(groups.begin());
  }
  sync_warp();
}
DEVICE void fence_for_wgmma() {}
template <class T> DEVICE void pin(T&) {}

namespace host {
inline void poison(void* p, u32 bytes) {
  memset(p, 0xff, bytes);
  ASAN_POISON_MEMORY_REGION(p, bytes);
}
}  // namespace host
DEVICE void barrier_init(u64* barrier, u32 arrivals) {
  *(host::Barrier*)barrier = {0, (u8)arrivals, (u16)arrivals, 0};
}
DEVICE void barrier_init_fence() {}
DEVICE void fence_async() {}
DEVICE void barrier_arrive_expect(u64* barrier, u32 bytes) {
  host::Barrier* b = (host::Barrier*)barrier;
  b->bytes += (int32_t)bytes;
  --b->pending;
  host::barrier_check(b);
}
DEVICE void barrier_arrive(u64* barrier) {
  host::Barrier* b = (host::Barrier*)barrier;
  --b->pending;
  host::barrier_check(b);
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
  host::Barrier* b = (host::Barrier*)barrier;
  while (b->phase == parity) {
    u32 seen;
    memcpy(&seen, b, 4);
    host::wait_change((const volatile u32*)b, seen);
  }
}
DEVICE void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier) {
  if (((uintptr_t)target | (uintptr_t)source | bytes) & 15) {
    host::fault = "a bulk copy is not aligned to 16 bytes";
    return;
  }
  host::poison(target, bytes);
  host::block->copies.push_back({target, source, bytes, barrier});
}
DEVICE void copy_async16(void* target, const void* source, int bytes = 16) {
  host::poison(target, 16);
  auto& groups = host::block->fibres[host::block->current].groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({target, source, (u32)bytes});
}
DEVICE void copy_commit() {
  auto& groups = host::block->fibres[host::block->current].groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int PENDING> DEVICE void copy_wait() {
  auto& groups = host::block->fibres[host::block->current].groups;
  while (groups.size() > PENDING + 1) {
    for (auto& c : groups.front()) {
      ASAN_UNPOISON_MEMORY_REGION(c.target, 16);
      memcpy(c.target, c.source, c.bytes);
      memset((u8*)c.target + c.bytes, 0, 16 - c.bytes);
    }
    groups.erase(groups.begin());
  }
}
