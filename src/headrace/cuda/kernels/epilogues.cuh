// What a matvec does with its results. EPILOGUE picks one:
//   STORE     y[row, n], all matrices' outputs side by side; logits are scaled and soft-capped
//             (LOGIT_SCALE, SOFTCAP).
//   ROTARY    q, k, v: rotates q and k (kv_cache.cuh), stores q, writes k and v to the cache.
//   RESIDUAL  x[row, n] += y; quantises x∘gain for the next operation.
//   PRODUCT   activation(gate) × up (ACTIVATION: SILU or GELU_TANH), quantised for the down matmul.
#pragma once
#include "activations.cuh"

#define STORE 0
#define ROTARY 1
#define RESIDUAL 2
#define PRODUCT 3
#define SILU 0
#define GELU_TANH 1

#if EPILOGUE == STORE
struct Epilogue {
  float* y;  // [rows, N0 + N1 + N2]
  DEVICE void finish(int row, int segment, int n, float v, bool live) const {
    if (!live) return;
    v *= LOGIT_SCALE;
    if (SOFTCAP > 0.f) v = SOFTCAP * tanhf(v / SOFTCAP);
    y[(u64)row * (N0 + N1 + N2) + (segment == 0 ? 0 : segment == 1 ? N0 : N0 + N1) + n] = v;
  }
};
#elif EPILOGUE == ROTARY
#include "kv_cache.cuh"
struct Epilogue {
  float* q;  // [rows, N0], rotated
  Cache cache;
  const double* turns;
  DEVICE void finish(int row, int segment, int n, float v, bool live) const {
    const float partner = shuffle_xor(v, 1);
    if (!live) return;
    const int position = load_fresh(cache.positions + row), head = n / HEAD_DIM, dim = n % HEAD_DIM;
    if (segment < 2) v = rotate(v, partner, dim, position, turns);
    if (segment == 0) {
      q[(u64)row * N0 + n] = v;
      return;
    }
    const u64 page = cache.page(load_fresh(cache.slots + row), position);
    if (segment == 1) cache.key(page, head, position)[dim] = float_to_half(v);
    else cache.value(page, head, dim)[position % PAGE_SIZE] = float_to_half(v);
  }
};
#elif EPILOGUE == RESIDUAL
struct Epilogue {
  Rows x;             // the residual stream
  const float* gain;  // of the next norm
  DEVICE void finish(int row, int, int n, float v, bool live) const {
    const Row r = x.row<N0>(row);
    float g = 0.f;
    if (live) {
      v += load_fresh(r.values + n);
      r.values[n] = v;
      g = gain[n];
    }
    store_group(r, n, live ? v : 0.f, g, live);
  }
};
#elif EPILOGUE == PRODUCT
struct Epilogue {
  Rows hidden;
  DEVICE void finish(int row, int n, float gate, float up, bool live) const {
    float v;
    if (ACTIVATION == SILU) v = gate / (1.f + expf(-gate)) * up;
    else v = 0.5f * gate * (1.f + tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate))) * up;
    const Row r = hidden.row<N0>(row);
    if (live && r.values) r.values[n] = v;
    store_group(r, n, live ? v : 0.f, 1.f, live);
  }
};
#endif
