// D[64, N] += A[64, 16] B[N, 16]ᵀ by four warps together on Hopper's tensor cores, asynchronously; bfloat16 or f16
// operands, f32 sums. D and A are a warp's sixteen rows of mma.m16n8k16, side by side. B, in shared memory, is 16
// columns of a tile of 128-byte rows under the 128-byte swizzle, by a descriptor: of where they begin in the first
// row, in units of 16 bytes. Without `accumulate`, D counts as zero.
//
//   wgmma_fence(); wgmma_brain<N>(d, a, b) …; wgmma_commit();   then wgmma_wait<of the last, may run>(), and pin(d).
#pragma once
#include "primitives.cuh"

#if WGMMA && !defined(HEADRACE_HOST)
DEVICE u64 wgmma_descriptor(const void* b) {
  // Start, and 1,024 bytes from eight rows to the next, in units of 16 bytes; the swizzle's code.
  return (u64)((shared_address(b) & 0x3ffffu) >> 4) | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}
#define SUMS4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS16(d, i) SUMS4(d, i), SUMS4(d, i + 4), SUMS4(d, i + 8), SUMS4(d, i + 12)
#define WGMMA_FUNCTION(NAME, KIND, N, PLACES, OPERANDS, ...)                                                          \
  template <> DEVICE void NAME<N>(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {                     \
    asm volatile("{ .reg .pred more; setp.ne.b32 more, " OPERANDS                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND " {" PLACES : __VA_ARGS__            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));                         \
  }
#define PLACES_8 "%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, more, 1, 1, 0; }"
#define PLACES_16 "%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, more, 1, 1, 0; }"
#define PLACES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, more, 1, 1, 0; }"
#define FIRST_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PLACES_64 FIRST_32 "}, {%32,%33,%34,%35}, %36, more, 1, 1, 0; }"
#define PLACES_128 FIRST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, more, 1, 1, 0; }"
#define SUMS32(d) SUMS16(d, 0), SUMS16(d, 16)
#define SUMS64(d) SUMS32(d), SUMS16(d, 32), SUMS16(d, 48)

template <int N> DEVICE void wgmma_brain(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate = true);
template <int N> DEVICE void wgmma_half(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate = true);
WGMMA_FUNCTION(wgmma_brain, "bf16", 8, PLACES_8, "%9, 0; ", SUMS4(d, 0))
WGMMA_FUNCTION(wgmma_brain, "bf16", 16, PLACES_16, "%13, 0; ", SUMS4(d, 0), SUMS4(d, 4))
WGMMA_FUNCTION(wgmma_brain, "bf16", 32, PLACES_32, "%21, 0; ", SUMS16(d, 0))
WGMMA_FUNCTION(wgmma_brain, "bf16", 64, PLACES_64, "%37, 0; ", SUMS32(d))
WGMMA_FUNCTION(wgmma_brain, "bf16", 128, PLACES_128, "%69, 0; ", SUMS64(d))
WGMMA_FUNCTION(wgmma_half, "f16", 64, PLACES_64, "%37, 0; ", SUMS32(d))
WGMMA_FUNCTION(wgmma_half, "f16", 128, PLACES_128, "%69, 0; ", SUMS64(d))

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING = 0> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// What this thread stored or copied to shared memory: wgmma may read it after the block's next barrier.
DEVICE void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// To the compiler a value is used and changed here: neither may it move, nor its register be another's before.
DEVICE void pin(float& v) { asm volatile("" : "+f"(v)::"memory"); }
DEVICE void pin(u32& v) { asm volatile("" : "+r"(v)::"memory"); }
#endif
#if WGMMA
template <class T, int N> DEVICE void pin(T (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) pin(values[i]);
}
#endif
