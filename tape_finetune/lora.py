"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) by the package peft, which is an optional dependency.

An adapted matrix W [N, K] acts as W + alpha/rank · B A, where A [rank, K] and B [N, rank] are trained and W is not.
Attention's query, key and value are one matrix here, `attention.qkv` [3 D, D]: its adapter has one A for the three, and
a B for each. Saved weights have the adapters merged, and need no peft.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_plm.convert.tensor_files import write_safetensors
from megatron_plm.errors import UserError, suggestion
from megatron_plm.model.transformer import Encoder
from megatron_plm.philox import derive_key, normal

DEFAULT_TARGETS = ("attention.qkv", "attention.out")
ADAPTERS = "adapters"  # folder of a run directory
_WEIGHTS_FILE = "adapter_model.safetensors"  # peft's name


@dataclass(frozen=True)
class LoraOptions:
    """Rank and scale of the adapters, the dropout of what they read, and which matrices of a block have one."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


class Adapters:
    """The adapters of an encoder, which stands there with them until they are merged."""

    def __init__(self, encoder: Encoder, options: LoraOptions, seed: int, base_path: Path | None) -> None:
        """Put adapters into `encoder`, and let nothing else of it be trained. The first weights, of A random and of B
        zero, depend on `seed` and the matrices' names. Raises UserError."""
        check_targets(encoder, options.targets)
        peft = import_peft()
        self._options = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=list(options.targets),
        )
        self._base_path = base_path
        self._model: Any = peft.get_peft_model(encoder, self._options)
        self._state: Mapping[str, Tensor] = {}
        for name, parameter in encoder.named_parameters():
            if ".lora_A." in name:
                values = torch.from_numpy(normal(derive_key("lora", seed, name), 0, parameter.numel()))
                parameter.data.copy_(values.view(parameter.shape) / math.sqrt(3 * parameter.shape[1]))
        self.num_parameters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)

    def merge(self) -> None:
        """Add each adapter to its matrix: the encoder is a plain one again."""
        state = import_peft().get_peft_model_state_dict(self._model)
        self._state = {name: tensor.cpu().clone() for name, tensor in state.items()}
        self._model.merge_and_unload()

    def save(self, directory: Path) -> None:
        """Write the adapters, which must have been merged, into a new directory in peft's own format."""
        assert self._state
        directory.mkdir()
        self._options.base_model_name_or_path = None if self._base_path is None else str(self._base_path)
        self._options.save_pretrained(str(directory))
        write_safetensors(self._state, directory / _WEIGHTS_FILE)


def check_targets(encoder: Encoder, targets: Sequence[str]) -> None:
    """Raise UserError where a target is no matrix of the encoder's blocks."""
    (block, *_) = encoder.blocks.values()
    known = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if target not in known:
            raise UserError(
                f"--lora_targets {target}: the matrices of a block are {', '.join(known)}{suggestion(target, known)}"
            )


def import_peft() -> Any:
    """The package; UserError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError("--lora_rank: needs the package peft: run `pip install 'megatron-plm[lora]'`") from None
    return peft
