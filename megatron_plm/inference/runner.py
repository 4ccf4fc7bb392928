"""A pretrained model on its device, run over packed rows without gradients.

Shapes: T packed tokens, D hidden size, M positions asked for, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_plm import __version__
from megatron_plm.convert.pretrained import Pretrained
from megatron_plm.inference.rows import PackedRow


class Runner:
    """Attributes: model, contact_head (or None), tokenizer, options, device, dtype (of the computation)."""

    def __init__(self, pretrained: Pretrained, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model to `device`; its weights become `dtype`, rotary frequencies stay float32."""
        self.model = pretrained.model.eval().requires_grad_(False)
        self.tokenizer = pretrained.tokenizer
        self.options = pretrained.options
        self.device = device
        self.dtype = dtype
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.to(device)
        self.contact_head = None if pretrained.contact_head is None else pretrained.contact_head.to(device)

    @torch.inference_mode()
    def hidden_states(self, row: PackedRow, layers: Sequence[int]) -> list[Tensor]:
        """What those layers put out, each [T, D] on the device, in `dtype`.

        Layer 0 is the embedding and layer i the output of block i; the last is what the encoder gives, behind its final
        norm where it has one: the `hidden_states` of transformers' EsmModel.
        """
        encoder, last = self.model.encoder, self.options.num_layers
        found: dict[int, Tensor] = {}

        def keep(layer: int, module: nn.Module, stack: ExitStack) -> None:
            def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
                found[layer] = output

            stack.callback(module.register_forward_hook(hook).remove)

        with ExitStack() as stack:
            for layer in set(layers) - {last}:
                keep(layer, encoder.embedding if layer == 0 else encoder.blocks[str(layer - 1)], stack)
            found[last] = encoder(*row.to(self.device), max_length=row.max_length)
        return [found[layer][0] for layer in layers]

    @torch.inference_mode()
    def log_probabilities(self, row: PackedRow, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """log p of every token of the vocabulary at tokens `index` [M] of the row, in nats, [M, V]."""
        label_index = torch.from_numpy(index)[None].to(self.device)
        logits = self.model(*row.to(self.device), label_index, max_length=row.max_length)[0]
        return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    def identity(self) -> dict[str, str]:
        """All that its numbers depend on, in a few words: the weights by a hash."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {
            "version": __version__,
            "weights": digest.hexdigest(),
            "tokenizer": self.tokenizer.sha256,
            "device": self.device.type,
            "compute_dtype": str(self.dtype).removeprefix("torch."),
        }
