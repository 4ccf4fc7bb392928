"""Initial weights: each parameter's values depend on its name and the seed, on nothing else.

Matrices are normal with `init_method_std`; those that write into the residual stream are smaller by √(2 · layers)
(Radford et al. 2019, section 2.3). Biases are 0, norm weights 1. The values of a matrix are a stream of random numbers,
row by row, of which any box can be made without the rest: whoever holds a piece of a matrix makes only that.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.model.layers import RotaryEmbedding
from megatron_plm.philox import derive_key, normal_box

_RESIDUAL_OUTPUTS = ("attention.out.weight", "mlp.down.weight")

# Of a parameter: the memory that this process holds of it, and its first index in each dim of the whole.
Piece = tuple[Tensor, tuple[int, ...]]


def _whole(parameter: Tensor) -> Piece:
    return parameter, (0,) * parameter.dim()


@torch.no_grad()
def initialize(
    module: nn.Module, options: ModelOptions, seed: int, *, piece: Callable[[Tensor], Piece] = _whole
) -> None:
    """Fill every parameter and buffer of `module` in place, as a function of (parameter name, seed)."""
    for name, parameter in module.named_parameters():
        held, start = piece(parameter)
        if parameter.dim() == 1:
            held.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        std = options.init_method_std
        if name.endswith(_RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * options.num_layers)
        rows, columns = ((first, first + size) for first, size in zip(start, held.shape, strict=True))
        values = normal_box(derive_key("init", seed, name), parameter.shape[1], rows, columns)
        held.copy_(torch.from_numpy(values).mul_(std))
    for part in module.modules():
        if isinstance(part, RotaryEmbedding):
            part.fill()
