"""What `tools/benchmark.py kernels` runs: each fused op beside what the plain blocks run for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.accelerators import are_usable, norm_like
from megatron_plm.kernels.activation import bias_gelu, bias_swiglu
from megatron_plm.kernels.dropout import dropout
from megatron_plm.kernels.norm import dropout_add_norm
from megatron_plm.kernels.rotary import bias_rotary, rotate

Function = Callable[..., Sequence[Tensor]]
_SITE, _EPS = 1, 1e-5


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        fused: the op; peer: what the plain blocks run; both take tensors that are differentiated.
        given, peer_given: these tensors; to the peer's input the bias is added already.
        exact: the op as a composite that float64 goes through.
        read_again: bytes that the backward pass must read beside the gradients.
        packages: the peer with the norm of another package, by the packages that are here; takes `peer_given`.
    """

    name: str
    fused: Function
    peer: Function
    exact: Function
    given: list[Tensor]
    peer_given: list[Tensor]
    read_again: int
    packages: dict[str, Function] = field(default_factory=dict)

    def traffic(self) -> tuple[int, int]:
        """Bytes that have to move forward, and in the backward pass."""
        with torch.no_grad():
            outputs = sum(map(_bytes, self.fused(*self.given)))
        inputs = sum(map(_bytes, self.given))
        return inputs + outputs, outputs + self.read_again + inputs


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _BiasOfProduct(torch.autograd.Function):
    """Stands for the matrix product that added `bias` to `x` at no cost: its gradient is a sum over the tokens."""

    @staticmethod
    def forward(_: Any, x: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = gradients
        return grad, grad.sum(0)


def cases_of(shape: ModelOptions, T: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every op for T tokens of a model of this shape; values are the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    keys = torch.randint(0, 2**32, (T,), generator=generator).to(device)
    for kind, rate in (("LayerNorm", 0.0), ("LayerNorm", 0.1), ("RMSNorm", 0.0)):
        yield _add_norm(some, keys, T, shape.hidden_size, kind, rate)
    for name in ("gelu", "gelu_tanh", "swiglu"):
        yield _activation(some, T, shape.ffn_size, name)
    yield _rotary(some, T, shape.num_attention_heads, shape.head_dim)


def _add_norm(some: Callable[..., Tensor], keys: Tensor, T: int, D: int, kind: str, rate: float) -> Case:
    def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Tensor]:
        return dropout_add_norm(x, residual, weight, bias, keys, rate=rate, site=_SITE, eps=_EPS, kind=kind)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Tensor]:
        total = residual + dropout(x, keys, rate, _SITE)
        if kind == "RMSNorm":
            return total, F.rms_norm(total, (D,), weight, _EPS)
        return total, F.layer_norm(total, (D,), weight, bias, _EPS)

    given = [some(T, D), some(T, D), some(D), *([some(D)] if kind == "LayerNorm" else [])]
    name = f"{'dropout + ' if rate else ''}sum + {kind}"
    packages = {
        package: package_norm(package, kind, keys, D, rate)
        for package in ("apex", "transformer_engine")
        if are_usable(keys.device, norm=package)
    }
    return Case(name, fused, plain, plain, given, given, _bytes(given[0]), packages)


def package_norm(package: str, kind: str, keys: Tensor, D: int, rate: float) -> Function:
    """Sum and norm as the plain blocks run them with `--norm-implementation`."""
    with torch.device("meta"):
        norm = norm_like({"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[kind](D, eps=_EPS), package)

    def run(x: Tensor, residual: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        total = residual + dropout(x, keys, rate, _SITE)
        return total, functional_call(norm, dict(zip(("weight", "bias"), weights, strict=False)), (total,))

    return run


def _activated(x: Tensor, name: str) -> Tensor:
    if name == "swiglu":
        gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)
        return F.silu(gate) * value
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _activation(some: Callable[..., Tensor], T: int, width: int, name: str) -> Case:
    def fused(x: Tensor, bias: Tensor) -> Sequence[Tensor]:
        if name == "swiglu":
            return (bias_swiglu(x, bias),)
        return (bias_gelu(x, bias, approximate="tanh" if name == "gelu_tanh" else "none"),)

    def plain(x: Tensor, bias: Tensor) -> Sequence[Tensor]:
        return (_activated(_BiasOfProduct.apply(x, bias), name),)

    x, bias = some(T, 2 * width if name == "swiglu" else width), some(2 * width if name == "swiglu" else width)
    added = (x + bias).detach().requires_grad_()
    return Case(
        f"bias + {name}", fused, plain, lambda x, b: (_activated(x + b, name),), [x, bias], [added, bias], _bytes(x)
    )


def _rotary(some: Callable[..., Tensor], T: int, N: int, H: int) -> Case:
    angles = 10 * some(T, H // 2).detach()
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))

    def turned(qkv: Tensor) -> Sequence[Tensor]:
        coefficients = (part.to(qkv.dtype)[:, None, None] for part in (cos, sin))
        # The values are copied, as by the op, though the blocks only look at them: torch.compile takes what looks at an
        # input out of its graph, and its gradient past the bias.
        return *rotate(qkv[:, :, :2], *coefficients).unbind(2), qkv[:, :, 2].clone()

    def plain(qkv: Tensor, bias: Tensor) -> Sequence[Tensor]:
        return turned(_BiasOfProduct.apply(qkv.flatten(1), bias).view_as(qkv))

    def exact(qkv: Tensor, bias: Tensor) -> Sequence[Tensor]:
        return turned(qkv + bias.view(qkv.shape[1:]))

    qkv, bias = some(T, N, 3, H), some(N * 3 * H)
    added = (qkv + bias.view(N, 3, H)).detach().requires_grad_()
    read_again = _bytes(cos) + _bytes(sin)
    return Case(
        "bias + rotary", lambda x, b: bias_rotary(x, b, cos, sin), plain, exact, [qkv, bias], [added, bias], read_again
    )
