// What EPILOGUE and ACTIVATION may be (epilogues.cuh, gemm_epilogues.cuh).
#pragma once
#include "primitives.cuh"

#define STORE 0
#define ROTARY 1
#define RESIDUAL 2
#define PRODUCT 3
#define SILU 0
#define GELU_TANH 1

#ifdef ACTIVATION
// activation(gate) × up. Both activations are gate × sigmoid(z). What follows rounds to bfloat16 or int8.
DEVICE float activated(float gate, float up) {
  const float z = ACTIVATION == SILU ? gate : 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
  return divide_near(gate * up, 1.f + exp2_near(fminf(-1.4426950408889634f * z, 126.f)));
}
#endif
