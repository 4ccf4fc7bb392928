"""The activations of the MLP with the bias of the linear map before them: `bias_gelu` and `bias_swiglu`.

With u = x + b, φ and Φ the density and the distribution function of the normal distribution and σ the logistic one:

    exact GELU  y = u · Φ(u);                        ∂y/∂u = Φ(u) + u · φ(u)
    by tanh     y = u/2 · (1 + t), t = tanh(z), z = √(2/π) · (u + 0.044715 u³);
                ∂y/∂u = (1 + t)/2 + u/2 · (1 − t²) · √(2/π) · (1 + 0.134145 u²)
    SwiGLU      y = silu(g) · v, silu(g) = g · σ(g), of each pair (g, v);
                ∂y/∂v = silu(g), ∂y/∂g = v · σ(g) · (1 + g · (1 − σ(g)))

∂b is the sum of ∂u over the tokens. Arithmetic is fp32 (float64 where the input is).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_plm.kernels.library import column_sums, wide

_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: str = "none") -> Tensor:
    """gelu(x + bias), exact ("none") or by "tanh". x: [..., F]; bias: [F] of its dtype. Differentiable once."""
    assert approximate in ("none", "tanh"), approximate
    result: Tensor = _bias_gelu(x.contiguous(), bias, approximate == "tanh")
    return result


def bias_swiglu(x: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) · value of x + bias, whose last dim is ordered [feature, (gate, value)]; Shazeer 2020,
    arXiv:2002.05202.

    x: [..., 2F]; bias: [2F] of its dtype; returns [..., F]. Differentiable once.
    """
    result: Tensor = _bias_swiglu(x.contiguous(), bias)
    return result


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return wide(x) if bias is None else wide(x) + wide(bias)


def _gradients(du: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """∂x, and ∂b (no values without a bias)."""
    return du.to(x.dtype), x.new_empty(0) if bias is None else column_sums(du, bias.dtype)


def _empty_gradients(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


@torch.library.custom_op(
    "megatron_plm::bias_gelu", mutates_args=(), schema="(Tensor x, Tensor? bias, bool by_tanh) -> Tensor"
)
def _bias_gelu(x: Tensor, bias: Tensor | None, by_tanh: bool) -> Tensor:
    return F.gelu(_biased(x, bias), approximate="tanh" if by_tanh else "none").to(x.dtype)


_bias_gelu.register_fake(lambda x, *_: x.new_empty(x.shape))


@torch.library.custom_op(
    "megatron_plm::bias_gelu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? bias, bool by_tanh) -> (Tensor, Tensor)",
)
def _bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, by_tanh: bool) -> tuple[Tensor, Tensor]:
    u = _biased(x, bias)
    if by_tanh:
        t = torch.tanh(_TANH_SCALE * (u + _TANH_CUBIC * u**3))
        slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBIC * u * u)
    else:
        slope = 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    return _gradients(wide(grad) * slope, x, bias)


_bias_gelu_backward.register_fake(lambda _, x, bias, *__: _empty_gradients(x, bias))


@torch.library.custom_op("megatron_plm::bias_swiglu", mutates_args=(), schema="(Tensor x, Tensor? bias) -> Tensor")
def _bias_swiglu(x: Tensor, bias: Tensor | None) -> Tensor:
    gate, value = _biased(x, bias).unflatten(-1, (-1, 2)).unbind(-1)
    return (F.silu(gate) * value).to(x.dtype)


_bias_swiglu.register_fake(lambda x, *_: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))


@torch.library.custom_op(
    "megatron_plm::bias_swiglu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
)
def _bias_swiglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    gate, value = _biased(x, bias).unflatten(-1, (-1, 2)).unbind(-1)
    sigmoid, dy = gate.sigmoid(), wide(grad)
    dgate = dy * value * sigmoid * (1 + gate * (1 - sigmoid))
    return _gradients(torch.stack([dgate, dy * gate * sigmoid], dim=-1).flatten(-2), x, bias)


_bias_swiglu_backward.register_fake(lambda _, x, bias: _empty_gradients(x, bias))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]  # noqa: ARG001
    x, bias, *ctx.by_tanh = inputs  # a SwiGLU has no such argument
    ctx.save_for_backward(x, bias)


def _backward_by(op):  # type: ignore[no-untyped-def]
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, bias = ctx.saved_tensors
        dx, dbias = op(grad.contiguous(), x, bias, *ctx.by_tanh)
        return dx, None if bias is None else dbias, *(None for _ in ctx.by_tanh)

    return backward


_bias_gelu.register_autograd(_backward_by(_bias_gelu_backward), setup_context=_setup)
_bias_swiglu.register_autograd(_backward_by(_bias_swiglu_backward), setup_context=_setup)
