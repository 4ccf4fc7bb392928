// The kernels for AVX-512.

#include "instructions.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define LANES 16
#define TILE_ROWS 8

namespace megatron_plm {

namespace {

#include "lanes.h"

#include "attention_kernel.h"
#include "transpose_kernel.h"

}  // namespace

const Kernels kAvx512{&forward, &backward, &transpose_columns};

}  // namespace megatron_plm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
