// The kernels for AVX2.

#include "instructions.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define TILE_ROWS 4

namespace megatron_plm {

namespace {

#include "lanes.h"

#include "attention_kernel.h"
#include "transpose_kernel.h"

}  // namespace

const Kernels kAvx2{&forward, &backward, &transpose_columns};

}  // namespace megatron_plm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
