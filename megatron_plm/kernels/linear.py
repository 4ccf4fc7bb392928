"""The linear map y = x Wᵀ + b, through oneDNN where that is faster.

torch's fp32 linear on the CPU calls MKL, which leaves the 512-bit units of other makers' processors idle: 190 GFLOP/s
against oneDNN's 270 to 430 on two cores of an AMD EPYC (docs/performance.md). torch carries oneDNN's as an op of its
own compiler. The reference is `torch.nn.functional.linear`, which runs everywhere else: on other devices, in other
dtypes, for sharded tensors, and where torch was built without oneDNN.

Shapes: x [..., K], W [N, K], b [N], y [..., N].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_plm.kernels import cpu

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`torch.nn.Linear` with this file's `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear(x, weight, bias)`, equal to it up to the order of additions; differentiable once."""
    # torch.compile chooses among the libraries itself.
    plain = _HAS_ONEDNN and not torch.compiler.is_compiling() and _is_plain_fp32(x) and _is_plain_fp32(weight)
    if not (plain and x.numel()):
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x, weight, bias)


def linear_path(device: torch.device, dtype: torch.dtype, *, cut: bool = False, compiled: bool = False) -> str:
    """In words, what computes the linear maps over `dtype` on `device` in training, and why not what is faster.

    `cut`: tensor parallelism shares the matrices of the blocks out; `compiled`: torch.compile has made the blocks.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return "torch"
    if not _HAS_ONEDNN:
        return "torch (slower: this build has no oneDNN)"
    # FSDP2 hands plain tensors to the modules, whatever it keeps between steps.
    if compiled:
        return "torch.compile's choice in the blocks, oneDNN in the head, in float32"
    if cut:
        return "torch in the blocks (slower: oneDNN's op knows no shared-out matrices), oneDNN in the head, in float32"
    return "oneDNN, in float32" + ("" if cpu.compiled else " (slower: csrc/cpu was not built)")


def _is_plain_fp32(tensor: Tensor) -> bool:
    # A parameter or a tensor, but no DTensor and no other subclass, whose layout the op would not know.
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and type(tensor) in (Tensor, nn.Parameter)


def _matmul_transposed(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a bᵀ + bias, [M, N]."""
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _matmul_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (dy,) = gradients
        dy_TN, x_TK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = _matmul_transposed(dy_TN, weight.t()).view(x.shape) if needs_x else None
        needs_bias = ctx.has_bias and needs_bias
        if not needs_weight:
            return dx, None, dy_TN.sum(0) if needs_bias else None
        # oneDNN would make a copy of the first itself, in one thread; of the second it needs none.
        dy_NT, dbias = transposed(dy_TN, with_sums=needs_bias)
        return dx, _matmul_transposed(dy_NT, x_TK.t()), dbias


def transposed(x_MN: Tensor, *, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """x with rows and columns exchanged, [N, M] and contiguous, and on request the sums of its columns, [N]. On the CPU
    in float32 that is one pass of csrc/cpu, in all threads."""
    if not (_is_plain_fp32(x_MN) and cpu.has_cpu_kernels(x_MN.device, x_MN.dtype)):
        return x_MN.t().contiguous(), x_MN.sum(0) if with_sums else None
    x_MN = x_MN.contiguous()
    M, N = x_MN.shape
    out_NM, sums_N = x_MN.new_empty(N, M), x_MN.new_empty(N if with_sums else 0)
    cpu.compiled.transpose(
        matrix=x_MN.data_ptr(),
        rows=M,
        columns=N,
        to=out_NM.data_ptr(),
        sums=sums_N.data_ptr() if with_sums else 0,
        threads=torch.get_num_threads(),
    )
    return out_NM, sums_N if with_sums else None
