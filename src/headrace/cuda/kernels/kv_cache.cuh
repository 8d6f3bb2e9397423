// The paged KV cache of one layer, and the rotary embedding of what goes into it.
//
// Keys lie as [page][kv_head][position][dim], values transposed, [page][kv_head][dim][position], so that attention
// loads tensor-core fragments of either straight from memory. They are f16; or (CACHE_Q8) int8 with 128 added, and
// behind those of a page's head the f16 scales of each 32 dims of a position, [dim / 32][position].
// Macros: KV_HEADS, HEAD_DIM, ROPE_DIM, MAGNITUDE, CACHE_Q8.
#pragma once
#include "primitives.cuh"

constexpr int PAGE_SIZE = 64, CACHE_GROUP = 32;  // dims that share a scale
constexpr int CACHE_DIM = (HEAD_DIM + CACHE_GROUP - 1) / CACHE_GROUP * CACHE_GROUP;  // dims beyond HEAD_DIM: any finite value

#if CACHE_Q8
typedef u8 Cached;
#else
typedef u16 Cached;
#endif
constexpr int SCALE_GROUPS = CACHE_DIM / CACHE_GROUP, SCALE_BYTES = CACHE_Q8 ? SCALE_GROUPS * PAGE_SIZE * 2 : 0;
constexpr int HEAD_BYTES = PAGE_SIZE * CACHE_DIM * (int)sizeof(Cached) + SCALE_BYTES;  // keys, or values, of a page

// Where a dim of a key or value goes, and the scale of its group.
struct Spot {
  Cached* at;
  u16* scale;
};

struct Cache {
  u8 *keys, *values;
  const int* page_table;  // [n_slots, max_pages]
  const int *positions, *slots;  // of each row
  int max_pages;

  DEVICE u64 page(int slot, int position) const {
    return load_fresh(page_table + (u64)slot * max_pages + position / PAGE_SIZE);
  }
  DEVICE Cached* key(u64 page, int head, int position) const {
    return (Cached*)(keys + (page * KV_HEADS + head) * HEAD_BYTES) + position % PAGE_SIZE * CACHE_DIM;
  }
  DEVICE Cached* value(u64 page, int head, int dim) const {
    return (Cached*)(values + (page * KV_HEADS + head) * HEAD_BYTES) + dim * PAGE_SIZE;
  }
  // [SCALE_GROUPS, PAGE_SIZE]
  DEVICE u16* key_scales(u64 page, int head) const { return (u16*)(key(page, head, 0) + PAGE_SIZE * CACHE_DIM); }
  DEVICE u16* value_scales(u64 page, int head) const { return (u16*)value(page, head, CACHE_DIM); }
  DEVICE Spot key_spot(u64 page, int head, int position, int dim) const {
    return {key(page, head, position) + dim, key_scales(page, head) + dim / CACHE_GROUP * PAGE_SIZE + position % PAGE_SIZE};
  }
  DEVICE Spot value_spot(u64 page, int head, int position, int dim) const {
    const int column = position % PAGE_SIZE;
    return {value(page, head, dim) + column, value_scales(page, head) + dim / CACHE_GROUP * PAGE_SIZE + column};
  }
};

// Stores N neighbouring dims, `stride` apart; 32 / N neighbouring lanes hold a group, `first` its first. Every lane of
// the warp must call; `live` ones store.
template <int N> DEVICE void store_cached(const Spot& spot, int stride, const float (&v)[N], bool first, bool live) {
  struct alignas(N * sizeof(Cached)) { Cached c[N]; } out;
#if CACHE_Q8
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(v[i]));
#pragma unroll
  for (int step = CACHE_GROUP / N / 2; step; step >>= 1) largest = fmaxf(largest, shuffle_xor(largest, step));
  const u16 scale = float_to_half(largest * (1.f / 127.f));
  const float d = half_to_float(scale), inverse = d > 0.f ? 1.f / d : 0.f;
#pragma unroll  // a scale that is subnormal may be much too small
  for (int i = 0; i < N; ++i) out.c[i] = (u8)(128 + max(-127, min(127, __float2int_rn(v[i] * inverse))));
  if (live && first) *spot.scale = scale;
#else
#pragma unroll
  for (int i = 0; i < N; ++i) out.c[i] = float_to_half(v[i]);
#endif
  if (!live) return;
  if (stride == 1) *(decltype(out)*)spot.at = out;
  else {
#pragma unroll
    for (int i = 0; i < N; ++i) spot.at[i * stride] = out.c[i];
  }
}

// Of eight f16 only the first `count` stay: what lies beyond may be anything, and 0 × NaN is no zero.
DEVICE void clear_beyond(uint4& eight, int count) {
  u32* words = &eight.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] &= count > 2 * i + 1 ? 0xffffffffu : count > 2 * i ? 0xffffu : 0u;
}

#if CACHE_Q8
// Four quants as f16, exactly: the bytes become the low bits of 1,024 + (q + 128), less 1,152. BY_64: divided by 64,
// with the bits of 16 + (q + 128) / 64, less 18.
template <bool BY_64 = false> DEVICE uint2 quants_to_halves(u32 quants) {
  constexpr u32 top = BY_64 ? 0x4c4c4c4cu : 0x64646464u, bias = BY_64 ? 0x4c804c80u : 0x64806480u;
  return make_uint2(subtract_halves(pick_bytes(quants, top, 0x4140), bias), subtract_halves(pick_bytes(quants, top, 0x4342), bias));
}
// Eight of them, times their f16 scales.
DEVICE uint4 dequantise(const uint2& quants, const uint4& scales) {
  const uint2 a = quants_to_halves(quants.x), b = quants_to_halves(quants.y);
  return make_uint4(multiply_halves(a.x, scales.x), multiply_halves(a.y, scales.y), multiply_halves(b.x, scales.z), multiply_halves(b.y, scales.w));
}
DEVICE uint4 dequantise(const uint2& quants, u16 scale) {
  const u32 s = scale * 0x10001u;
  return dequantise(quants, make_uint4(s, s, s, s));
}
#endif

struct Rotation { float cosine, sine; };

// Of dimension `dim` of a head. Rows of q and k are laid out at load so that a pair is always
// (2i, 2i + 1): turns[i] = inv_freq[i] / 2π. The product is taken in double and reduced to one turn: a
// float angle is wrong by 0.01 at position 100,000.
DEVICE double turns_of(int dim, const double* turns) { return dim < ROPE_DIM ? turns[dim >> 1] : 0.0; }
DEVICE Rotation rotation(int dim, int position, double turns) {
  if (dim >= ROPE_DIM) return {1.f, 0.f};
  const double t = position * turns;
  float s, c;
  sincos_turns((float)(t - rint(t)), &s, &c);
  return {MAGNITUDE * c, dim & 1 ? MAGNITUDE * s : -MAGNITUDE * s};
}
// The value after rotation; `partner` is the other of its pair.
DEVICE float rotate(float v, float partner, Rotation r) { return fmaf(v, r.cosine, partner * r.sine); }
