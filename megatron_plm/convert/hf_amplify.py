"""The layout of AMPLIFY (Fournier et al. 2024) in `huggingface` directories, as chandar-lab publishes it.

Key and field names as in its `src/amplify/model/amplify.py`. Differing from the models here, its rotary positions turn
neighbours (2i, 2i + 1) of a head, by frequencies that it computes and does not store, and the two maps into the SwiGLU
stand one below the other.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import (
    CONFIG_JSON,
    ForeignConfig,
    checked,
    require_letters,
    require_options,
    write_json,
)
from megatron_plm.convert.hf_tokenizer import read_vocabulary, write_letter_tokenizer
from megatron_plm.convert.keymap import Entry, KeyMap, Transform
from megatron_plm.convert.tensor_files import read_tensors, write_safetensors_shards
from megatron_plm.convert.transforms import chain, gate_rows, neighbour_pairs, split_qkv, vocabulary_rows
from megatron_plm.convert.weights import INVERSE_FREQUENCIES, Weights, export_tensors, import_weights
from megatron_plm.errors import UserError
from megatron_plm.model.layers import RotaryEmbedding
from megatron_plm.tokenizers import Tokenizer

MODEL_TYPE = "AMPLIFY"
_NAME = "huggingface"
_LAYER = "transformer_encoder.{i}"
_CODE = "chandar-lab/AMPLIFY_120M--amplify"  # where transformers finds the class, if it may run what it fetches
_MAX_LENGTH = 2048  # positions that AMPLIFY prepares; the published models'
_WIDTH_MULTIPLE = 8

_CARRIED: dict[str, Any] = {
    "norm_placement": "pre",
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "activation": "swiglu",
    "add_bias_linear": False,
    "embedding_layernorm": False,
    "head_transform": False,
    "untie_embeddings_and_output_weights": True,
    "token_dropout": False,
}

# What their configuration must say for such a model.
_NEEDED = {
    "hidden_act": "SwiGLU",
    "rms_norm": True,
    "att_bias": False,
    "ffn_bias": False,
    "layer_norm_after_embedding": False,
    "layer_norm_before_last_layer": True,
}


def key_map(options: ModelOptions, rows: Transform) -> KeyMap:
    """The table for a model of ours, whose vocabulary's `rows` become theirs."""
    heads = options.num_attention_heads
    block = "encoder.blocks.{i}"
    attention = tuple(f"{_LAYER}.{part}.weight" for part in "qkv")
    names = {
        f"{block}.attention_norm": f"{_LAYER}.attention_norm",
        f"{block}.attention.out": f"{_LAYER}.wo",
        f"{block}.mlp_norm": f"{_LAYER}.ffn_norm",
        f"{block}.mlp.down": f"{_LAYER}.ffn.w3",
        "encoder.final_norm": "layer_norm_2",
    }
    table = [
        Entry(("encoder.embedding.tokens.weight",), ("encoder.weight",), rows),
        Entry((INVERSE_FREQUENCIES,), (), _computed(options.head_dim)),
        Entry((f"{block}.attention.qkv.weight",), attention, chain(split_qkv(heads), neighbour_pairs(heads))),
        Entry((f"{block}.mlp.up.weight",), (f"{_LAYER}.ffn.w12.weight",), gate_rows()),
        *(Entry((f"{ours}.weight",), (f"{theirs}.weight",)) for ours, theirs in names.items()),
        Entry(("head.weight",), ("decoder.weight",), rows),
        Entry(("head.bias",), ("decoder.bias",), rows),
    ]
    return KeyMap.build(table, options.num_layers)


def read_amplify(directory: Path, given: str | None = None) -> Weights:
    """Read such a directory; UserError for anything a model of ours would compute differently.

    `given` is the --tokenizer of a directory that does not tell it.
    """
    config = ForeignConfig.read(directory)
    for name, value in _NEEDED.items():  # which are the defaults of their class, too
        config.require(name, value, "only the kind of the published AMPLIFY models can be read", default=value)
    tokenizer, tokens, notes = read_vocabulary(directory, config, given, default="amplify")
    dropout = config.get("dropout_prob", float, 0.0)
    options = ModelOptions(
        **_CARRIED,
        tokenizer=tokenizer.name,
        num_layers=config.get("num_hidden_layers", int),
        hidden_size=config.get("hidden_size", int),
        num_attention_heads=config.get("num_attention_heads", int),
        ffn_hidden_size=swiglu_width(config.get("intermediate_size", int)),
        layernorm_epsilon=config.get("norm_eps", float),
        hidden_dropout=dropout,
        attention_dropout=dropout,
        init_method_std=config.get("decoder_init_range", float, 0.02),
    )
    checked(options, config.place)
    table = key_map(options, vocabulary_rows(tokenizer.tokens, tokens))
    return import_weights(table, read_tensors(directory), options, tokenizer, str(directory), tuple(notes))


def write_amplify(weights: Weights, directory: Path, dtype: str, shard_size: int) -> tuple[str, ...]:
    """Write such a directory with its tokenizer; returns what is not carried.

    Weights of more than `shard_size` bytes are cut into several files.
    """
    options, tokenizer = weights.options, weights.tokenizer
    require_options(options, _CARRIED, _NAME)
    require_letters(tokenizer, _NAME)
    if options.ffn_size % _WIDTH_MULTIPLE:
        raise UserError(
            f"--to {_NAME}: the width inside the model's MLPs is {options.ffn_size}, and AMPLIFY's is a multiple of "
            f"{_WIDTH_MULTIPLE}; --to native keeps it"
        )
    rows = vocabulary_rows(tokenizer.tokens, tokenizer.tokens)
    export = export_tensors(key_map(options, rows), weights, dtype)
    write_safetensors_shards(export.meta, export.stream, directory, shard_size)
    write_json(directory / CONFIG_JSON, _config(options, tokenizer, dtype))
    write_letter_tokenizer(tokenizer, directory, _MAX_LENGTH)
    if options.hidden_dropout == options.attention_dropout:
        return ()
    return (f"attention_dropout {options.attention_dropout}: AMPLIFY has one rate for all, {options.hidden_dropout}",)


def _config(options: ModelOptions, tokenizer: Tokenizer, dtype: str) -> dict[str, object]:
    return {
        "architectures": [MODEL_TYPE],
        "auto_map": {"AutoConfig": f"{_CODE}.AMPLIFYConfig", "AutoModel": f"{_CODE}.AMPLIFY"},
        "model_type": MODEL_TYPE,
        **_NEEDED,
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads,
        "intermediate_size": stated_width(options),
        "norm_eps": options.layernorm_epsilon,
        "dropout_prob": options.hidden_dropout,
        "embedding_init_range": options.init_method_std,
        "decoder_init_range": options.init_method_std,
        "max_length": _MAX_LENGTH,
        "pad_token_id": tokenizer.pad_id,
        "unk_token_id": tokenizer.unk_id,
        "mask_token_id": tokenizer.mask_id,
        "bos_token_id": tokenizer.cls_id,
        "eos_token_id": tokenizer.eos_id,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def swiglu_width(stated: int) -> int:
    """The width behind the gate, for the width that AMPLIFY's configuration states: two thirds, up to a multiple."""
    return -(-int(2 * stated / 3) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def stated_width(options: ModelOptions) -> int:
    """What to state for a model's width: four times the hidden size, as published, where that gives it."""
    usual = 4 * options.hidden_size
    return usual if swiglu_width(usual) == options.ffn_size else options.ffn_size * 3 // 2


def _computed(head_dim: int) -> Transform:
    """The rotary frequencies ↔ nothing; ValueError for others than those of the formula."""

    def drop(tensors: list[Tensor]) -> list[Tensor]:
        (frequencies,) = tensors
        if not frequencies.is_meta:
            expected = RotaryEmbedding(head_dim).inverse_frequencies
            if not torch.allclose(frequencies, expected, rtol=1e-6, atol=0.0):  # a power's last bit is the machine's
                raise ValueError("AMPLIFY computes its rotary frequencies, and those of this model are others")
        return []

    return Transform(forward=drop, backward=lambda tensors: tensors)
