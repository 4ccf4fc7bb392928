"""The native form, between reading one format and writing another: options, tokenizer and float32 tensors.

The tensors of a checkpoint stay in its files until they are asked for. What names, shapes and types tell is checked
before any is read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_plm.config.options import Config, DataOptions, ModelOptions
from megatron_plm.convert.keymap import KeyMap, check_keys, check_shapes, listed
from megatron_plm.convert.lazy import LazyTensors, empty_meta, joined, meta_of, renamed
from megatron_plm.errors import UserError
from megatron_plm.model.heads import ContactHead, MaskedLanguageModelHead
from megatron_plm.model.initialize import initialize
from megatron_plm.model.layers import RotaryEmbedding
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer

INVERSE_FREQUENCIES = "encoder.rotary.inverse_frequencies"
# Of a checkpoint that comes from a published ESM-2: no model here is trained with one, and none holds it.
CONTACT_HEAD = ("contact_head.regression.weight", "contact_head.regression.bias")
_HEAD = "head"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """One model.

    `tensors` are those of the model's `state_dict`, float32, by name, in memory or in the files of a checkpoint, and
    beside them those of CONTACT_HEAD, where the source has them; `notes` are sentences on what the source held that is
    not carried, `warnings` on what a user must know before relying on the model.
    """

    options: ModelOptions
    tokenizer: Tokenizer
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def build(self) -> MaskedLanguageModel:
        """A model of these options that owns these tensors' values."""
        model = MaskedLanguageModel(self.options, self.tokenizer)
        for name, tensor in model.state_dict().items():
            tensor.copy_(self.tensors[name])
        return model

    @property
    def has_contact_head(self) -> bool:
        """Whether `build_contact_head` gives one."""
        return all(name in self.tensors for name in CONTACT_HEAD)

    def build_contact_head(self) -> ContactHead | None:
        """The contact head that belongs to the model, if there is one."""
        if not self.has_contact_head:
            return None
        head = ContactHead(self.options)
        head.load_state_dict({name.removeprefix("contact_head."): self.tensors[name] for name in CONTACT_HEAD})
        return head


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


def contact_head_shapes(options: ModelOptions) -> dict[str, torch.Size]:
    """The same of the contact head, which a model may have beside it."""
    with torch.device("meta"):
        head = ContactHead(options)
    return {f"contact_head.{name}": tensor.shape for name, tensor in head.state_dict().items()}


def import_weights(
    key_map: KeyMap,
    tensors: Mapping[str, Tensor],
    options: ModelOptions,
    tokenizer: Tokenizer,
    place: str,
    notes: tuple[str, ...] = (),
) -> Weights:
    """A model of their tensors; UserError for missing, unknown, misshapen or ill-typed ones, before any is read.

    What only values tell, as that two tensors are equal, is told when they are read. Rotary frequencies that they do
    not have are computed. If they have nothing of a language model's head, it has the values that training begins with.
    """
    ours = native_shapes(options, tokenizer)
    warnings: tuple[str, ...] = ()
    head = {name for name in ours if name.startswith(f"{_HEAD}.")}
    has_head = not key_map.theirs_of(head).isdisjoint(tensors)
    if not has_head:
        warnings = (
            f"{place} has no language-model head, so it gets initial values: scores and predicted residues mean "
            "nothing until it is trained; embeddings and fine-tuning do not use it",
        )
        key_map = key_map.without(head)
        ours = {name: shape for name, shape in ours.items() if name not in head}
    if key_map.knows(CONTACT_HEAD):
        ours.update(contact_head_shapes(options))
        check_contact_head(tensors, sorted(key_map.theirs_of(CONTACT_HEAD)), place)
    expected = key_map.shapes(ours)
    optional = {key for entry in key_map.entries for key in entry.optional}
    check_keys(tensors, set(expected), optional, place)
    check_shapes({key: tensor.shape for key, tensor in meta_of(tensors).items()}, expected, place)
    found = key_map.inverse.lazy(as_float32(tensors, place), place)
    supplied = {} if has_head else _initial_head(options, tokenizer)
    if INVERSE_FREQUENCIES in ours and INVERSE_FREQUENCIES not in found:
        supplied[INVERSE_FREQUENCIES] = RotaryEmbedding(options.head_dim).inverse_frequencies
    return Weights(options, tokenizer, joined(found, supplied), notes, warnings)


def check_contact_head(names: Iterable[str], both: Sequence[str], place: str) -> None:
    """Raise UserError if of `both` tensors of the contact head `place` has one only."""
    present = set(names).intersection(both)
    if len(present) == 1:
        (absent,) = set(both) - present
        raise UserError(
            f"{place}: has {present.pop()} and no {absent}, one half of a contact head; fetch the other half, or "
            "remove this one"
        )


def _initial_head(options: ModelOptions, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The head that a training from seed 0 begins with."""
    module = torch.nn.ModuleDict({_HEAD: MaskedLanguageModelHead(options, tokenizer.vocab_size)})
    initialize(module, options, seed=0)
    return module.state_dict()


def untrained_head_warning(model: MaskedLanguageModel, options: ModelOptions, tokenizer: Tokenizer) -> str | None:
    """What to say of a model whose head still has the initial values that `import_weights` gives, in any type of
    weights; None of another."""
    head = model.head.state_dict()
    initial = {name.removeprefix(f"{_HEAD}."): tensor for name, tensor in _initial_head(options, tokenizer).items()}
    matrices = [name for name, tensor in initial.items() if tensor.dim() == 2]  # biases begin as 0 in any model
    rtol, atol = 2**-8, 1e-7  # the rounding of bfloat16, and of float16's smallest numbers
    if not matrices or not all(torch.allclose(head[name], initial[name], rtol, atol) for name in matrices):
        return None
    return (
        "its language-model head has the initial values of a training from seed 0: scores and predicted residues mean "
        "nothing until it is trained"
    )


def counting_non_finite(weights: Weights) -> tuple[Weights, dict[str, int]]:
    """The weights, and how many values of a tensor are NaN or infinite, by its name, filled in as tensors are read."""
    counts: dict[str, int] = {}

    def read(name: str) -> Tensor:
        tensor = weights.tensors[name]
        if not tensor.sum().isfinite():  # takes no memory, as a look at each value would
            count = int((~tensor.isfinite()).sum())
            if count:  # else the sum is too large
                counts[name] = count
        return tensor

    return replace(weights, tensors=LazyTensors(meta_of(weights.tensors), read)), counts


def non_finite_warning(counts: Mapping[str, int]) -> tuple[str, ...]:
    """What to say of the counts of `counting_non_finite`, if anything."""
    if not counts:
        return ()
    total, names = sum(counts.values()), sorted(counts, key=lambda name: -counts[name])
    shown = listed([f"{name} ({counts[name]})" for name in names])
    values = "value is" if total == 1 else "values are"
    return (f"{total} {values} NaN or infinite, converted as {'it is' if total == 1 else 'they are'}: {shown}",)


def export_tensors(key_map: KeyMap, weights: Weights, dtype: str, *, leave_out: tuple[str, ...] = ()) -> Export:
    """The model's tensors as theirs, in `dtype`, but for the keys in `leave_out`; the contact head only if the table
    knows it.

    Raises UserError if the tables do not fit the model; the stream raises it at its end if there were values beyond
    the range of `dtype`.
    """
    place = "the model"
    tensors = weights.tensors
    if not key_map.knows(CONTACT_HEAD):
        tensors = renamed(tensors, {key: key for key in tensors if key not in CONTACT_HEAD})
    meta = key_map.apply(meta_of(tensors), place)
    stream = key_map.stream(tensors, place)
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
