// The device vocabulary of every kernel: one name for each thing a GPU of any supported generation
// can do. ARCH (75, 80, 90, …) picks the implementation. host_primitives.hpp gives the same names a
// CPU meaning, so that the kernels themselves run, unchanged, in tests on machines without a GPU.
#pragma once
#define WGMMA (ARCH == 90)  // Hopper's own: no other generation has it
#ifdef HEADRACE_HOST
#include "host_primitives.hpp"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks_per_sm) extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
#define ARGS(type, name) const __grid_constant__ type name
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]
#define HOST_ENTRY(kernel, args)
#define HOST_ENTRY_TOGETHER(kernel, args)

#define INFINITY __uint_as_float(0x7f800000u)
constexpr u32 FULL_WARP = 0xffffffffu;

DEVICE void sync_block() { __syncthreads(); }
// `threads` of the block, whole warps, meet at barrier `id`, 1 to 15.
DEVICE void sync_threads(int id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void sync_warp() { __syncwarp(); }
template <class T> DEVICE T shuffle_xor(T v, int mask) { return __shfl_xor_sync(FULL_WARP, v, mask); }
template <class T> DEVICE T shuffle(T v, int lane) { return __shfl_sync(FULL_WARP, v, lane); }
// What follows from it is worked out where it is used, not carried through a kernel's loops in registers.
DEVICE int lane_now() { int lane; asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane)); return lane; }
// The other way round: carried in a register.
DEVICE int kept(int v) { asm volatile("" : "+r"(v)); return v; }
DEVICE bool any_lane(bool p) { return __any_sync(FULL_WARP, p); }
DEVICE int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
DEVICE int dp4a(u32 a, int b, int c) {  // bytes of a are unsigned
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

DEVICE float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE float exp2_near(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }  // within 2 ulp
// Of pairs of f16.
DEVICE u32 subtract_halves(u32 a, u32 b) { u32 d; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 multiply_halves(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE float bits_to_float(u32 u) { return __uint_as_float(u); }
DEVICE u32 float_to_bits(float f) { return __float_as_uint(f); }
DEVICE void sincos_turns(float turns, float* s, float* c) { sincospif(2.f * turns, s, c); }

DEVICE float divide_near(float x, float y) { return __fdividef(x, y); }  // likewise, for y below 2^126
#if ARCH >= 80
DEVICE u32 pack_halves(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
#else
DEVICE u32 pack_halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
#endif
// a × b + c of each of two f16, rounded once; subnormal numbers count.
DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Loads that skip L1: for what another block or kernel wrote.
template <class T> DEVICE T load_fresh(const T* p) { return __ldcg(p); }
// Asks L2 for bytes (a multiple of 16) from p, a multiple of 16, on; nothing waits for them, and what is stored later
// is seen all the same. The whole warp calls.
DEVICE void prefetch_l2(const void* p, u32 bytes) {
#if ARCH >= 90
  if ((threadIdx.x & 31) == 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#else
  for (u32 i = (threadIdx.x & 31) * 32; i < bytes; i += 32 * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)p + i));
#endif
}
DEVICE void fence_device() { __threadfence(); }
DEVICE void fence_system() { __threadfence_system(); }
DEVICE u32 atomic_add(u32* p, u32 v) { return atomicAdd(p, v); }
// For a thread whose block met at a barrier before and meets at one after: what the block wrote before is seen by whoever
// adds later, and the block sees what was written by those who added earlier.
DEVICE u32 atomic_add_ordered(u32* p, u32 v) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
// Adds to a counter that others wait for; they then see what this thread's block wrote before it met at a barrier.
DEVICE void add_release(u32* p, u32 v) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEVICE void wait_at_least(const u32* p, u32 count) {  // the counter may wrap around
  u32 now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(p) : "memory");
  } while ((int)(now - count) < 0);
}
DEVICE void atomic_or(u32* p, u32 v) { atomicOr(p, v); }
DEVICE void atomic_max(u64* p, u64 v) { atomicMax(p, v); }
DEVICE u64 global_time() { u64 t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory"); return t; }  // ns
DEVICE void store_system(u64* p, u64 v) { *(volatile u64*)p = v; }  // for the host

// Programmatic dependent launch: a kernel may start before its predecessor has ended, and waits
// here before it touches what the predecessor wrote.
DEVICE void dependency_wait() {
#if ARCH >= 90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void dependents_launch() {
#if ARCH >= 90
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// D[16,8] += A[16,16] B[16,8], f16 operands, f32 sums; fragments as in PTX's mma.m16n8k16.
DEVICE void mma_f16(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
#if ARCH >= 80
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.z), "r"(a.w), "r"(b1));
#endif
}

#if ARCH >= 80
// The same with bfloat16 operands.
DEVICE void mma_brain(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two floats as the nearest bfloat16, in a word.
DEVICE u32 pack_brain2(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Of each of two bfloat16: the greater, and the product.
DEVICE u32 brain2_max(u32 a, u32 b) { u32 d; asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 brain2_mul(u32 a, u32 b) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}
#endif
// Bytes of the two words as bytes of one: nibble i of `selector` picks byte i (0–3 of a, 4–7 of b).
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

#if ARCH >= 90
DEVICE void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  } while (!done);
}
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Between plain stores of this or another thread and bulk copies that read what was stored.
DEVICE void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
// bytes and both addresses are multiples of 16.
DEVICE void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(target)), "l"(source), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
#endif
#if ARCH >= 80
DEVICE void copy_async16(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)), "l"(source) : "memory");
}
// The same of the first `bytes`; zeros after them.
DEVICE void copy_async16(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
#endif

#endif  // HEADRACE_HOST

// A kernel waits for its predecessor with BEGIN, before it touches what the predecessor wrote. Compiled
// with TIMED it also notes when its first block went on and when its last one ended; its arguments then
// end with the place for that, zero before: the complement of the first, so that both are maxima.
#ifndef TIMED
#define TIMED 0
#endif
#if TIMED
#define STAMPS u64* stamps;
struct Stopwatch {
  u64* stamps;
  DEVICE explicit Stopwatch(u64* s) : stamps(s) { if (threadIdx.x == 0) atomic_max(stamps, ~global_time()); }
  DEVICE ~Stopwatch() { if (threadIdx.x == 0) atomic_max(stamps + 1, global_time()); }
};
#define BEGIN(a) dependency_wait(); Stopwatch stopwatch(a.stamps)
#define NOTE(stamp, time) atomic_max(stamp, time)
#define GIVE_STAMPS(a) , a.stamps
#else
#define STAMPS
#define NOTE(stamp, time)
#define GIVE_STAMPS(a)
#define BEGIN(a) dependency_wait()
#endif

DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// Sums N values (a power of two ≤ LANES) over LANES neighbouring lanes at once, halving the values a lane carries at
// each step. Lane l of them ends with the sum of value l / (LANES / N). The order of additions for a value is
// the same whatever N is, so a row's result does not depend on how many rows travel together.
template <int LANES, int N> DEVICE float sum_transposed(float (&v)[N], int lane) {
#pragma unroll
  for (int step = LANES / 2, n = N; step; step >>= 1) {
    if (n > 1) {
      n >>= 1;
      const bool upper = lane & step;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        if (i >= n) break;
        const float keep = upper ? v[i + n] : v[i], send = upper ? v[i] : v[i + n];
        v[i] = keep + shuffle_xor(send, step);
      }
    } else {
      v[0] += shuffle_xor(v[0], step);
    }
  }
  return v[0];
}

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v += shuffle_xor(v, step);
  return v;
}

template <int COUNT> DEVICE float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  sync_block();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < COUNT; ++w) total += scratch[w];
  sync_block();
  return total;
}

// A warp's own ring of shared-memory stages, filled from device memory ahead of use. The whole warp
// calls request and wait in step; after the last read of a stage and before its next request comes
// a sync_warp. At most one request per wait, and DEPTH requests before the first wait.
template <int DEPTH, int BYTES> struct Ring {
  u8* stages;
  u64* full;  // one barrier a stage; used on sm_90 and later
  int lane, stage = 0;
  u32 parity = 0;

  DEVICE Ring(u8* memory, u64* barriers, int lane) : stages(memory), full(barriers), lane(lane) {
#if ARCH >= 90
    if (lane == 0) {
      for (int s = 0; s < DEPTH; ++s) barrier_init(&full[s], 1);
      barrier_init_fence();
    }
    sync_warp();
#endif
  }
  // Starts the copy of `bytes` (a multiple of 16; none when 0) into stage s.
  DEVICE void request(int s, const u8* source, u32 bytes) {
    u8* target = stages + s * BYTES;
#if ARCH >= 90
    if (lane == 0 && bytes) {
      barrier_arrive_expect(&full[s], bytes);
      copy_bulk(target, source, bytes, &full[s]);
    }
#elif ARCH >= 80
    for (u32 i = lane * 16; i < bytes; i += 512) copy_async16(target + i, source + i);
    copy_commit();
#else
    for (u32 i = lane * 16; i < bytes; i += 512) *(uint4*)(target + i) = *(const uint4*)(source + i);
#endif
  }
  DEVICE const u8* wait() {
#if ARCH >= 90
    barrier_wait(&full[stage], parity);
#elif ARCH >= 80
    copy_wait<DEPTH - 1>();
    sync_warp();
#else
    sync_warp();
#endif
    return stages + stage * BYTES;
  }
  DEVICE void advance() {
    if (++stage == DEPTH) {
      stage = 0;
      parity ^= 1;
    }
  }
};
