// primitives.cuh for a CPU: every thread of a block is a fibre, blocks run one after another.
//
// What a GPU leaves undefined is made loud here. Shared memory starts as NaN; the target of an
// asynchronous copy is NaN (and, under AddressSanitizer, unreadable) until the copy completes, which
// happens at a random later time; fibres run in an order drawn from a seed, so that a missing barrier
// shows as a wrong result; a barrier that cannot be passed is reported as a deadlock.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n)
#define ASAN_UNPOISON_MEMORY_REGION(p, n)
#endif

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;
using std::max;
using std::min;

#define DEVICE inline
#define KERNEL(threads, blocks_per_sm) static void
#define ARGS(type, name) const type& name
#define DYNAMIC_SHARED(name) u8* const name = host::block.shared
#define __align__(n) alignas(n)
#define __restrict__

struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Index3 { u32 x = 0, y = 0, z = 0; };
static Index3 threadIdx, blockIdx, blockDim, gridDim;

// void host_switch(void** save, void* load): leaves one stack for another.
#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void host_switch(void** save, void* load);
asm(R"(
.text
.hidden host_switch
.globl host_switch
.type host_switch,@function
host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size host_switch, .-host_switch
)");
namespace host {
inline void* first_stack_pointer(u8* top, void (*entry)()) {
  void** sp = (void**)((uintptr_t)top & ~(uintptr_t)15);
  *--sp = nullptr;
  *--sp = (void*)entry;
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
}  // namespace host
#elif defined(__aarch64__)
extern "C" __attribute__((visibility("hidden"))) void host_switch(void** save, void* load);
asm(R"(
.text
.hidden host_switch
.globl host_switch
.type host_switch,%function
host_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size host_switch, .-host_switch
)");
namespace host {
inline void* first_stack_pointer(u8* top, void (*entry)()) {
  void** sp = (void**)(((uintptr_t)top & ~(uintptr_t)15) - 160);
  std::fill(sp, sp + 20, nullptr);
  sp[11] = (void*)entry;  // x30, the return address
  return sp;
}
}  // namespace host
#else
#error "the host build knows how to switch stacks on x86-64 and AArch64 only"
#endif

namespace host {
constexpr size_t STACK = 64 << 10, SHARED = 256 << 10;

struct Wgmma {
  void (*run)(float*, const u32 (&)[4][4], const u8*);
  float* d;
  u32 rows[4][4];  // of A, of the quad's lanes
  const u8* b;
};
struct Fibre {
  void* sp;
  const volatile u32* waits_on;  // runnable once this word differs from `seen`
  u32 seen;
  bool done;
  struct Copy16 { void* target; const void* source; };
  std::vector<std::vector<Copy16>> groups;  // cp.async groups in flight, the open one last
  std::vector<Wgmma> wgmmas;                // not waited for
};
struct Slot { u32 word[6]; };
struct Warp {
  volatile u32 generation;
  u32 arrived;
  Slot slots[2][32];  // two, so that a fast lane cannot overwrite what a slow one still reads
};
struct BulkCopy { void* target; const void* source; u32 bytes; u64* barrier; };
struct Barrier {  // lives in the kernel's u64
  u8 phase, expected;
  u16 pending;
  int32_t bytes;
};
static_assert(sizeof(Barrier) == 8);

struct Block {
  alignas(1024) u8 shared[SHARED];
  std::unique_ptr<u8[]> stacks;  // not zeroed: most of it is never touched
  u32 stacks_made;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::vector<BulkCopy> copies;
  volatile u32 generation;
  u32 arrived, alive, current;
  void* scheduler_sp;
  u64 random_state;
  void (*body)(const void*);
  const void* args;
  const char* fault;
};
static Block block;

inline u32 random(u32 n) {
  block.random_state = block.random_state * 6364136223846793005ull + 1442695040888963407ull;
  return (u32)(block.random_state >> 33) % n;
}

inline void switch_stack(void** save, void* load, const void* bottom, size_t size, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, bottom, size);
  host_switch(save, load);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)bottom, (void)size, (void)last;
  host_switch(save, load);
#endif
}
static const void* scheduler_stack;
static size_t scheduler_stack_size;

inline void wait_change(const volatile u32* word, u32 seen) {
  Fibre& f = block.fibres[block.current];
  f.waits_on = word;
  f.seen = seen;
  switch_stack(&f.sp, block.scheduler_sp, scheduler_stack, scheduler_stack_size);
}

inline void fibre_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  block.body(block.args);
  Fibre& f = block.fibres[block.current];
  f.done = true;
  --block.alive;
  if (block.alive && block.arrived == block.alive) {  // a thread that has ended counts as arrived
    block.arrived = 0;
    ++block.generation;
  }
  switch_stack(&f.sp, block.scheduler_sp, scheduler_stack, scheduler_stack_size, true);
}

inline void barrier_check(Barrier* b) {
  if (b->pending == 0 && b->bytes == 0) {
    b->phase ^= 1;
    b->pending = b->expected;
  }
}
inline void complete(size_t i) {
  BulkCopy c = block.copies[i];
  block.copies.erase(block.copies.begin() + (long)i);
  ASAN_UNPOISON_MEMORY_REGION(c.target, c.bytes);
  memcpy(c.target, c.source, c.bytes);
  Barrier* b = (Barrier*)c.barrier;
  b->bytes -= (int32_t)c.bytes;
  barrier_check(b);
}

// Runs every fibre of one block to its end; false when something is wrong (see block.fault).
inline bool run_block(u32 threads) {
  Block& k = block;
  ASAN_UNPOISON_MEMORY_REGION(k.shared, SHARED);
  memset(k.shared, 0xff, SHARED);
  k.fibres.assign(threads, Fibre{});
  k.warps.assign((threads + 31) / 32, Warp{});
  k.copies.clear();
  k.generation = 0;
  k.arrived = 0;
  k.alive = threads;
  for (u32 t = 0; t < threads; ++t)
    k.fibres[t].sp = first_stack_pointer(k.stacks.get() + (t + 1) * STACK, fibre_entry);
  while (k.alive) {
    bool progressed = false;
    const u32 start = random(threads), stride = 2 * random(threads) + 1;
    const bool permutes = (threads & (threads - 1)) == 0;  // an odd stride visits all of 2^n
    for (u32 i = 0; i < threads; ++i) {
      const u32 t = (start + i * (permutes ? stride : 1)) % threads;
      Fibre& f = k.fibres[t];
      if (f.done || (f.waits_on && *f.waits_on == f.seen)) continue;
      f.waits_on = nullptr;
      k.current = t;
      threadIdx.x = t;
      switch_stack(&k.scheduler_sp, f.sp, k.stacks.get() + t * STACK, STACK);
      if (k.fault) return false;
      progressed = true;
    }
    for (size_t i = k.copies.size(); i-- > 0;)
      if (random(4) == 0 || (!progressed && i == 0)) {
        complete(i);
        progressed = true;
      }
    if (!progressed) {
      k.fault = "deadlock: every thread waits";
      return false;
    }
  }
  if (!k.copies.empty()) k.fault = "a block ended with copies in flight";
  return k.fault == nullptr;
}

// Meets the other 31 lanes; returns all lanes' words.
inline const Slot* meet(const Slot& mine) {
  Warp& w = block.warps[threadIdx.x >> 5];
  const u32 g = w.generation;
  Slot* slots = w.slots[g & 1];
  slots[threadIdx.x & 31] = mine;
  if (++w.arrived == 32) {
    w.arrived = 0;
    w.generation = g + 1;
  } else {
    wait_change(&w.generation, g);
  }
  return slots;
}

inline const char* launch(void (*body)(const void*), const void* args, u32 gx, u32 gy, u32 gz, u32 threads,
                          u32 shared_bytes, u64 seed) {
  if (threads % 32 || threads > 1024 || shared_bytes > SHARED) return "bad launch shape";
  block.body = body;
  block.args = args;
  block.random_state = seed;
  block.fault = nullptr;
  if (block.stacks_made < threads) {
    block.stacks.reset(new u8[size_t(threads) * STACK]);
    block.stacks_made = threads;
  }
  blockDim = {threads, 1, 1};
  gridDim = {gx, gy, gz};
  for (u32 z = 0; z < gz; ++z)
    for (u32 y = 0; y < gy; ++y)
      for (u32 x = 0; x < gx; ++x) {
        blockIdx = {x, y, z};
        if (!run_block(threads)) return block.fault;
      }
  return nullptr;
}
}  // namespace host

// The entry Python calls through ctypes: one struct of arguments, as on the device.
#define HOST_ENTRY(kernel, args)                                                                    \
  extern "C" size_t host_args_size() { return sizeof(args); }                                       \
  extern "C" int host_shared_bytes() { return SHARED_BYTES; }                                       \
  extern "C" const char* host_launch(const void* a, u32 gx, u32 gy, u32 gz, u32 threads,            \
                                     u32 shared_bytes, u64 seed) {                                  \
    if (shared_bytes < SHARED_BYTES) return "less shared memory than the kernel uses";              \
    return host::launch([](const void* p) { kernel(*(const args*)p); }, a, gx, gy, gz, threads,     \
                        shared_bytes, seed);                                                        \
  }

DEVICE void sync_block() {
  host::Block& k = host::block;
  const u32 g = k.generation;
  if (++k.arrived == k.alive) {
    k.arrived = 0;
    k.generation = g + 1;
  } else {
    host::wait_change(&k.generation, g);
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

DEVICE int dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
  return c;
}
DEVICE float half_to_float(u16 h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
DEVICE u16 float_to_half(float f) { _Float16 h = (_Float16)f; u16 u; memcpy(&u, &h, 2); return u; }
DEVICE float bits_to_float(u32 u) { float f; memcpy(&f, &u, 4); return f; }
DEVICE u32 float_to_bits(float f) { u32 u; memcpy(&u, &f, 4); return u; }
DEVICE float rsqrtf(float x) { return 1.f / sqrtf(x); }
DEVICE int __float2int_rn(float x) { return (int)nearbyintf(x); }
DEVICE void sincos_turns(float turns, float* s, float* c) {
  *s = (float)sin(2 * M_PI * turns);
  *c = (float)cos(2 * M_PI * turns);
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
template <class T> DEVICE T load_fresh(const T* p) { return *p; }
DEVICE void prefetch_l2(const void* p) { (void)*(const volatile u8*)p; }  // AddressSanitizer sees it
DEVICE void fence_device() {}
DEVICE void fence_system() {}
DEVICE u32 atomic_add(u32* p, u32 v) { const u32 old = *p; *p += v; return old; }
DEVICE void atomic_or(u32* p, u32 v) { *p |= v; }
DEVICE void atomic_max(u64* p, u64 v) { *p = max(*p, v); }
DEVICE u64 global_time() { return (u64)std::chrono::steady_clock::now().time_since_epoch().count(); }
DEVICE void store_release_system(u64* p, u64 v) { *(volatile u64*)p = v; }
DEVICE void dependency_wait() {}
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
template <int N> void wgmma_late(float* d, const u32 (&rows)[4][4], const u8* b) {
  const u32 quad = threadIdx.x & 3;
  for (int t = 0; t < N / 8; ++t)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) {
        const uintptr_t at = (uintptr_t)b + (8 * t + 2 * quad + (i & 1)) * 128 + k / 8 * 16;
        u16 x;
        memcpy(&x, (const u8*)(at ^ (at >> 7 & 7) << 4) + k % 8 * 2, 2);
        d[4 * t + i] += brain_at(rows[(k & 7) >> 1][(i >> 1) + 2 * (k >> 3)], k & 1) * bits_to_float((u32)x << 16);
      }
}
}  // namespace host
template <int N> DEVICE void wgmma_brain(float (&d)[N / 2], const u32 (&a)[4], const void* b) {
  const host::Slot* lanes = host::meet({{a[0], a[1], a[2], a[3]}});
  host::Wgmma late{host::wgmma_late<N>, d, {}, (const u8*)b};
  for (u32 q = 0; q < 4; ++q) memcpy(late.rows[q], lanes[(threadIdx.x & 28) + q].word, 16);
  host::block.fibres[host::block.current].wgmmas.push_back(late);
}
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
DEVICE void wgmma_wait() {
  auto& late = host::block.fibres[host::block.current].wgmmas;
  for (auto& w : late) w.run(w.d, w.rows, w.b);
  late.clear();
  sync_warp();
}
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
    host::block.fault = "a bulk copy is not aligned to 16 bytes";
    return;
  }
  host::poison(target, bytes);
  host::block.copies.push_back({target, source, bytes, barrier});
}
DEVICE void copy_async16(void* target, const void* source) {
  host::poison(target, 16);
  auto& groups = host::block.fibres[host::block.current].groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({target, source});
}
DEVICE void copy_commit() {
  auto& groups = host::block.fibres[host::block.current].groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int PENDING> DEVICE void copy_wait() {
  auto& groups = host::block.fibres[host::block.current].groups;
  while (groups.size() > PENDING + 1) {
    for (auto& c : groups.front()) {
      ASAN_UNPOISON_MEMORY_REGION(c.target, 16);
      memcpy(c.target, c.source, 16);
    }
    groups.erase(groups.begin());
  }
}
