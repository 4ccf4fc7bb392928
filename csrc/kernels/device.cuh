// What the kernels share. The .cuh files of kernels name no CUDA header, so that a test can run them on the host with a
// thread for each of CUDA's.
#pragma once

#include "common.h"

#ifdef __CUDACC__
#define DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

namespace megatron_plm {

constexpr int kWarp = 32;

constexpr int kSumRows = 32;

// out[c] = Σ partials[:, c] over rows `stride` apart, always in the same order. A block adds up 32 columns.
template <typename T>
__global__ void sum_partials_kernel(const float* __restrict__ partials, T* __restrict__ out, int num_partials,
                                    int64_t stride, int64_t width) {
  __shared__ float sums[kSumRows][kWarp + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (column < width) {
    for (int row = threadIdx.y; row < num_partials; row += kSumRows) sum += partials[row * stride + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < width) {
    for (int row = 1; row < kSumRows; ++row) sum += sums[row][threadIdx.x];
    out[column] = from_float<T>(sum);
  }
}

}  // namespace megatron_plm
