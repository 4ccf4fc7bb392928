// Gives the ops of megatron_plm/kernels, which Python defines, their implementations for CUDA tensors. Built against
// torch's stable ABI: one library serves torch 2.11 and later.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(megatron_plm, CUDA, library) {
  library.impl("dropout_add", TORCH_BOX(&megatron_plm::dropout_add));
  library.impl("dropout_add_norm", TORCH_BOX(&megatron_plm::dropout_add_norm));
  library.impl("dropout_add_norm_backward", TORCH_BOX(&megatron_plm::dropout_add_norm_backward));
  library.impl("bias_gelu", TORCH_BOX(&megatron_plm::bias_gelu));
  library.impl("bias_gelu_backward", TORCH_BOX(&megatron_plm::bias_gelu_backward));
  library.impl("bias_swiglu", TORCH_BOX(&megatron_plm::bias_swiglu));
  library.impl("bias_swiglu_backward", TORCH_BOX(&megatron_plm::bias_swiglu_backward));
  library.impl("bias_rotary", TORCH_BOX(&megatron_plm::bias_rotary));
  library.impl("bias_rotary_backward", TORCH_BOX(&megatron_plm::bias_rotary_backward));
}
