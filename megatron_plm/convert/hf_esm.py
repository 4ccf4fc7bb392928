"""The layout of transformers' EsmForMaskedLM (4.46 to 5.x) in `huggingface` directories.

Field, key and file names are those of its `models/esm`; neither direction imports it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import (
    CONFIG_JSON,
    ForeignConfig,
    fields_from,
    options_from,
    require_letters,
    require_options,
    write_json,
)
from megatron_plm.convert.hf_tokenizer import read_vocabulary, special_tokens
from megatron_plm.convert.keymap import Entry, KeyMap, module
from megatron_plm.convert.other_names import NORM_NAMES, with_current_names
from megatron_plm.convert.tensor_files import read_tensors, write_safetensors_shards
from megatron_plm.convert.transforms import chain, repeat, split_qkv, vocabulary_rows
from megatron_plm.convert.vocabulary import VOCABULARY_FILE
from megatron_plm.convert.weights import (
    INVERSE_FREQUENCIES,
    Weights,
    drop_not_carried,
    export_tensors,
    import_weights,
)
from megatron_plm.tokenizers import Tokenizer

MODEL_TYPE = "esm"
_NAME = "huggingface"
_TIED_DECODER = "lm_head.decoder.weight"
_LAYER = "esm.encoder.layer.{i}"
_FREQUENCIES = f"{_LAYER}.attention.self.rotary_embeddings.inv_freq"

# The options of every ESM-2; the other ones of a model can be told in config.json.
_CARRIED = {
    "norm_placement": "pre",
    "normalization": "LayerNorm",
    "position_embedding_type": "rope",
    "activation": "gelu",
    "add_bias_linear": True,
    "head_transform": True,
    "untie_embeddings_and_output_weights": False,
}

# What their files may hold that a masked language model of ours has no place for.
NOT_CARRIED = {
    "esm.embeddings.position_embeddings.weight": "absolute positions, which a rotary model never reads",
    "esm.embeddings.position_ids": "a constant",
    "esm.pooler.dense.weight": "the pooler, which a masked language model never reads",
    "esm.pooler.dense.bias": "the pooler, which a masked language model never reads",
}

# Names that some versions of transformers write for the same tensors; a model that was saved without a head has no
# prefix.
_OTHER_NAMES = (
    (re.compile(r"^(?=(embeddings|encoder|pooler|contact_head|rotary_embeddings)\.)"), "esm."),
    *NORM_NAMES,
    (re.compile(r"^esm\.rotary_embeddings\.inv_freq$"), _FREQUENCIES.replace("{i}", "0")),
    (re.compile(re.escape(_FREQUENCIES.replace("{i}", "*"))), _FREQUENCIES.replace("{i}", "0")),
)


def key_map(options: ModelOptions, ours: Tokenizer, theirs: Sequence[str]) -> KeyMap:
    """The table for a model of ours with vocabulary `ours` and files of theirs with the tokens `theirs`."""
    rows = vocabulary_rows(ours.tokens, theirs)
    block = "encoder.blocks.{i}"
    attention = [f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")]
    table = [
        Entry(
            ("encoder.embedding.tokens.weight",),
            ("esm.embeddings.word_embeddings.weight", _TIED_DECODER),
            chain(rows, repeat(2)),
            optional=(_TIED_DECODER,),
        ),
        Entry((INVERSE_FREQUENCIES,), (_FREQUENCIES,), repeat(options.num_layers), optional=(_FREQUENCIES,)),
        *module(f"{block}.attention_norm", f"{_LAYER}.attention.LayerNorm"),
        *module(f"{block}.attention.qkv", *attention, transform=split_qkv(options.num_attention_heads)),
        *module(f"{block}.attention.out", f"{_LAYER}.attention.output.dense"),
        *module(f"{block}.mlp_norm", f"{_LAYER}.LayerNorm"),
        *module(f"{block}.mlp.up", f"{_LAYER}.intermediate.dense"),
        *module(f"{block}.mlp.down", f"{_LAYER}.output.dense"),
        *module("encoder.final_norm", "esm.encoder.emb_layer_norm_after"),
        *module("head.dense", "lm_head.dense"),
        *module("head.norm", "lm_head.layer_norm"),
        Entry(("head.bias",), ("lm_head.bias",), rows),
        *module("contact_head.regression", "esm.contact_head.regression", optional=True),
    ]
    if options.embedding_layernorm:
        table += module("encoder.embedding.norm", "esm.embeddings.layer_norm")
    return KeyMap.build(table, options.num_layers)


def read_esm(directory: Path, given: str | None = None) -> Weights:
    """Read an EsmForMaskedLM directory; UserError for anything a model of ours would compute differently.

    `given` is the --tokenizer of a directory that does not tell it.
    """
    config = ForeignConfig.read(directory)
    config.require("model_type", MODEL_TYPE, "only EsmForMaskedLM models can be read")
    config.require("rope_theta", 10000.0, "the models here have rotary positions of base 10000", default=10000.0)
    config.require("position_embedding_type", "rotary", "ESM-2 has rotary positions", default="absolute")
    for name in ("is_decoder", "add_cross_attention", "is_folding_model"):
        config.require(name, False, "the models here are plain ESM-2 encoders", default=False)
    tokenizer, tokens, notes = read_vocabulary(directory, config, given, default="esm2")
    for name, token_id in (("mask_token_id", tokenizer.mask_id), ("pad_token_id", tokenizer.pad_id)):
        config.require(name, tokens.index(tokenizer.tokens[token_id]), "the tokenizer has that token elsewhere")
    options = options_from(
        config,
        tokenizer,
        token_dropout=config.get("token_dropout", bool),
        embedding_layernorm=config.get("emb_layer_norm_before", bool, False),
    )
    found = with_current_names(read_tensors(directory), _OTHER_NAMES, directory)
    tensors, dropped = drop_not_carried(found, NOT_CARRIED)
    table = key_map(options, tokenizer, tokens)
    return import_weights(table, tensors, options, tokenizer, str(directory), (*notes, *dropped))


def write_esm(weights: Weights, directory: Path, dtype: str, shard_size: int) -> tuple[str, ...]:
    """Write an EsmForMaskedLM directory with its tokenizer; returns what is not carried.

    Weights of more than `shard_size` bytes are cut into several files.
    """
    options, tokenizer = weights.options, weights.tokenizer
    require_options(options, _CARRIED, _NAME)
    require_letters(tokenizer, _NAME)
    table = key_map(options, tokenizer, tokenizer.tokens)
    # transformers ties the decoder again; safetensors stores no tensor under two names
    export = export_tensors(table, weights, dtype, leave_out=(_TIED_DECODER,))
    write_safetensors_shards(export.meta, export.stream, directory, shard_size)
    config = {
        "architectures": ["EsmForMaskedLM"],
        "model_type": MODEL_TYPE,
        **fields_from(options, tokenizer, dtype),
        "position_embedding_type": "rotary",
        "token_dropout": options.token_dropout,
        "emb_layer_norm_before": options.embedding_layernorm,
        "mask_token_id": tokenizer.mask_id,
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.eos_id,
    }
    write_json(directory / CONFIG_JSON, config)
    (directory / VOCABULARY_FILE).write_text("\n".join(tokenizer.tokens), encoding="utf-8")
    special = special_tokens(tokenizer)
    write_json(directory / "special_tokens_map.json", special)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "EsmTokenizer", **special})
    if weights.has_contact_head:
        return ()
    return ("esm.contact_head.regression: this model has none, so transformers' predict_contacts would be random",)
