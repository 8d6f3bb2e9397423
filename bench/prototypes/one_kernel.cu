#include "blocks.cuh"
#include "activations.cuh"
#ifndef SLOTS
#define SLOTS 80
#endif
#ifndef WINDOW
#define WINDOW 20
#endif
#ifndef CH
#define CH 4
#endif
#ifndef NEWDOT
#define NEWDOT 1
#endif
#ifndef BARRIERS
#define BARRIERS 1
#endif
#ifndef NSM
#define NSM 132
#endif
constexpr int WARPS = 16, SLOT = 2304;
struct ProtoArgs {
  const u8* weights; u8* x; u8* attention; u8* hidden;  // activations: quants, scales, squares, values
  float* q; const float* gain; u32* counter; u64* clocks; int layers;
};
DEVICE void bar_consumers() { asm volatile("bar.sync 1, 512;" ::: "memory"); }
DEVICE u32 load_acquire(const u32* p) { u32 v; asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEVICE void red_release(u32* p) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(p) : "memory"); }

template <int N, int K_, int UNIT, bool PAIRED_> struct Op {
  static constexpr int ROWS_TOTAL = N, COLS = K_, UNIT_ROWS = UNIT, SLICES = K_ / 1024;
  static constexpr int UNITS = N / UNIT / (PAIRED_ ? 2 : 1), UNIT_GROUPS = UNIT / 4 * (PAIRED_ ? 2 : 1), UNIT_TILES = UNIT_GROUPS * SLICES;
  static constexpr u64 BYTES = (u64)N * K_ / 256 * 144;
  static constexpr bool PAIRED = PAIRED_;
  static DEVICE int first(int b) { return (int)((u64)UNITS * b / NSM); }
};
using QKV = Op<6144, 4096, 4, false>;
using OUT = Op<4096, 4096, 16, false>;
using FFN = Op<28672, 4096, 16, true>;
using DOWN = Op<4096, 14336, 16, false>;
constexpr u64 LAYER = QKV::BYTES + OUT::BYTES + FFN::BYTES + DOWN::BYTES;

struct Shared { u8* ring; u64 *full, *empty; u8* x; float* partial; float* rms; };

constexpr int STAGES_ = SLOTS / CH;
template <class O> DEVICE void produce(const u8* w, u32& g, u32& slot, u32& phase, const Shared& s) {
  const int first = O::first(blockIdx.x), last = O::first(blockIdx.x + 1);
  const u8* p = w + (u64)first * O::UNIT_TILES * SLOT;
  for (int n = (last - first) * O::UNIT_TILES / CH; n; --n) {
    barrier_wait(&s.empty[slot], phase ^ 1);
    if (WINDOW < STAGES_ && g >= WINDOW) {
      const u32 behind = slot >= WINDOW ? slot - WINDOW : slot + STAGES_ - WINDOW;
      barrier_wait(&s.full[behind], slot >= WINDOW ? phase : phase ^ 1);
    }
    barrier_arrive_expect(&s.full[slot], SLOT * CH);
    copy_bulk(s.ring + slot * (SLOT * CH), p, SLOT * CH, &s.full[slot]);
    p += SLOT * CH;
    ++g;
    if (++slot == STAGES_) slot = 0, phase ^= 1;
  }
}

struct Cursor { u32 base = 0; u32 epoch = 0; };

DEVICE void grid_barrier(const ProtoArgs& a, u32& epoch) {
  ++epoch;
  bar_consumers();
  if (threadIdx.x == 0) {
    red_release(a.counter);
#if BARRIERS
    while (load_acquire(a.counter) < epoch * NSM) {}
#endif
  }
  bar_consumers();
}

DEVICE Row row_of(u8* p, int k) { return {(float*)(p + k * 4), (int4*)p, (uint2*)(p + k), (float*)(p + k * 8), nullptr, 0}; }

template <class O> DEVICE void load_x(u8* in, const Shared& s, bool norm) {
  constexpr int K = O::COLS, N = K / 16;
  const Row row = row_of(in, K);
  if (norm && threadIdx.x / 32 == WARPS - 1) {
    float v = 0.f;
#pragma unroll 8
    for (int i = threadIdx.x & 31; i < N; i += 32) v += load_fresh(row.squares + i);
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) *s.rms = rsqrtf(v * (1.f / K) + 1e-5f);
  }
  int4* quants = (int4*)s.x;
  int4* scales = (int4*)(s.x + N * 16);
  for (int i = threadIdx.x; i < N + N / 2; i += WARPS * 32) {
    if (i < N) quants[i] = load_fresh(row.quants + i);
    else scales[i - N] = load_fresh((const int4*)row.scales + i - N);
  }
  bar_consumers();
}

template <class O, class F> DEVICE void consume(u32& base, const Shared& s, bool norm, F&& finish) {
  constexpr int PITCH = O::SLICES | 1, K = O::COLS;
  using B = Block<Q4_K>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first = O::first(blockIdx.x), last = O::first(blockIdx.x + 1), tiles = (last - first) * O::UNIT_TILES;
  const int4* xq = (const int4*)s.x;
  const uint2* xs = (const uint2*)(s.x + K);
  int t = (warp - base) & 15;
  u32 slot = (base + t) % SLOTS, phase = (base + t) / SLOTS & 1;
#if NEWDOT
  // lanes 0-15: rows 0, 1; 16-31: rows 2, 3. Of a block (lane >> 2 & 3) pair j = lane & 3 of sub-blocks: 64 columns.
  const int j = lane & 3, block = lane >> 2 & 3, half = block & 1, row0 = lane >> 4 << 1;
  int xo[4], so[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // i: sub-block (2j + (i & 1)), half (half ^ (i >> 1))
    const int g = block * 16 + (2 * j + (i & 1)) * 2 + (half ^ (i >> 1));
    xo[i] = quant_slot(g) * 16, so[i] = scale_slot(g) * 8;
    asm volatile("" : "+r"(xo[i]), "+r"(so[i]));
  }
  int qo = 256 + row0 * 512 + block * 128 + j * 32 + 16 * half, ho = row0 * 64 + block * 16, other = 16 - 32 * half;
  asm volatile("" : "+r"(qo), "+r"(ho), "+r"(other));
  for (; t < tiles; t += 16) {
    const int slice = t % O::SLICES;
    int4 x[4]; float lo[4], hi[4], sa = 0.f, sb = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = *(const int4*)(s.x + slice * 1024 + xo[i]);
      const uint2 sc = *(const uint2*)(s.x + K + slice * 512 + so[i]);
      lo[i] = low_scale(sc), hi[i] = high_scale(sc);
      if (i & 1) sb += group_sum(sc), lo[i] *= 0.0625f, hi[i] *= 0.0625f;
      else sa += group_sum(sc);
    }
    barrier_wait(&s.full[slot / CH], phase);
    float sum[2];
    auto dots = [](u32 a, u32 b, int x, int y) {
      int v;
      asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(x), "r"(0x4b400000));
      asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(v) : "r"(b), "r"(y));
      return bits_to_float((u32)v) - 12582912.f;
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 header = *(const uint4*)(s.ring + slot * SLOT + ho + r * 64);
      float va = 0.f, vb = 0.f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 q = *(const uint4*)(s.ring + slot * SLOT + qo + r * 512 + h * other);
        const int4 xa = x[2 * h], xb = x[2 * h + 1];
        constexpr u32 L = 0x0f0f0f0fu, H = 0xf0f0f0f0u;
        va = fmaf(lo[2 * h], dots(q.x & L, q.y & L, xa.x, xa.y), va);
        va = fmaf(hi[2 * h], dots(q.z & L, q.w & L, xa.z, xa.w), va);
        vb = fmaf(lo[2 * h + 1], dots(q.x & H, q.y & H, xb.x, xb.y), vb);
        vb = fmaf(hi[2 * h + 1], dots(q.z & H, q.w & H, xb.z, xb.w), vb);
      }
      Share w;
      six_bit_scales(w, header, j);
      float v = w.wa.x * va;
      v = fmaf(w.wb.x, vb, v);
      v = fmaf(w.wa.y, sa, v);
      sum[r] = fmaf(w.wb.y, sb, v);
    }
    sync_warp();
    if (lane == 0) barrier_arrive(&s.empty[slot / CH]);
    const bool upper = lane & 8;
    float total = (upper ? sum[1] : sum[0]) + shuffle_xor(upper ? sum[0] : sum[1], 8);
    total += shuffle_xor(total, 4);
    total += shuffle_xor(total, 2);
    total += shuffle_xor(total, 1);
    if (lane % 8 == 0) s.partial[(t / O::SLICES * 4 + lane / 8) * PITCH + slice] = total;
    slot += 16;
    if (slot >= SLOTS) slot -= SLOTS, phase ^= 1;
  }
#else
  for (; t < tiles; t += 16) {
    const int slice = t % O::SLICES;
    const int ga = slice * 64 + B::group_a(lane), gb = slice * 64 + B::group_b(lane);
    const int4 xa = xq[quant_slot(ga)], xb = xq[quant_slot(gb)];
    const uint2 sa = xs[scale_slot(ga)], sb = xs[scale_slot(gb)];
    barrier_wait(&s.full[slot / CH], phase);
    const u8* tile = s.ring + slot * SLOT;
    float sum[4];
    auto dots = [](int a, int b, int x, int y) { return bits_to_float((u32)dp4a(b, y, dp4a(a, x, 0x4b400000))) - 12582912.f; };
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Share h;
      B::unpack(h, tile, 4, r * 4 + B::block(lane), lane & 7);
      float a = low_scale(sa) * dots(h.a[0], h.a[1], xa.x, xa.y);
      float b = low_scale(sb) * dots(h.b[0], h.b[1], xb.x, xb.y);
      a = fmaf(high_scale(sa), dots(h.a[2], h.a[3], xa.z, xa.w), a);
      b = fmaf(high_scale(sb), dots(h.b[2], h.b[3], xb.z, xb.w), b);
      float v = h.wa.x * a;
      v = fmaf(h.wb.x, b, v);
      v = fmaf(h.wa.y, group_sum(sa), v);
      sum[r] = fmaf(h.wb.y, group_sum(sb), v);
    }
    sync_warp();
    if (lane == 0) barrier_arrive(&s.empty[slot / CH]);
    const float total = warp_sum_transposed(sum);
    if (lane % 8 == 0) s.partial[(t / O::SLICES * 4 + lane / 8) * PITCH + slice] = total;
    slot += 16;
    if (slot >= SLOTS) slot -= SLOTS, phase ^= 1;
  }
#endif
  base += tiles;
  bar_consumers();
  const int outputs = (last - first) * O::UNIT_ROWS;
  auto result = [&](int local) {
    const float* p = s.partial + local * PITCH;
    float v = p[0];
#pragma unroll
    for (int i = 1; i < O::SLICES; ++i) v += p[i];
    return norm ? v * *s.rms : v;
  };
  for (int i = threadIdx.x; i < (outputs + 31) / 32 * 32; i += WARPS * 32) {
    const bool live = i < outputs;
    const int o = live ? i : 0, n = first * O::UNIT_ROWS + o;
    if (O::PAIRED) {
      const int local = o / 16 * 32 + o % 16;
      finish(n, result(local), result(local + 16), live);
    } else finish(n, result(o), 0.f, live);
  }
}

KERNEL(WARPS * 32 + 32, 1) proto(ARGS(ProtoArgs, a)) {
  DYNAMIC_SHARED(shared);
  Shared s;
  s.ring = shared;
  s.full = (u64*)(shared + SLOTS * SLOT);
  s.empty = s.full + SLOTS;
  s.x = (u8*)(s.empty + SLOTS);
  s.partial = (float*)(s.x + 14336 * 3 / 2);
  s.rms = s.partial + 3100;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES_; ++i) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], CH);
    barrier_init_fence();
  }
  sync_block();
  if (threadIdx.x >= WARPS * 32) {
    if (threadIdx.x != WARPS * 32) return;
    u32 g = 0, slot = 0, phase = 0;
    for (int l = 0; l < a.layers; ++l) {
      const u8* w = a.weights + l * LAYER;
      produce<QKV>(w, g, slot, phase, s);
      produce<OUT>(w + QKV::BYTES, g, slot, phase, s);
      produce<FFN>(w + QKV::BYTES + OUT::BYTES, g, slot, phase, s);
      produce<DOWN>(w + QKV::BYTES + OUT::BYTES + FFN::BYTES, g, slot, phase, s);
    }
    return;
  }
  u32 base = 0, epoch = 0;
  const Row x = row_of(a.x, 4096), attention = row_of(a.attention, 4096), hidden = row_of(a.hidden, 14336);
  auto residual = [&](int n, float v, float, bool live) {
    v = live ? v + load_fresh(x.values + n) : 0.f;
    if (live) x.values[n] = v;
    store_group(x, n, v, live ? a.gain[n] : 0.f, live);
  };
#define CLOCK(i) if (threadIdx.x == 0 && l == 5) a.clocks[blockIdx.x * 16 + i] = global_time()
  for (int l = 0; l < a.layers; ++l) {
    CLOCK(0);
    load_x<QKV>(a.x, s, true);
    CLOCK(1);
    consume<QKV>(base, s, true, [&](int n, float v, float, bool live) { if (live) a.q[n] = v; });
    CLOCK(2);
    grid_barrier(a, epoch);
    CLOCK(3);
    if (blockIdx.x < 8) {  // stands for attention: about its chain of loads
      const int head = threadIdx.x + blockIdx.x * 512;
      float v = 0.f;
      int at = head;
      for (int i = 0; i < 3; ++i) v = load_fresh(a.q + at), at = (head + (v > 1e30f)) & 4095;
      store_group(attention, head, v, 1.f, true);
    }
    grid_barrier(a, epoch);
    CLOCK(4);
    load_x<OUT>(a.attention, s, false);
    consume<OUT>(base, s, false, residual);
    CLOCK(5);
    grid_barrier(a, epoch);
    CLOCK(6);
    load_x<FFN>(a.x, s, true);
    CLOCK(7);
    consume<FFN>(base, s, true, [&](int n, float gate, float up, bool live) {
      store_group(hidden, n, gate / (1.f + expf(-gate)) * up, 1.f, live);
    });
    CLOCK(8);
    grid_barrier(a, epoch);
    CLOCK(9);
    load_x<DOWN>(a.hidden, s, false);
    CLOCK(10);
    consume<DOWN>(base, s, false, residual);
    CLOCK(11);
    grid_barrier(a, epoch);
    CLOCK(12);
  }
}
