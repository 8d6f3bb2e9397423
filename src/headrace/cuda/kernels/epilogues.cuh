// What a matvec does with its results. EPILOGUE picks one:
//   STORE     y[row, n], all matrices' outputs side by side; logits are scaled and soft-capped
//             (LOGIT_SCALE, SOFTCAP).
//   ROTARY    q, k, v: rotates q and k (kv_cache.cuh), stores q, writes k and v to the cache.
//   RESIDUAL  x[row, n] += y; quantises x∘gain for the next operation.
//   PRODUCT   activation(gate) × up (ACTIVATION: SILU or GELU_TANH), quantised for the down matmul.
//
// What an output needs from memory is loaded into a Ready before the dot products, so that the loads'
// latency hides behind them: prepare() before the previous kernel has ended, for what no kernel of this
// step writes (weights, positions, pages), fetch() after.
#pragma once
#include "activations.cuh"
#include "epilogue_names.cuh"

#if EPILOGUE == STORE
struct Ready {};
struct Epilogue {
  float* y;  // [rows, N0 + N1 + N2]
  DEVICE Ready prepare(int, int, int, bool) const { return {}; }
  DEVICE void fetch(Ready&, int, int, bool) const {}
  DEVICE void finish(const Ready&, int row, int segment, int n, float v, bool live) const {
    if (!live) return;
    v *= LOGIT_SCALE;
    if (SOFTCAP > 0.f) v = SOFTCAP * tanhf(v / SOFTCAP);
    y[(u64)row * (N0 + N1 + N2) + (segment == 0 ? 0 : segment == 1 ? N0 : N0 + N1) + n] = v;
  }
};
#elif EPILOGUE == ROTARY
#include "kv_cache.cuh"
struct Ready {
  Rotation rotation;
  u16* cached;  // where k or v goes
};
struct Epilogue {
  float* q;  // [rows, N0], rotated
  Cache cache;
  const double* turns;
  DEVICE Ready prepare(int row, int segment, int n, bool live) const {
    if (!live) return {};
    const int position = load_fresh(cache.positions + row), head = n / HEAD_DIM, dim = n % HEAD_DIM;
    Ready r = {{1.f, 0.f}, nullptr};
    if (segment < 2) r.rotation = rotation(dim, position, turns);
    if (segment > 0) {
      const u64 page = cache.page(load_fresh(cache.slots + row), position);
      r.cached = segment == 1 ? cache.key(page, head, position) + dim : cache.value(page, head, dim) + position % PAGE_SIZE;
    }
    return r;
  }
  DEVICE void fetch(Ready&, int, int, bool) const {}
  DEVICE void finish(const Ready& r, int row, int segment, int n, float v, bool live) const {
    const float partner = shuffle_xor(v, 1);
    if (!live) return;
    if (segment < 2) v = rotate(v, partner, r.rotation);
    if (segment == 0) q[(u64)row * N0 + n] = v;
    else *r.cached = float_to_half(v);
  }
};
#elif EPILOGUE == RESIDUAL
struct Ready { float gain, residual; };
struct Epilogue {
  Rows x;             // the residual stream
  const float* gain;  // of the next norm
  DEVICE Ready prepare(int, int, int n, bool live) const { return {live ? gain[n] : 0.f, 0.f}; }
  DEVICE void fetch(Ready& r, int row, int n, bool live) const {
    if (live) r.residual = load_fresh(x.row<N0>(row).values + n);
  }
  DEVICE void finish(const Ready& ready, int row, int, int n, float v, bool live) const {
    const Row r = x.row<N0>(row);
    v = live ? v + ready.residual : 0.f;
    if (live) r.values[n] = v;
    store_group(r, n, v, ready.gain, live);
  }
};
#elif EPILOGUE == PRODUCT
struct Ready {};
struct Epilogue {
  Rows hidden;
  DEVICE Ready prepare(int, int, int, bool) const { return {}; }
  DEVICE void fetch(Ready&, int, int, bool) const {}
  DEVICE void finish(const Ready&, int row, int n, float gate, float up, bool live) const {
    float v;
    if (ACTIVATION == SILU) v = gate / (1.f + expf(-gate)) * up;
    else v = 0.5f * gate * (1.f + tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate))) * up;
    const Row r = hidden.row<N0>(row);
    if (live && r.values) r.values[n] = v;
    store_group(r, n, live ? v : 0.f, 1.f, live);
  }
};
#endif
