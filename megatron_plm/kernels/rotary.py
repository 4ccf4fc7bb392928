"""Rotary positions, and `bias_rotary`: the bias of the joint map to queries, keys and values, and the rotation, in one
pass that leaves three tensors of their own. On the CPU in float32 that is a kernel of csrc/cpu.

Pairs (i, i + H/2) of each head are rotated by their token's angles (Su et al. 2021, arXiv:2104.09864):

    a' = a · cos_i − b · sin_i,   b' = b · cos_{i + H/2} + a · sin_{i + H/2}
    ∂a = ∂a' · cos_i + ∂b' · sin_{i + H/2},   ∂b = ∂b' · cos_{i + H/2} − ∂a' · sin_i

Shapes: T packed tokens, N heads, H head size.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_plm.kernels import cpu
from megatron_plm.kernels.library import column_sums, wide


def rotate(x_TNKH: Tensor, cos_T11H: Tensor, sin_T11H: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of each head by its token's angles; K runs over query and key."""
    first, second = x_TNKH.chunk(2, dim=-1)
    return x_TNKH * cos_T11H + torch.cat([-second, first], dim=-1) * sin_T11H


def bias_rotary(qkv_TN3H: Tensor, bias: Tensor | None, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys and plain values of qkv + bias, each [T, N, H] and contiguous, so that nothing keeps
    the input alive. Differentiable once, in qkv and bias.

    qkv: [T, N, 3, H] with H even; bias: [N · 3 · H]; cos, sin: [T, H]; all of one dtype. Arithmetic is fp32 (float64
    where the input is).
    """
    q, k, v = _bias_rotary(qkv_TN3H.contiguous(), bias, cos_TH.contiguous(), sin_TH.contiguous())
    return q, k, v


def rotated(qkv_TN3H: Tensor, cos_T11H: Tensor, sin_T11H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys and plain values, each [T, N, H]: by `bias_rotary` where the CPU has a kernel for it."""
    if cpu.has_cpu_kernels(qkv_TN3H.device, qkv_TN3H.dtype):
        return bias_rotary(qkv_TN3H, None, cos_T11H.flatten(0, 2), sin_T11H.flatten(0, 2))
    qk_TN2H, v_TN1H = qkv_TN3H.split([2, 1], dim=2)  # not by two slices: the gradient of each would be a whole qkv
    q_TNH, k_TNH = rotate(qk_TN2H, cos_T11H, sin_T11H).unbind(2)
    return q_TNH, k_TNH, v_TN1H.squeeze(2)


def _reference(qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u = wide(qkv) if bias is None else wide(qkv) + wide(bias).view(qkv.shape[1:])
    turned = rotate(u[:, :, :2], wide(cos)[:, None, None], wide(sin)[:, None, None]).to(qkv.dtype)
    # Copies, as views into one memory are no results of an op.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in (*turned.unbind(2), u[:, :, 2])]
    q, k, v = (part.to(qkv.dtype) for part in copies)
    return q, k, v


def rotary_path(device: torch.device, dtype: torch.dtype) -> str:
    """In words, what computes `rotated` over `dtype` on `device`."""
    if cpu.has_cpu_kernels(device, dtype):
        return "one pass on the CPU, in float32"
    missing = device.type == "cpu" and dtype == torch.float32
    return "torch (slower: csrc/cpu was not built)" if missing else "torch"


_bias_rotary = torch.library.custom_op(
    "megatron_plm::bias_rotary",
    _reference,
    mutates_args=(),
    schema="(Tensor qkv, Tensor? bias, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)",
)


@_bias_rotary.register_kernel("cpu")
def _(qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not cpu.has_cpu_kernels(qkv.device, qkv.dtype):
        return _reference(qkv, bias, cos, sin)
    q, k, v = _shapes(qkv)
    qkv, cos, sin = (x.contiguous() for x in (qkv, cos, sin))
    if bias is not None:
        assert bias.numel() == qkv.shape[1:].numel(), bias.shape
        assert bias.dtype == torch.float32, bias.dtype
        bias = bias.contiguous()
    cpu.compiled.rotate(
        **_sizes(q, cos, sin),
        qkv=qkv.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
    )
    return q, k, v


@_bias_rotary.register_fake
def _shapes(qkv: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, N, _three, H = qkv.shape
    q, k, v = (qkv.new_empty((T, N, H)) for _ in range(3))
    return q, k, v


def _backward_reference(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """∂qkv [T, N, 3, H] and ∂bias [N · 3 · H], the latter without values where there is no bias."""
    first, second = wide(torch.stack([dq, dk], dim=2)).chunk(2, dim=-1)
    (cos_a, cos_b), (sin_a, sin_b) = (wide(x)[:, None, None].chunk(2, dim=-1) for x in (cos, sin))
    back = torch.cat([first * cos_a + second * sin_b, second * cos_b - first * sin_a], dim=-1)
    du = torch.cat([back, wide(dv).unsqueeze(2)], dim=2)
    dbias = column_sums(du.flatten(1), dq.dtype) if has_bias else dq.new_empty(0)
    return du.to(dq.dtype), dbias


_bias_rotary_backward = torch.library.custom_op(
    "megatron_plm::bias_rotary_backward",
    _backward_reference,
    mutates_args=(),
    schema="(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, bool has_bias) -> (Tensor, Tensor)",
)


@_bias_rotary_backward.register_kernel("cpu")
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    if not cpu.has_cpu_kernels(dq.device, dq.dtype):
        return _backward_reference(dq, dk, dv, cos, sin, has_bias)
    T, N, H = dq.shape
    assert dk.shape == dv.shape == dq.shape
    assert dk.dtype == dv.dtype == torch.float32, (dk.dtype, dv.dtype)
    dq, dk, dv, cos, sin = (x.contiguous() for x in (dq, dk, dv, cos, sin))
    du = dq.new_empty((T, N, 3, H))
    cpu.compiled.rotate_backward(
        **_sizes(dq, cos, sin), dq=dq.data_ptr(), dk=dk.data_ptr(), dv=dv.data_ptr(), dqkv=du.data_ptr()
    )
    return du, column_sums(du.flatten(1), dq.dtype) if has_bias else dq.new_empty(0)


def _sizes(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> dict[str, int]:
    T, N, H = x_TNH.shape
    assert H % 2 == 0, "a head of pairs"
    assert cos.shape == sin.shape == (T, H), (cos.shape, sin.shape)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    return {"tokens": T, "heads": N, "head_size": H, "cosines": cos.data_ptr(), "sines": sin.data_ptr(),
            "threads": torch.get_num_threads()}  # fmt: skip


@_bias_rotary_backward.register_fake
def _(dq, *others):  # type: ignore[no-untyped-def]
    (T, N, H), has_bias = dq.shape, others[-1]
    return dq.new_empty((T, N, 3, H)), dq.new_empty(3 * N * H if has_bias else 0)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]  # noqa: ARG001
    _, bias, cos, sin = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk, dv):  # type: ignore[no-untyped-def]
    gradients = (grad.contiguous() for grad in (dq, dk, dv))
    dqkv, dbias = _bias_rotary_backward(*gradients, *ctx.saved_tensors, ctx.has_bias)
    return dqkv, dbias if ctx.has_bias else None, None, None


_bias_rotary.register_autograd(_backward, setup_context=_setup)
