// The implementations for CUDA tensors of the ops that megatron_plm/kernels defines; shapes and meaning are said there.
// Tensors are contiguous, float32 or bfloat16, all of one dtype; statistics are float32, keys int64.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace megatron_plm {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

Tensor dropout_add(Tensor x, MaybeTensor residual, Tensor keys, double rate, int64_t site);

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm(Tensor x, Tensor residual, Tensor weight, MaybeTensor bias,
                                                            MaybeTensor keys, double rate, int64_t site, double eps,
                                                            bool is_rms);

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm_backward(MaybeTensor grad_total, Tensor grad_normed,
                                                                     Tensor total, Tensor weight, Tensor mean, Tensor r,
                                                                     MaybeTensor keys, double rate, int64_t site,
                                                                     bool is_rms, bool has_bias);

Tensor bias_gelu(Tensor x, MaybeTensor bias, bool by_tanh);
std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, MaybeTensor bias, bool by_tanh);

Tensor bias_swiglu(Tensor x, MaybeTensor bias);
std::tuple<Tensor, Tensor> bias_swiglu_backward(Tensor grad, Tensor x, MaybeTensor bias);

std::tuple<Tensor, Tensor, Tensor> bias_rotary(Tensor qkv, MaybeTensor bias, Tensor cos, Tensor sin);
std::tuple<Tensor, Tensor> bias_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, bool has_bias);

}  // namespace megatron_plm
