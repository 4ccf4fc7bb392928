"""The native form, between reading one format and writing another: options, tokenizer and float32 tensors.

The tensors of a checkpoint stay in its files until they are asked for. What names, shapes and types tell is checked
before any is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plm.config.options import Config, DataOptions, ModelOptions
from megatron_plm.convert.keymap import KeyMap, check_keys, check_shapes
from megatron_plm.convert.lazy import LazyTensors, empty_meta, meta_of, renamed
from megatron_plm.errors import UserError
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer

INVERSE_FREQUENCIES = "encoder.rotary.inverse_frequencies"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """One model.

    `tensors` are those of the model's `state_dict`, float32, by name, in memory or in the files of a checkpoint;
    `notes` are sentences on what the source held that is not carried.
    """

    options: ModelOptions
    tokenizer: Tokenizer
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    def build(self) -> MaskedLanguageModel:
        """A model of these options that owns these tensors' values."""
        model = MaskedLanguageModel(self.options, self.tokenizer)
        for name, tensor in model.state_dict().items():
            tensor.copy_(self.tensors[name])
        return model


@dataclass(frozen=True)
class Export:
    """A model's tensors under a format's names: what they are, and a stream that reads each of them, once.

    `meta` and `stream` have the same order.
    """

    meta: dict[str, Tensor]
    stream: Iterator[tuple[str, Tensor]]


def config_of(options: ModelOptions) -> Config:
    """A configuration of such a model with everything else by default, but rows no longer than the model can take."""
    data = DataOptions()
    if options.max_position_embeddings is not None:
        data = DataOptions(seq_length=min(data.seq_length, options.max_position_embeddings))
    return Config(model=options, data=data)


def native_shapes(options: ModelOptions, tokenizer: Tokenizer) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of such a model, without allocating it."""
    with torch.device("meta"):
        model = MaskedLanguageModel(options, tokenizer)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def import_tensors(
    key_map: KeyMap, tensors: Mapping[str, Tensor], options: ModelOptions, tokenizer: Tokenizer, place: str
) -> LazyTensors:
    """Their tensors as ours, float32; UserError for missing, unknown, misshapen or ill-typed ones, before any is read.

    What only values tell, as that two tensors are equal, is told when they are read.
    """
    expected = key_map.shapes(native_shapes(options, tokenizer))
    optional = {key for entry in key_map.entries for key in entry.optional}
    check_keys(tensors, set(expected), optional, place)
    check_shapes({key: tensor.shape for key, tensor in meta_of(tensors).items()}, expected, place)
    return key_map.inverse.lazy(as_float32(tensors, place), place)


def export_tensors(key_map: KeyMap, weights: Weights, dtype: str, *, leave_out: tuple[str, ...] = ()) -> Export:
    """The model's tensors as theirs, in `dtype`, but for the keys in `leave_out`.

    Raises UserError if the tables do not fit the model; the stream raises it at its end if there were values beyond
    the range of `dtype`.
    """
    place = "the model"
    meta = key_map.apply(meta_of(weights.tensors), place)
    stream = key_map.stream(weights.tensors, place)
    return Export(
        {k: empty_meta(t.shape, written_dtype(k, dtype)) for k, t in meta.items() if k not in leave_out},
        _cast(((key, tensor) for key, tensor in stream if key not in leave_out), dtype),
    )


def drop_not_carried(
    tensors: Mapping[str, Tensor], not_carried: Mapping[str, str]
) -> tuple[LazyTensors, tuple[str, ...]]:
    """The tensors without those that `not_carried` declares, and for each dropped one its name with the reason."""
    dropped = tuple(f"{key}: {not_carried[key]}" for key in sorted(tensors) if key in not_carried)
    return renamed(tensors, {key: key for key in tensors if key not in not_carried}), dropped


def as_float32(tensors: Mapping[str, Tensor], place: str) -> LazyTensors:
    """The tensors in float32, exactly; UserError if the type of one holds other values."""
    meta = meta_of(tensors)
    for key, tensor in meta.items():
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{place}: {key} has type {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    return LazyTensors({key: tensor.float() for key, tensor in meta.items()}, lambda key: tensors[key].float())


def written_dtype(key: str, dtype: str) -> torch.dtype:
    """The type that a tensor is written in: rotary frequencies stay float32, as angles need their precision."""
    return torch.float32 if key.endswith(("inv_freq", "inverse_frequencies")) else DTYPES[dtype]


def _cast(tensors: Iterator[tuple[str, Tensor]], dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in `dtype`; UserError at the end with the number of values beyond the type's range, if any are."""
    overflowing: dict[str, int] = {}
    for key, tensor in tensors:
        narrow = tensor.to(written_dtype(key, dtype))
        if narrow.dtype != tensor.dtype:
            overflowing[key] = int((narrow.isinf() & tensor.isfinite()).sum())
        yield key, narrow
    total = sum(overflowing.values())
    if total:
        worst = max(overflowing, key=lambda key: overflowing[key])
        raise UserError(
            f"{total} values are beyond the range of {dtype}, most of them in {worst}; use --dtype bfloat16 or float32"
        )
