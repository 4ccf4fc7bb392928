// The kernels of bias + activation and of bias + rotary positions: a block a tile of columns and rows.
#pragma once

#include "device.cuh"
#include "rotary.h"

namespace megatron_plm {

constexpr int kLanes = 8;       // rows of a tile that are worked on at once
constexpr int kTileRows = 128;  // of one block; each block of the backward pass leaves one partial sum of its columns

inline __device__ Rows rows_of_thread(int64_t rows) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTileRows;
  return {first + threadIdx.y, kLanes, first + kTileRows < rows ? first + kTileRows : rows};
}

inline __device__ int64_t column_of_thread() { return static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x; }

// The sums of the block's lanes, by its first lane to `partials`, whose columns begin at `column`.
template <int kSize>
__device__ void write_lane_sums(const float (&sums)[kSize], float* partials, int64_t column, bool inside) {
  __shared__ float shared[kLanes][kWarp * kSize];
  __syncthreads();  // of what was written before, all have read
  for (int i = 0; i < kSize; ++i) shared[threadIdx.y][threadIdx.x * kSize + i] = sums[i];
  __syncthreads();
  if (threadIdx.y > 0 || !inside) return;
  for (int i = 0; i < kSize; ++i) {
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += shared[lane][threadIdx.x * kSize + i];
    partials[column + i] = sum;
  }
}

template <class Activation, int kSize, typename T>
__global__ void activate_kernel(const T* x, const T* bias, T* y, int64_t rows, int64_t width) {
  const int64_t column = column_of_thread() * kSize;
  if (column < width) activate<Activation, kSize>(x, bias, y, width, column, rows_of_thread(rows));
}

template <class Activation, int kSize, typename T>
__global__ void activate_backward_kernel(const T* grad, const T* x, const T* bias, T* dx, float* partials, int64_t rows,
                                         int64_t width) {
  const int64_t column = column_of_thread() * kSize;
  float sums[kSize] = {};
  if (column < width) {
    activate_backward<Activation, kSize>(grad, x, bias, dx, sums, width, column, rows_of_thread(rows));
  }
  if (partials) write_lane_sums(sums, partials + blockIdx.y * width, column, column < width);
}

template <typename T>
struct Joint {
  const T *qkv, *bias, *cos, *sin;
  T* out[3];
  int64_t rows, heads, head_size;
};

template <typename T>
struct JointGradient {
  const T *grads[3], *cos, *sin;
  T* dqkv;
  float* partials;
  int64_t rows, heads, head_size;
};

template <int kSize, typename T>
__global__ void turn_kernel(Joint<T> of) {
  const int64_t pair = column_of_thread() * kSize;
  if (pair >= of.heads * 3 * of.head_size / 2) return;
  turn<kSize>(of.qkv, of.bias, of.cos, of.sin, of.out, of.heads, of.head_size, pair, rows_of_thread(of.rows));
}

template <int kSize, typename T>
__global__ void turn_back_kernel(JointGradient<T> of) {
  const int64_t pair = column_of_thread() * kSize;
  const bool inside = pair < of.heads * 3 * of.head_size / 2;
  float sums_a[kSize] = {}, sums_b[kSize] = {};
  if (inside) {
    turn_back<kSize>(of.grads, of.cos, of.sin, of.dqkv, sums_a, sums_b, of.heads, of.head_size, pair,
                     rows_of_thread(of.rows));
  }
  if (!of.partials) return;
  const Place place(pair, of.head_size);
  float* const partials = of.partials + blockIdx.y * 3 * of.heads * of.head_size;
  write_lane_sums(sums_a, partials, place.joint(), inside);
  write_lane_sums(sums_b, partials, place.joint() + place.half, inside);
}

}  // namespace megatron_plm
