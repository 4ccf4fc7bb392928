"""Initial weights: each parameter's values depend on its name and the seed, on nothing else.

Matrices are normal with `init_method_std`; those that write into the residual stream are smaller by √(2 · layers)
(Radford et al. 2019, section 2.3). Biases are 0, norm weights 1.
"""

import math

import torch
from torch import nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.philox import derive_key, normal

_RESIDUAL_OUTPUTS = ("attention.out.weight", "mlp.down.weight")


@torch.no_grad()
def initialize(module: nn.Module, options: ModelOptions, seed: int) -> None:
    """Fill every parameter of `module` in place, as a function of (parameter name, seed)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        std = options.init_method_std
        if name.endswith(_RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * options.num_layers)
        values = torch.from_numpy(normal(derive_key("init", seed, name), 0, parameter.numel()))
        parameter.copy_(values.view(parameter.shape).mul_(std))
