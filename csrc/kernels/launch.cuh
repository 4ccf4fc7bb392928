// What every op does around its kernels: checks, types, streams, and the sum of partial sums.
#pragma once

#include <algorithm>
#include <initializer_list>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "device.cuh"
#include "ops.h"

namespace megatron_plm {

using torch::headeronly::ScalarType;

inline void check(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than it should have");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " values, and should have ", numel);
}

inline void check(const MaybeTensor& tensor, ScalarType dtype, int64_t numel, const char* name) {
  if (tensor) check(*tensor, dtype, numel, name);
}

// Runs `body` with a null pointer of the type that stands for `dtype`.
template <class Body>
void with_type(ScalarType dtype, Body body) {
  if (dtype == ScalarType::BFloat16) {
    body(static_cast<Bf16*>(nullptr));
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Float, "the CUDA kernels are for float32 and bfloat16 only");
    body(static_cast<float*>(nullptr));
  }
}

template <typename T>
const T* values(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* values(const MaybeTensor& tensor) {
  return tensor ? values<T>(*tensor) : nullptr;
}

template <typename T>
T* written(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline bool is_aligned(std::initializer_list<const void*> pointers, size_t bytes) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [bytes](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; });
}

// The device of a tensor as the current one, and its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

template <typename T>
void sum_partials(const float* partials, T* out, int64_t num_partials, int64_t stride, int64_t width,
                  cudaStream_t stream) {
  sum_partials_kernel<T><<<static_cast<unsigned>((width + kWarp - 1) / kWarp), dim3(kWarp, kSumRows), 0, stream>>>(
      partials, out, static_cast<int>(num_partials), stride, width);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megatron_plm
