// The paged KV cache of one layer, and the rotary embedding of what goes into it.
//
// Keys lie as [page][kv_head][position][dim], values transposed, [page][kv_head][dim][position], both
// f16, so that attention loads tensor-core fragments of either straight from memory.
// Macros: KV_HEADS, HEAD_DIM, ROPE_DIM, MAGNITUDE.
#pragma once
#include "primitives.cuh"

constexpr int PAGE_SIZE = 64;
constexpr int CACHE_DIM = (HEAD_DIM + 31) / 32 * 32;  // dims beyond HEAD_DIM stay zero

struct Cache {
  u16 *keys, *values;
  const int* page_table;  // [n_slots, max_pages]
  const int *positions, *slots;  // of each row
  int max_pages;

  DEVICE u64 page(int slot, int position) const {
    return load_fresh(page_table + (u64)slot * max_pages + position / PAGE_SIZE);
  }
  DEVICE u16* key(u64 page, int head, int position) const {
    return keys + ((page * KV_HEADS + head) * PAGE_SIZE + position % PAGE_SIZE) * CACHE_DIM;
  }
  DEVICE u16* value(u64 page, int head, int dim) const {
    return values + ((page * KV_HEADS + head) * CACHE_DIM + dim) * PAGE_SIZE;
  }
};

struct Rotation { float cosine, sine; };

// Of dimension `dim` of a head. Rows of q and k are laid out at load so that a pair is always
// (2i, 2i + 1): turns[i] = inv_freq[i] / 2π. The product is taken in double and reduced to one turn: a
// float angle is wrong by 0.01 at position 100,000.
DEVICE Rotation rotation(int dim, int position, const double* turns) {
  if (dim >= ROPE_DIM) return {1.f, 0.f};
  const double t = position * turns[dim >> 1];
  float s, c;
  sincos_turns((float)(t - rint(t)), &s, &c);
  return {MAGNITUDE * c, dim & 1 ? MAGNITUDE * s : -MAGNITUDE * s};
}
// The value after rotation; `partner` is the other of its pair.
DEVICE float rotate(float v, float partner, Rotation r) { return fmaf(v, r.cosine, partner * r.sine); }
