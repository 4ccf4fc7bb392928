"""`dropout_add_norm`: a branch's dropout, its sum with the residual stream, and the norm of the sum, in one pass.

With s the sum, D features, g the gradient of the normalized output and w the weight:

    LayerNorm  n = (s − mean(s)) · r, r = (mean((s − mean(s))²) + ε)^-½;   RMSNorm  n = s · r, r = (mean(s²) + ε)^-½
    output = n · w + b;   ∂w = Σ g · n, ∂b = Σ g over tokens
    ∂s = r · (g·w − n · mean(g·w·n) − mean(g·w)) + the gradient of the sum itself, without the last mean for RMSNorm
    ∂residual = ∂s;   ∂x = dropout(∂s)

Statistics, sums and arithmetic are fp32 (float64 where the input is); the sum is rounded to the input's dtype before
the norm reads it, as what is added and what is normalized must be the same.
"""

import torch
from torch import Tensor

from megatron_plm.kernels.dropout import dropout
from megatron_plm.kernels.library import column_sums, wide

NORMS = ("LayerNorm", "RMSNorm")


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    *,
    rate: float,
    site: int,
    eps: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """s = residual + dropout(x), and norm(s): two tensors of the shape of x. Differentiable once.

    x, residual: [..., D]; weight, bias: [D], all of one dtype. keys: int64 [...], those of `dropout.dropout`, needed
    where `rate` is above 0. kind: one of NORMS; an RMSNorm has no bias.
    """
    assert kind in NORMS, kind
    assert bias is None or kind == "LayerNorm", "an RMSNorm has no bias"
    assert keys is not None or rate == 0, "dropout needs the tokens' keys"
    given = None if keys is None or rate == 0 else keys.contiguous()
    total, normed, _, _ = _dropout_add_norm(
        x.contiguous(), residual.contiguous(), weight, bias, given, rate, site, eps, kind == "RMSNorm"
    )
    return total, normed


@torch.library.custom_op(
    "megatron_plm::dropout_add_norm",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? keys, float rate, int site, float eps, "
        "bool is_rms) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
    rate: float,
    site: int,
    eps: float,
    is_rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Also gives the mean (of an RMSNorm: no values) and r, both [...] in the type of the arithmetic."""
    total = (wide(residual) + dropout(wide(x), keys, rate, site)).to(x.dtype)
    centred = wide(total)
    mean = centred.new_empty(0) if is_rms else centred.mean(-1)
    if not is_rms:
        centred = centred - mean.unsqueeze(-1)
    r = (centred.square().mean(-1) + eps).rsqrt()
    normed = centred * r.unsqueeze(-1) * wide(weight)
    if bias is not None:
        normed = normed + wide(bias)
    return total, normed.to(x.dtype), mean, r


@_dropout_add_norm.register_fake
def _(x, *others):  # type: ignore[no-untyped-def]
    is_rms = others[-1]
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(0 if is_rms else x.shape[:-1], dtype=statistics)
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, x.new_empty(x.shape[:-1], dtype=statistics)


@torch.library.custom_op(
    "megatron_plm::dropout_add_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor? grad_total, Tensor grad_normed, Tensor total, Tensor weight, Tensor mean, Tensor r, Tensor? keys, "
        "float rate, int site, bool is_rms, bool has_bias) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _dropout_add_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    r: Tensor,
    keys: Tensor | None,
    rate: float,
    site: int,
    is_rms: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂s, ∂x (no values where nothing is dropped: it is ∂s), ∂w and ∂b (no values without a bias)."""
    n = (wide(total) if is_rms else wide(total) - mean.unsqueeze(-1)) * r.unsqueeze(-1)
    grad = wide(grad_normed)
    scaled = grad * wide(weight)
    inner = scaled - n * (scaled * n).mean(-1, keepdim=True)
    if not is_rms:
        inner = inner - scaled.mean(-1, keepdim=True)
    ds = inner * r.unsqueeze(-1)
    if grad_total is not None:
        ds = ds + wide(grad_total)
    # Of the gradient that the residual gets, rounded: the two ways to ∂x, with dropout and without, are one.
    ds = ds.to(total.dtype)
    dx = total.new_empty(0) if rate == 0 else dropout(wide(ds), keys, rate, site).to(total.dtype)
    dbias = column_sums(grad, weight.dtype) if has_bias else weight.new_empty(0)
    return ds, dx, column_sums(grad * n, weight.dtype), dbias


@_dropout_add_norm_backward.register_fake
def _(*given):  # type: ignore[no-untyped-def]
    _, _, total, weight, _, _, _, rate, _, _, has_bias = given
    dx = total.new_empty(0 if rate == 0 else total.shape)
    return (
        total.new_empty(total.shape),
        dx,
        weight.new_empty(weight.shape),
        weight.new_empty(len(weight) if has_bias else 0),
    )


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, weight, bias, keys, ctx.rate, ctx.site, _, ctx.is_rms = inputs
    total, _, mean, r = output
    ctx.has_bias = bias is not None
    ctx.save_for_backward(total, weight, mean, r, keys)
    ctx.mark_non_differentiable(mean, r)
    ctx.set_materialize_grads(False)  # behind the sum a post-LN block has a norm and nothing else


def _backward(ctx, grad_total, grad_normed, *_):  # type: ignore[no-untyped-def]
    total, weight, mean, r, keys = ctx.saved_tensors
    grad_normed = torch.zeros_like(total) if grad_normed is None else grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    ds, dx, dweight, dbias = _dropout_add_norm_backward(
        grad_total, grad_normed, total, weight, mean, r, keys, ctx.rate, ctx.site, ctx.is_rms, ctx.has_bias
    )
    return ds if ctx.rate == 0 else dx, ds, dweight, dbias if ctx.has_bias else None, None, None, None, None, None


_dropout_add_norm.register_autograd(_backward, setup_context=_setup)
