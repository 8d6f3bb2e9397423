// What gemm does with its results: the epilogues of epilogues.cuh, for four neighbouring outputs of a row at once,
// since a prompt has many. Activations are written as bfloat16; nothing that reads int8 follows.
//
//   STORE, RESIDUAL  as there.
//   ROTARY           with the angles of the rows in a table (rotations.cu): all heads turn by the same.
//   PRODUCT          from the sums themselves: gate and up of an output are one lane's.
//
// Ready holds what an output needs from memory: fetch() for several outputs comes before the finish() of the first.
#pragma once
#include "activations.cuh"
#include "epilogue_names.cuh"

// Four floats, of which the first `count` exist. ALIGNED: four lie on a boundary of 16 bytes.
template <bool ALIGNED> DEVICE void store4(float* p, const float4& v, int count) {
  if (ALIGNED && count == 4) { *(float4*)p = v; return; }
  const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) p[i] = values[i];
}

#if EPILOGUE == STORE
struct Where {};
struct Ready {};
struct Epilogue {
  float* y;  // [rows, N0 + N1 + N2]
  DEVICE Where where(int) const { return {}; }
  DEVICE Ready fetch(const Where&, int, int, int, int) const { return {}; }
  DEVICE float one(float v) const {
    v *= LOGIT_SCALE;
    return SOFTCAP > 0.f ? SOFTCAP * tanhf(v / SOFTCAP) : v;
  }
  DEVICE void finish(const Ready&, int row, int segment, int n, float4 v, int count) const {
    constexpr int N = N0 + N1 + N2;
    float* to = y + (u64)row * N + (segment == 0 ? 0 : segment == 1 ? N0 : N0 + N1) + n;
    store4<N % 4 == 0 && N0 % 4 == 0 && N1 % 4 == 0>(to, make_float4(one(v.x), one(v.y), one(v.z), one(v.w)), count);
  }
};
#elif EPILOGUE == ROTARY
#include "kv_cache.cuh"
struct Where { int page, position; };  // of a row in the cache
struct Ready {
  float4 turn;  // cosine and sine of two pairs
  Spot spot;    // where k or v goes
};
struct Epilogue {
  float* q;  // [rows, N0], rotated
  Cache cache;
  const float* rotations;  // [rows, ROPE_DIM / 2, cosine and sine]
  DEVICE Where where(int row) const {
    const int position = load_fresh(cache.positions + row);
    return {(int)cache.page(load_fresh(cache.slots + row), position), position};
  }
  DEVICE Ready fetch(const Where& w, int row, int segment, int n, int count) const {
    const int head = n / HEAD_DIM, dim = n % HEAD_DIM;
    Ready r = {make_float4(1.f, 0.f, 1.f, 0.f), {}};
    if (!count) return r;
    if (segment < 2 && dim < ROPE_DIM) r.turn = load_fresh((const float4*)(rotations + (u64)row * ROPE_DIM + dim));
    if (segment == 1) r.spot = cache.key_spot(w.page, head, w.position, dim);
    if (segment == 2) r.spot = cache.value_spot(w.page, head, w.position, dim);
    return r;
  }
  DEVICE void finish(const Ready& r, int row, int segment, int n, float4 v, int count) const {
    if (segment < 2)
      v = make_float4(fmaf(v.x, r.turn.x, -v.y * r.turn.y), fmaf(v.y, r.turn.x, v.x * r.turn.y),
                      fmaf(v.z, r.turn.z, -v.w * r.turn.w), fmaf(v.w, r.turn.z, v.z * r.turn.w));
    if (count && segment == 0) *(float4*)(q + (u64)row * N0 + n) = v;
    store_cached(r.spot, segment == 1 ? 1 : PAGE_SIZE, {v.x, v.y, v.z, v.w}, n % CACHE_GROUP == 0, count && segment > 0);
  }
};
#elif EPILOGUE == RESIDUAL
struct Where {};
struct Ready { float4 gain, residual; };
struct Epilogue {
  Rows x;             // the residual stream
  const float* gain;  // of the next norm
  DEVICE Where where(int) const { return {}; }
  DEVICE Ready fetch(const Where&, int row, int, int n, int count) const {
    const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
    if (!count) return {none, none};
    return {*(const float4*)(gain + n), load_fresh((const float4*)(x.row<N0>(row).values + n))};
  }
  DEVICE void finish(const Ready& r, int row, int, int n, float4 v, int count) const {  // four lanes have sixteen outputs
    v = make_float4(v.x + r.residual.x, v.y + r.residual.y, v.z + r.residual.z, v.w + r.residual.w);
    float squares = v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    squares += shuffle_xor(squares, 1);
    squares += shuffle_xor(squares, 2);
    if (!count) return;
    const Row to = x.row<N0>(row);
    *(float4*)(to.values + n) = v;
    *(u32*)to.brain_at(n) = pack_brain2(v.x * r.gain.x, v.y * r.gain.y);
    *(u32*)to.brain_at(n + 2) = pack_brain2(v.z * r.gain.z, v.w * r.gain.w);
    if (to.squares && n % GROUP == 0) to.squares[n / GROUP] = squares;
  }
};
#elif EPILOGUE == PRODUCT
struct Where {};
struct Epilogue {
  Rows hidden;
  DEVICE Where where(int) const { return {}; }
  DEVICE void finish(int row, int n, const float4& gate, const float4& up) const {
    const Row to = hidden.row<N0>(row);
    *(u32*)to.brain_at(n) = pack_brain2(activated(gate.x, up.x), activated(gate.y, up.y));
    *(u32*)to.brain_at(n + 2) = pack_brain2(activated(gate.z, up.z), activated(gate.w, up.w));
  }
};
#endif
