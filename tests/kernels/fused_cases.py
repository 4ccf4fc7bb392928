"""The fused ops beside the modules that they stand for, as functions of the tensors that are differentiated."""

import functools

import torch
import torch.nn.functional as F

from megatron_plm.kernels.activation import bias_gelu, bias_swiglu
from megatron_plm.kernels.dropout import dropout, dropout_add
from megatron_plm.kernels.norm import dropout_add_norm
from megatron_plm.kernels.rotary import bias_rotary, rotate

RATE, SITE, EPS = 0.3, 2, 1e-5


def keys_of(shape):
    return torch.randint(0, 2**32, shape)


def angles(tokens, size, dtype):
    return [part(torch.randn(tokens, size)).to(dtype) for part in (torch.cos, torch.sin)]


# Each case: (op, what it stands for, both functions of the differentiable tensors alone; those tensors). What else they
# take is on `device`.


def add_norm_case(shape, dtype, kind="LayerNorm", rate=RATE, with_bias=True, device="cpu"):
    keys, width = keys_of(shape[:-1]).to(device) if rate else None, shape[-1]
    given = [torch.randn(shape), torch.randn(shape), torch.rand(width) + 0.5]
    given += [torch.randn(width)] if with_bias and kind == "LayerNorm" else []

    def op(x, residual, weight, bias=None):
        return dropout_add_norm(x, residual, weight, bias, keys, rate=rate, site=SITE, eps=EPS, kind=kind)

    def plain(x, residual, weight, bias=None):
        total = residual + dropout(x, keys, rate, SITE)
        if kind == "RMSNorm":
            return total, F.rms_norm(total, (width,), weight, EPS)
        return total, F.layer_norm(total, (width,), weight, bias, EPS)

    return op, plain, [value.to(dtype) for value in given]


def add_case(shape, dtype, device="cpu"):
    keys = keys_of(shape[:-1]).to(device)

    def op(x, residual):
        return (dropout_add(x, residual, keys, rate=RATE, site=SITE),)

    return op, lambda x, r: (r + dropout(x, keys, RATE, SITE),), [torch.randn(shape).to(dtype) for _ in range(2)]


def gelu_case(shape, dtype, approximate="none", with_bias=True, device="cpu"):  # noqa: ARG001
    given = [3 * torch.randn(shape), torch.randn(shape[-1])][: 1 + with_bias]
    return (
        lambda x, bias=None: (bias_gelu(x, bias, approximate=approximate),),
        lambda x, bias=None: (F.gelu(x if bias is None else x + bias, approximate=approximate),),
        [value.to(dtype) for value in given],
    )


def swiglu_case(shape, dtype, with_bias=True, device="cpu"):  # noqa: ARG001
    def plain(x, bias=None):
        gate, value = (x if bias is None else x + bias).unflatten(-1, (-1, 2)).unbind(-1)
        return (F.silu(gate) * value,)

    wide = (*shape[:-1], 2 * shape[-1])
    given = [2 * torch.randn(wide), torch.randn(wide[-1])][: 1 + with_bias]
    return lambda x, bias=None: (bias_swiglu(x, bias),), plain, [value.to(dtype) for value in given]


HEAD_SIZES = {320: 16, 1280: 64, 2560: 64}  # of the presets; others are odd multiples of 2


def rotary_case(shape, dtype, with_bias=True, device="cpu"):
    *tokens, width = shape
    size = HEAD_SIZES.get(width, 2 * (1 + width // 12))
    T, N = torch.Size(tokens).numel(), 1 + width // size
    cos, sin = (part.to(device) for part in angles(T, size, dtype))
    given = [torch.randn(T, N, 3, size), torch.randn(N * 3 * size)][: 1 + with_bias]

    def plain(qkv, bias=None):
        u = qkv if bias is None else qkv + bias.view(qkv.shape[1:])
        turned = rotate(u[:, :, :2], cos[:, None, None], sin[:, None, None])
        return *turned.unbind(2), u[:, :, 2]

    return lambda qkv, bias=None: bias_rotary(qkv, bias, cos, sin), plain, [value.to(dtype) for value in given]


CASES = {
    "layer norm": add_norm_case,
    "layer norm without bias": functools.partial(add_norm_case, with_bias=False),
    "layer norm without dropout": functools.partial(add_norm_case, rate=0.0),
    "rms norm": functools.partial(add_norm_case, kind="RMSNorm"),
    "rms norm without dropout": functools.partial(add_norm_case, kind="RMSNorm", rate=0.0),
    "dropout and sum": add_case,
    "gelu": gelu_case,
    "gelu by tanh": functools.partial(gelu_case, approximate="tanh"),
    "gelu without bias": functools.partial(gelu_case, with_bias=False),
    "swiglu": swiglu_case,
    "swiglu without bias": functools.partial(swiglu_case, with_bias=False),
    "rotary": rotary_case,
    "rotary without bias": functools.partial(rotary_case, with_bias=False),
}


def outcome(function, given, seed=1):
    """What a function gives, and the gradients of its arguments for fixed gradients of its results."""
    leaves = [value.detach().clone().requires_grad_() for value in given]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, r.dtype) for r in results]
    return [r.detach() for r in results], torch.autograd.grad(results, leaves, grads, materialize_grads=True)
