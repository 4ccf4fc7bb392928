"""The native in-memory form, between reading one format and writing another: options, tokenizer and float32 tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.keymap import KeyMap, check_keys, check_shapes
from megatron_plm.errors import UserError
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer

INVERSE_FREQUENCIES = "encoder.rotary.inverse_frequencies"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """One model in memory.

    `tensors` are those of the model's `state_dict`, float32, by name; `notes` are sentences on what the source held
    that is not carried.
    """

    options: ModelOptions
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    def build(self) -> MaskedLanguageModel:
        """A model of these options that owns these tensors' values."""
        model = MaskedLanguageModel(self.options, self.tokenizer)
        model.load_state_dict(self.tensors)
        return model


def native_shapes(options: ModelOptions, tokenizer: Tokenizer) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of such a model, without allocating it."""
    with torch.device("meta"):
        model = MaskedLanguageModel(options, tokenizer)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def import_tensors(
    key_map: KeyMap, tensors: Mapping[str, Tensor], options: ModelOptions, tokenizer: Tokenizer, place: str
) -> dict[str, Tensor]:
    """Their tensors as ours, float32; UserError for missing, unknown, misshapen or ill-typed ones."""
    expected = key_map.shapes(native_shapes(options, tokenizer))
    optional = {key for entry in key_map.entries for key in entry.optional}
    check_keys(tensors, set(expected), optional, place)
    check_shapes({key: tensor.shape for key, tensor in tensors.items()}, expected, place)
    wide = {key: to_float32(key, tensor, place) for key, tensor in tensors.items()}
    return key_map.inverse.apply(wide, place)


def drop_not_carried(
    tensors: Mapping[str, Tensor], not_carried: Mapping[str, str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors without those that `not_carried` declares, and for each dropped one its name with the reason."""
    kept = {key: tensor for key, tensor in tensors.items() if key not in not_carried}
    return kept, tuple(f"{key}: {not_carried[key]}" for key in sorted(tensors) if key in not_carried)


def to_float32(key: str, tensor: Tensor, place: str) -> Tensor:
    """The tensor in float32, exactly; UserError if its type holds other values."""
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{place}: {key} has type {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    return tensor.float()


def cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors in `dtype`, contiguous; rotary frequencies stay float32, as angles need their precision.

    Raises UserError with the number of values beyond the type's range, if there are any.
    """
    result, overflowing = {}, {}
    for key, tensor in tensors.items():
        narrow = tensor if _is_rotary(key) else tensor.to(DTYPES[dtype])
        overflowing[key] = int((narrow.isinf() & tensor.isfinite()).sum())
        result[key] = narrow.contiguous()
    total = sum(overflowing.values())
    if total:
        worst = max(overflowing, key=lambda key: overflowing[key])
        raise UserError(
            f"{total} values are beyond the range of {dtype}, most of them in {worst}; use --dtype bfloat16 or float32"
        )
    return result


def _is_rotary(key: str) -> bool:
    return key.endswith(("inv_freq", "inverse_frequencies"))
