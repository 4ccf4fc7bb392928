"""Dropout as a pure function of (token, feature, site), and `dropout_add`, the op that adds its result to a residual.

torch's own dropout draws from one stream in the order in which calls come. This one is the same however the tokens are
laid out over processes, and again when the backward pass recomputes it: value j of a token is dropped where
h(key ⊕ h((j + 1) ⊕ site · 2^20)) < rate · 2^32, with the 32-bit hash `mixed` as h. What is kept is divided by 1 − rate.
"""

import torch
from torch import Tensor

from megatron_plm.kernels.library import wide

LOW = 0xFFFFFFFF


def mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, in int64, that leaves no pattern: lowbias32 of Wellons's search among such
    functions (github.com/skeeto/hash-prospector)."""
    x = (x ^ x >> 16) * 0x7FEB352D & LOW
    x = (x ^ x >> 15) * (0x846CA68B - 2**32) & LOW  # the same modulo 2^32, and no product leaves int64
    return x ^ x >> 16


def dropout(x: Tensor, keys: Tensor | None, rate: float, site: int) -> Tensor:
    """Drop values of `x` [..., D] by the tokens' keys, int64 [...] below 2^32; rate 0 needs no keys and drops none.

    `site` tells those with the same keys apart.
    """
    if rate == 0:
        return x
    assert keys is not None, "dropout needs the tokens' keys"
    features_D = mixed(torch.arange(1, x.shape[-1] + 1, device=x.device) ^ (site << 20))
    drawn = mixed(keys.unsqueeze(-1) ^ features_D)
    return x.masked_fill(drawn < int(rate * 2**32), 0.0) / (1 - rate)


def dropout_add(x: Tensor, residual: Tensor, keys: Tensor | None, *, rate: float, site: int) -> Tensor:
    """residual + dropout(x), added in fp32 and rounded once.

    x, residual: [..., D] of one dtype; keys: int64 [...], needed where `rate` is above 0. Differentiable once. The
    gradient of the residual is that of the sum; that of x is its dropout, with the same keys.
    """
    if rate == 0:
        return residual + x  # nothing to fuse
    assert keys is not None, "dropout needs the tokens' keys"
    result: Tensor = _dropout_add(x.contiguous(), residual.contiguous(), keys.contiguous(), rate, site)
    return result


@torch.library.custom_op(
    "megatron_plm::dropout_add",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor keys, float rate, int site) -> Tensor",
)
def _dropout_add(x: Tensor, residual: Tensor | None, keys: Tensor, rate: float, site: int) -> Tensor:
    dropped = dropout(wide(x), keys, rate, site)
    return (dropped if residual is None else wide(residual) + dropped).to(x.dtype)


_dropout_add.register_fake(lambda x, *_: x.new_empty(x.shape))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]  # noqa: ARG001
    _, _, keys, ctx.rate, ctx.site = inputs
    ctx.save_for_backward(keys)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (keys,) = ctx.saved_tensors
    needs_x, needs_residual, *_ = ctx.needs_input_grad
    grad_x = _dropout_add(grad.contiguous(), None, keys, ctx.rate, ctx.site) if needs_x else None
    return grad_x, grad if needs_residual else None, None, None, None


_dropout_add.register_autograd(_backward, setup_context=_setup)
