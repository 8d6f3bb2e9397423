// What a product of rows does with its results. Each is there where its macros are, and takes the matrices' rows:
//   Store     y[row, n], all matrices' outputs side by side; logits are scaled and soft-capped
//             (LOGIT_SCALE, SOFTCAP).
//   Rotary    q, k, v: rotates q and k, stores q, writes k and v to the cache (kv_cache.cuh's macros). With CACHE_Q8 a
//             warp's lanes must hold a group of 32 dims: HEAD_DIM is, and warps begin at, a multiple of 32.
//   Residual  x[row, n] += y; quantises x∘gain for the next operation.
//   Product   activation(gate) × up (ACTIVATION: SILU or GELU_TANH), quantised for the down matmul.
//
// What an output needs from memory is asked for before the dot products, into a Ready, so that the loads' latency hides
// behind them, and nothing waits for it early: prepare() before the previous kernel has ended, for what no kernel of this
// step writes (weights, positions), fetch() after, settle() when x is there, for what follows from those.
#pragma once
#include "activations.cuh"
#include "epilogue_names.cuh"

#ifdef LOGIT_SCALE
template <int A, int B, int C> struct Store {
  struct Ready {};
  float* y;  // [rows, A + B + C]
  DEVICE Ready prepare(int, int, int, bool) const { return {}; }
  DEVICE void fetch(Ready&, int, int, bool) const {}
  DEVICE void settle(Ready&, int, int, bool) const {}
  DEVICE void finish(const Ready&, int row, int segment, int n, float v, bool live) const {
    if (!live) return;
    v *= LOGIT_SCALE;
    if (SOFTCAP > 0.f) v = SOFTCAP * tanhf(v / SOFTCAP);
    y[(u64)row * (A + B + C) + (segment == 0 ? 0 : segment == 1 ? A : A + B) + n] = v;
  }
};
#endif

#ifdef HEAD_DIM
#include "kv_cache.cuh"
template <int N> struct Rotary {
  struct Ready {
    int position, slot;
    double turns;
    Rotation rotation;
    u32 page;  // where k or v goes
  };
  float* q;  // [rows, N], rotated
  Cache cache;
  const double* turns;
  DEVICE Ready prepare(int row, int segment, int n, bool live) const {
    Ready r = {};
    if (!live) return r;
    r.position = load_fresh(cache.positions + row);
    if (segment < 2) r.turns = turns_of(n % HEAD_DIM, turns);
    if (segment > 0) r.slot = load_fresh(cache.slots + row);
    return r;
  }
  DEVICE void fetch(Ready&, int, int, bool) const {}
  DEVICE void settle(Ready& r, int segment, int n, bool live) const {
    if (!live) return;
    if (segment > 0) r.page = (u32)cache.page(r.slot, r.position);
    if (segment < 2) r.rotation = rotation(n % HEAD_DIM, r.position, r.turns);
  }
  DEVICE void finish(const Ready& r, int row, int segment, int n, float v, bool live) const {
    const float partner = shuffle_xor(v, 1);
    if (segment < 2) v = rotate(v, partner, r.rotation);
    if (live && segment == 0) q[(u64)row * N + n] = v;
    const int head = n / HEAD_DIM, dim = n % HEAD_DIM;
    const Spot spot = segment == 1 ? cache.key_spot(r.page, head, r.position, dim) : cache.value_spot(r.page, head, r.position, dim);
    store_cached(spot, 1, {v}, n % CACHE_GROUP == 0, live && segment > 0);
  }
};
#endif

template <int N> struct Residual {
  struct Ready { float gain, residual; };
  Rows x;             // the residual stream
  const float* gain;  // of the next norm
  DEVICE Ready prepare(int, int, int n, bool live) const { return {live ? gain[n] : 0.f, 0.f}; }
  DEVICE void fetch(Ready& r, int row, int n, bool live) const {
    if (live) r.residual = load_fresh(x.row<N>(row).values + n);
  }
  DEVICE void settle(Ready&, int, int, bool) const {}
  DEVICE void finish(const Ready& ready, int row, int, int n, float v, bool live) const {
    const Row r = x.row<N>(row);
    v = live ? v + ready.residual : 0.f;
    if (live) r.values[n] = v;
    store_group(r, n, v, ready.gain, live);
  }
};

#ifdef ACTIVATION
template <int N> struct Product {
  struct Ready {};
  Rows hidden;
  DEVICE Ready prepare(int, int, int, bool) const { return {}; }
  DEVICE void fetch(Ready&, int, int, bool) const {}
  DEVICE void settle(Ready&, int, int, bool) const {}
  DEVICE void finish(const Ready&, int row, int n, float gate, float up, bool live) const {
    const float v = activated(gate, up);
    const Row r = hidden.row<N>(row);
    if (live && r.values) r.values[n] = v;
    store_group(r, n, live ? v : 0.f, 1.f, live);
  }
};
#endif
