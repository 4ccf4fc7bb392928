"""BERT (Devlin et al. 2019, arXiv:1810.04805) under the names that stock TAPE and transformers give it.

Both name the encoder alike, and what is in the head, which TAPE calls `mlm` and transformers `cls.predictions`. Norms
behind the sums, learned positions, and vectors of two sentences ("token types"), of which proteins are the first.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import ForeignConfig, fields_from, options_from, require_letters, require_options
from megatron_plm.convert.keymap import Entry, KeyMap, Transform, module
from megatron_plm.convert.lazy import meta_of
from megatron_plm.convert.other_names import NORM_NAMES, Renames, with_current_names
from megatron_plm.convert.tensor_files import read_tensors
from megatron_plm.convert.transforms import chain, repeat, split_qkv, with_token_types
from megatron_plm.convert.weights import Export, Weights, drop_not_carried, export_tensors, import_weights
from megatron_plm.tokenizers import Tokenizer

ENCODER = "bert"
_EMBEDDINGS = f"{ENCODER}.embeddings"
_LAYER = f"{ENCODER}.encoder.layer.{{i}}"
POOLER = f"{ENCODER}.pooler.dense"
TOKEN_TYPES = f"{_EMBEDDINGS}.token_type_embeddings.weight"
WRITTEN_TOKEN_TYPES = f"{TOKEN_TYPES}: the models here have none; zeros are written"

# A model that was saved without a head has no prefix.
_WITHOUT_PREFIX: Renames = ((re.compile(r"^(?=(embeddings|encoder|pooler|bert_tail_dense)\.)"), f"{ENCODER}."),)

# The options of every BERT; the other ones of a model can be told in config.json. Their head has the MLPs' GELU, ours
# the exact one: only where the MLPs have that, too, are both the same.
CARRIED: dict[str, Any] = {
    "norm_placement": "post",
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "activation": "gelu",
    "add_bias_linear": True,
    "embedding_layernorm": True,
    "head_transform": True,
    "untie_embeddings_and_output_weights": False,
    "token_dropout": False,
}

NOT_CARRIED = {
    f"{POOLER}.weight": "the pooler, which a masked language model never reads",
    f"{POOLER}.bias": "the pooler, which a masked language model never reads",
    f"{_EMBEDDINGS}.position_ids": "a constant",
}


@dataclass(frozen=True)
class Layout:
    """What the two libraries do differently.

    Attributes:
        format_name: of --to.
        head: the name of the head.
        tied_bias: other names of the head's bias.
        not_carried: what their files may hold that a model of ours has no place for, beyond what both may, with why.
    """

    format_name: str
    head: str
    tied_bias: tuple[str, ...] = ()
    not_carried: Mapping[str, str] = field(default_factory=dict)


def read(
    directory: Path,
    config: ForeignConfig,
    tokenizer: Tokenizer,
    rows: Transform,
    layout: Layout,
    notes: tuple[str, ...] = (),
) -> Weights:
    """Read a directory whose vocabulary `rows` makes of `tokenizer`'s, with `notes` on it; UserError for anything a
    model of ours would compute differently."""
    config.require("hidden_act", "gelu", "the head of the models here has the exact GELU, and BERT's has the MLPs'")
    positions = config.get("max_position_embeddings", int)
    options = options_from(config, tokenizer, max_position_embeddings=positions, **CARRIED)
    found = with_prefix(with_current_names(read_tensors(directory), NORM_NAMES, directory), directory)
    kept, dropped = drop_not_carried(found, {**NOT_CARRIED, **layout.not_carried})
    table = key_map(options, rows, layout, num_token_types=config.get("type_vocab_size", int))
    notes = (*notes, *dropped, *token_type_notes(kept))
    return import_weights(table, kept, options, tokenizer, str(directory), notes)


def with_prefix(tensors: Mapping[str, Tensor], directory: Path) -> Mapping[str, Tensor]:
    """The tensors by the names that they have beside a head's."""
    return with_current_names(tensors, _WITHOUT_PREFIX, directory)


def export(weights: Weights, rows: Transform, layout: Layout, dtype: str, *, leave_out: tuple[str, ...] = ()) -> Export:
    """The model's tensors as theirs, but for the keys in `leave_out`; UserError if no BERT can hold it."""
    require_options(weights.options, CARRIED, layout.format_name)
    require_letters(weights.tokenizer, layout.format_name)
    return export_tensors(key_map(weights.options, rows, layout), weights, dtype, leave_out=leave_out)


def config_fields(options: ModelOptions, vocabulary: Tokenizer, dtype: str) -> dict[str, Any]:
    """The fields that `read` asks for, with those a reader of the file needs beside them."""
    return {
        **fields_from(options, vocabulary, dtype),
        "hidden_act": "gelu",
        "max_position_embeddings": options.max_position_embeddings,
        "type_vocab_size": 1,
    }


def key_map(options: ModelOptions, rows: Transform, layout: Layout, *, num_token_types: int = 1) -> KeyMap:
    """The table of a model of ours, whose vocabulary's `rows` become theirs."""
    head, tied_bias = layout.head, layout.tied_bias
    decoder = f"{head}.decoder.weight"
    block = "encoder.blocks.{i}"
    attention = [f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")]
    table = [
        Entry(
            ("encoder.embedding.tokens.weight",),
            (f"{_EMBEDDINGS}.word_embeddings.weight", decoder),
            chain(rows, repeat(2)),
            optional=(decoder,),
        ),
        Entry(
            ("encoder.embedding.positions.weight",),
            (f"{_EMBEDDINGS}.position_embeddings.weight", TOKEN_TYPES),
            with_token_types(num_token_types),
        ),
        *module("encoder.embedding.norm", f"{_EMBEDDINGS}.LayerNorm"),
        *module(f"{block}.attention.qkv", *attention, transform=split_qkv(options.num_attention_heads)),
        *module(f"{block}.attention.out", f"{_LAYER}.attention.output.dense"),
        *module(f"{block}.attention_norm", f"{_LAYER}.attention.output.LayerNorm"),
        *module(f"{block}.mlp.up", f"{_LAYER}.intermediate.dense"),
        *module(f"{block}.mlp.down", f"{_LAYER}.output.dense"),
        *module(f"{block}.mlp_norm", f"{_LAYER}.output.LayerNorm"),
        *module("head.dense", f"{head}.transform.dense"),
        *module("head.norm", f"{head}.transform.LayerNorm"),
        Entry(
            ("head.bias",), (f"{head}.bias", *tied_bias), chain(rows, repeat(1 + len(tied_bias))), optional=tied_bias
        ),
    ]
    return KeyMap.build(table, options.num_layers)


def token_type_notes(theirs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What is not carried of their token types, if there are several."""
    if TOKEN_TYPES not in theirs or len(meta_of(theirs)[TOKEN_TYPES]) == 1:
        return ()
    return (f"{TOKEN_TYPES}: but for row 0, which is added to the positions; proteins have no other type",)
