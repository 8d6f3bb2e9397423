// Threads of a block as fibres, blocks one after another (or all at once, where they wait for each other): how
// kernels run on a CPU (host_primitives.hpp).
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
#define DYNAMIC_SHARED(name) u8* const name = host::block->shared
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
  void (*run)(float*, const u32 (&)[4][4], const u8*, bool);
  bool accumulate;
  float* d;
  u32 rows[4][4];  // of A, of the quad's lanes
  const u8* b;
};
struct Fibre {
  void* sp;
  const volatile u32* waits_on;  // runnable once this word differs from `seen`
  u32 seen;
  bool done;
  struct Copy16 { void* target; const void* source; u32 bytes; };
  std::vector<std::vector<Copy16>> groups;  // cp.async groups in flight, the open one last
  std::vector<std::vector<Wgmma>> wgmmas;   // likewise
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
  volatile u32 generation, group_generations[16];  // the last: of barriers that some of the threads meet at
  u32 arrived, group_arrived[16], alive, current;
  Index3 index;
};
static std::vector<std::unique_ptr<Block>> blocks;  // those that run together
static Block* block;                                // of the fibre that runs
static void* scheduler_sp;
static u64 random_state;
static void (*body)(const void*);
static const void* args;
static const char* fault;

inline u32 random(u32 n) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return (u32)(random_state >> 33) % n;
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
  Fibre& f = block->fibres[block->current];
  f.waits_on = word;
  f.seen = seen;
  switch_stack(&f.sp, scheduler_sp, scheduler_stack, scheduler_stack_size);
}

inline void fibre_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body(args);
  Fibre& f = block->fibres[block->current];
  f.done = true;
  --block->alive;
  if (block->alive && block->arrived == block->alive) {  // a thread that has ended counts as arrived
    block->arrived = 0;
    ++block->generation;
  }
  switch_stack(&f.sp, scheduler_sp, scheduler_stack, scheduler_stack_size, true);
}

inline void barrier_check(Barrier* b) {
  if (b->pending == 0 && b->bytes == 0) {
    b->phase ^= 1;
    b->pending = b->expected;
  }
}
inline void complete(size_t i) {
  BulkCopy c = block->copies[i];
  block->copies.erase(block->copies.begin() + (long)i);
  ASAN_UNPOISON_MEMORY_REGION(c.target, c.bytes);
  memcpy(c.target, c.source, c.bytes);
  Barrier* b = (Barrier*)c.barrier;
  b->bytes -= (int32_t)c.bytes;
  barrier_check(b);
}

inline void start(Block& k, Index3 index, u32 threads) {
  ASAN_UNPOISON_MEMORY_REGION(k.shared, SHARED);
  memset(k.shared, 0xff, SHARED);
  k.index = index;
  k.fibres.assign(threads, Fibre{});
  k.warps.assign((threads + 31) / 32, Warp{});
  k.copies.clear();
  k.generation = 0;
  k.arrived = 0;
  for (u32 i = 0; i < 16; ++i) k.group_generations[i] = k.group_arrived[i] = 0;
  k.alive = threads;
  if (k.stacks_made < threads) {
    k.stacks.reset(new u8[size_t(threads) * STACK]);
    k.stacks_made = threads;
  }
  for (u32 t = 0; t < threads; ++t)
    k.fibres[t].sp = first_stack_pointer(k.stacks.get() + (t + 1) * STACK, fibre_entry);
}

// Gives each fibre of a block that can go on its turn; whether any could.
inline bool advance(Block& k, u32 threads) {
  bool progressed = false;
  const u32 start = random(threads), stride = 2 * random(threads) + 1;
  const bool permutes = (threads & (threads - 1)) == 0;  // an odd stride visits all of 2^n
  block = &k;
  blockIdx = k.index;
  for (u32 i = 0; i < threads && !fault; ++i) {
    const u32 t = (start + i * (permutes ? stride : 1)) % threads;
    Fibre& f = k.fibres[t];
    if (f.done || (f.waits_on && *f.waits_on == f.seen)) continue;
    f.waits_on = nullptr;
    k.current = t;
    threadIdx.x = t;
    switch_stack(&scheduler_sp, f.sp, k.stacks.get() + t * STACK, STACK);
    progressed = true;
  }
  for (size_t i = k.copies.size(); i-- > 0;)
    if (random(4) == 0 || (!progressed && i == 0)) {
      complete(i);
      progressed = true;
    }
  return progressed;
}

// Runs the blocks that have been started to their ends; false when something is wrong (see fault).
inline bool run_blocks(u32 count, u32 threads) {
  for (bool alive = true; alive;) {
    bool progressed = alive = false;
    for (u32 b = 0; b < count && !fault; ++b)
      if (blocks[b]->alive) {
        progressed |= advance(*blocks[b], threads);
        alive |= blocks[b]->alive > 0;
      }
    if (fault) return false;
    if (alive && !progressed) fault = "deadlock: every thread waits";
  }
  for (u32 b = 0; b < count; ++b)
    if (!blocks[b]->copies.empty()) fault = "a block ended with copies in flight";
  return fault == nullptr;
}

// Meets the other 31 lanes; returns all lanes' words.
inline const Slot* meet(const Slot& mine) {
  Warp& w = block->warps[threadIdx.x >> 5];
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

// `together`: all blocks at once, for those that wait for each other.
inline const char* launch(void (*kernel)(const void*), const void* arguments, u32 gx, u32 gy, u32 gz, u32 threads,
                          u32 shared_bytes, u64 seed, bool together) {
  if (threads % 32 || threads > 1024 || shared_bytes > SHARED) return "bad launch shape";
  body = kernel;
  args = arguments;
  random_state = seed;
  fault = nullptr;
  blockDim = {threads, 1, 1};
  gridDim = {gx, gy, gz};
  const u32 most = together ? gx * gy * gz : 1;
  while (blocks.size() < most) blocks.emplace_back(new Block{});
  u32 count = 0;
  for (u32 z = 0; z < gz; ++z)
    for (u32 y = 0; y < gy; ++y)
      for (u32 x = 0; x < gx; ++x) {
        start(*blocks[count++], {x, y, z}, threads);
        if (count < most) continue;
        if (!run_blocks(count, threads)) return fault;
        count = 0;
      }
  return nullptr;
}
}  // namespace host

// The entry Python calls through ctypes: one struct of arguments, as on the device.
namespace host {
struct Late {
  void* to;
  const void* from;
  size_t bytes;
};
inline Late late[4];
inline int n_late = 0;
}  // namespace host

#define HOST_ENTRY(kernel, args) HOST_ENTRY_OF(kernel, args, false)
#define HOST_ENTRY_TOGETHER(kernel, args) HOST_ENTRY_OF(kernel, args, true)
#define HOST_ENTRY_OF(kernel, args, together)                                                                  \
  extern "C" size_t host_args_size() { return sizeof(args); }                                       \
  extern "C" int host_shared_bytes() { return SHARED_BYTES; }                                       \
  extern "C" void host_late(void* to, const void* from, size_t bytes) {                             \
    host::late[host::n_late++] = {to, from, bytes};                                                 \
  }                                                                                                 \
  extern "C" const char* host_launch(const void* a, u32 gx, u32 gy, u32 gz, u32 threads,            \
                                     u32 shared_bytes, u64 seed) {                                  \
    if (shared_bytes < SHARED_BYTES) return "less shared memory than the kernel uses";              \
    return host::launch([](const void* p) { kernel(*(const args*)p); }, a, gx, gy, gz, threads,     \
                        shared_bytes, seed, together);                                              \
  }

