"""What makes the training of a large encoder cheaper or gentler, applied from outside to the finished model.

Order: adapters (tape_finetune.lora), bfloat16, recomputation.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.func import functional_call

from megatron_plm.model.transformer import Block, Encoder
from megatron_plm.parallel.apply import recompute


def blocks_of(encoder: Encoder) -> list[Block]:
    """The Transformer blocks, the lowest first."""
    return [cast(Block, block) for block in encoder.blocks.values()]


def recompute_blocks(encoder: Encoder, *, draws: bool) -> None:
    """Let the backward pass compute each block again, so that of a block only what goes into it is kept. `draws` says
    whether blocks draw from torch's generator."""
    for block in blocks_of(encoder):
        recompute(block, "full", draws=draws)


def train_in_bf16(encoder: Encoder) -> None:
    """Let the passes of training compute in bfloat16; weights, their gradients and every other pass stay float32."""
    for module in (encoder.embedding, *blocks_of(encoder), encoder.final_norm):
        _train_in_bf16(module)


class _AsIs(nn.Module):
    """A module under a name, with the forward pass it has now."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._forward = module.forward

    def forward(self, *arguments: Any) -> Any:
        return self._forward(*arguments)


def _train_in_bf16(module: nn.Module) -> None:
    as_it_is = _AsIs(module)

    def forward(*arguments: Any) -> Any:
        if not module.training:
            return as_it_is(*arguments)
        # Gradients flow through the casts back to the float32 weights. Norms and all else compute in bfloat16 too, as
        # in pretraining with --bf16; buffers (rotary frequencies) stay as they are.
        cast_weights = {f"module.{name}": weights.bfloat16() for name, weights in module.named_parameters()}
        return functional_call(as_it_is, cast_weights, arguments)

    module.forward = forward


def layer_lr_scales(encoder: Encoder, decay: float) -> dict[nn.Parameter, float]:
    """What multiplies the learning rate of each of the encoder's parameters: 1 in the top block and behind it, `decay`
    in the one below, its square below that, … and in the embedding one power more than in the lowest block (Howard &
    Ruder 2018, arXiv:1801.06146)."""
    blocks = blocks_of(encoder)
    depth_of = [(block, len(blocks) - 1 - number) for number, block in enumerate(blocks)]
    depths: list[tuple[nn.Module, int]] = [*depth_of, (encoder.embedding, len(blocks))]
    return {parameter: decay**depth for module, depth in depths for parameter in module.parameters()}


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training changes, by name: parameters, and the running statistics of norms over batches."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for buffer_name, buffer in module.named_buffers(recurse=False):
                yield f"{name}.{buffer_name}", buffer
