// What EPILOGUE and ACTIVATION may be (epilogues.cuh, gemm_epilogues.cuh).
#pragma once
#define STORE 0
#define ROTARY 1
#define RESIDUAL 2
#define PRODUCT 3
#define SILU 0
#define GELU_TANH 1
