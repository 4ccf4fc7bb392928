// The kernels of dropout + sum + norm: a warp or a block a row, the row in registers.
#pragma once

#include "device.cuh"
#include "norm.h"

namespace megatron_plm {

constexpr int kRowsOfWarps = 4;  // rows of a block whose rows are a warp's

template <typename T>
struct Forward {
  const T *x, *residual, *weight, *bias;
  const int64_t* keys;
  T *total, *normed;
  float *mean, *r;
  int64_t rows;
  int width;
  float eps;
  Dropout dropout;
};

template <typename T>
struct Backward {
  const T *grad_total, *grad, *total, *weight;
  const float *mean, *r;
  const int64_t* keys;
  T *ds, *dx;
  float* partials;  // [blocks, 2, width]: of the weight, of the bias
  int64_t rows;
  int width;
  Dropout dropout;
};

// The sum over the threads of one row, for all of them. kWarps > 1: the row is the block's, all threads take part.
template <int kWarps>
__device__ float row_sum(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  if constexpr (kWarps > 1) {
    __shared__ float sums[kWarps];
    __syncthreads();  // of the sum before, all have read
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) value += sums[warp];
  }
  return value;
}

template <typename T, int kSize, int kChunks, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? kRowsOfWarps* kWarp : kWarps* kWarp) forward_kernel(Forward<T> of) {
  constexpr int kThreads = kWarps * kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  if (row >= of.rows) return;  // a whole warp, where a row is a warp's
  const int64_t at = row * of.width;
  Share<kSize, kChunks> share{static_cast<int>(threadIdx.x % kThreads), kThreads, of.width, {}};
  const uint32_t key = of.keys ? static_cast<uint32_t>(of.keys[row]) : 0u;
  const float sum = add_branch(share, of.x + at, of.residual + at, of.total + at, of.dropout, key);
  const float mean = of.mean ? row_sum<kWarps>(sum) / of.width : 0.0f;
  const float r = rsqrtf(row_sum<kWarps>(squared_distance(share, mean)) / of.width + of.eps);
  write_normed(share, mean, r, of.weight, of.bias, of.normed + at);
  if (share.thread == 0) {
    if (of.mean) of.mean[row] = mean;
    of.r[row] = r;
  }
}

template <typename T, int kSize, int kChunks, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? kRowsOfWarps* kWarp : kWarps* kWarp) backward_kernel(Backward<T> of) {
  constexpr int kThreads = kWarps * kWarp;
  const int groups = blockDim.x / kThreads, group = threadIdx.x / kThreads;
  Share<kSize, kChunks> normed{static_cast<int>(threadIdx.x % kThreads), kThreads, of.width, {}};
  Share<kSize, kChunks> scaled = normed;
  float weight_sums[kChunks][kSize] = {}, bias_sums[kChunks][kSize] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * groups + group; row < of.rows;
       row += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t at = row * of.width;
    const float r = of.r[row], mean = of.mean ? of.mean[row] : 0.0f;
    TwoSums means = read_gradient(normed, scaled, of.grad + at, of.total + at, of.weight, mean, r, weight_sums,
                                  bias_sums);
    means.first = row_sum<kWarps>(means.first) / of.width;
    means.second = of.mean ? row_sum<kWarps>(means.second) / of.width : 0.0f;
    write_gradient(normed, scaled, means, r, of.grad_total ? of.grad_total + at : nullptr, of.ds + at,
                   of.dx ? of.dx + at : nullptr, of.dropout, of.keys ? static_cast<uint32_t>(of.keys[row]) : 0u);
  }
  // The rows' groups add up in shared memory, [groups, 2, width], then the block writes its part.
  DYNAMIC_SHARED(shared);
  float* const own = shared + static_cast<int64_t>(group) * 2 * of.width;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int begin = normed.begin(c);
    if (begin >= of.width) break;
    for (int i = 0; i < kSize; ++i) {
      own[begin + i] = weight_sums[c][i];
      own[of.width + begin + i] = bias_sums[c][i];
    }
  }
  __syncthreads();
  float* const partials = of.partials + static_cast<int64_t>(blockIdx.x) * 2 * of.width;
  for (int column = threadIdx.x; column < 2 * of.width; column += blockDim.x) {
    float sum = 0.0f;
    for (int g = 0; g < groups; ++g) sum += shared[g * 2 * of.width + column];
    partials[column] = sum;
  }
}

template <int kSize, typename T>
__global__ void dropout_add_kernel(const T* x, const T* residual, const int64_t* keys, T* out, int64_t numel,
                                   int64_t width, Dropout dropout) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kSize;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kSize; at < numel; at += step) {
    add_dropped<kSize>(x, residual, keys, out, at, width, dropout);
  }
}

}  // namespace megatron_plm
