"""`proteinlm-tape`: the names and files of ProteinLM's fork of tape-proteins, for pre-LN models.

config.json and pytorch_model.bin; keys as in the fork's `tape/models/modeling_bert.py` (ProteinBertForMaskedLM); rows
of the vocabulary in the order of TAPE's IUPAC tokens. The fork itself knows learned positions only. A model here has
rotary positions and may have token dropout: config.json says so in fields of its own, `max_position_embeddings` is
null, on which the fork's constructor stops instead of running with random positions, and one tensor is added.
"""

from pathlib import Path

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import (
    CONFIG_JSON,
    ForeignConfig,
    dropout_notes,
    fields_from,
    model_type_of,
    options_from,
    write_json,
)
from megatron_plm.convert.format import Format
from megatron_plm.convert.keymap import Entry, KeyMap, module
from megatron_plm.convert.lazy import compact
from megatron_plm.convert.pickles import write_pickle
from megatron_plm.convert.tensor_files import PYTORCH_FILE, read_tensors
from megatron_plm.convert.transforms import chain, repeat, split_qkv, token_roles, vocabulary_rows
from megatron_plm.convert.weights import INVERSE_FREQUENCIES, Weights, export_tensors, import_tensors
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer, get_tokenizer

MODEL_TYPE = "proteinlm-tape"
_LAYER = "bert.encoder.layer.{i}"


def key_map(options: ModelOptions, ours: Tokenizer) -> KeyMap:
    """The table for a model of ours with vocabulary `ours`."""
    theirs = _tape_tokenizer()
    rows = vocabulary_rows(token_roles(ours), token_roles(theirs))
    block = "encoder.blocks.{i}"
    attention = [f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")]
    table = [
        Entry(
            ("encoder.embedding.tokens.weight",),
            ("bert.embeddings.word_embeddings.weight", "mlm.decoder.weight"),
            chain(rows, repeat(2)),
        ),
        Entry((INVERSE_FREQUENCIES,), ("bert.encoder.rotary.inverse_frequencies",)),
        *module(f"{block}.attention_norm", f"{_LAYER}.input_ln"),
        *module(f"{block}.attention.qkv", *attention, transform=split_qkv(options.num_attention_heads)),
        *module(f"{block}.attention.out", f"{_LAYER}.attention.dense"),
        *module(f"{block}.mlp_norm", f"{_LAYER}.post_attn_ln"),
        *module(f"{block}.mlp.up", f"{_LAYER}.mlp.dense_h_4h"),
        *module(f"{block}.mlp.down", f"{_LAYER}.mlp.dense_4h_h"),
        *module("encoder.final_norm", "bert.encoder.final_ln"),
        *module("head.dense", "mlm.transform.dense"),
        *module("head.norm", "mlm.transform.LayerNorm"),
        Entry(("head.bias",), ("mlm.bias",), rows),
    ]
    return KeyMap.build(table, options.num_layers)


def read_proteinlm_tape(directory: Path) -> Weights:
    """Read such a directory; the model has TAPE's IUPAC vocabulary. UserError for anything it cannot compute."""
    config = ForeignConfig(directory)
    tokenizer = _tape_tokenizer()
    config.require("model_type", MODEL_TYPE, "only directories that megatron-plm wrote can be read")
    config.require("vocab_size", tokenizer.vocab_size, f"TAPE's IUPAC vocabulary has {tokenizer.vocab_size} tokens")
    config.require("hidden_act", "gelu", "the models here have the exact (erf) GELU, which TAPE calls gelu")
    options = options_from(config, tokenizer)
    found = read_tensors(directory)
    tensors = import_tensors(key_map(options, tokenizer), found, options, tokenizer, str(directory))
    return Weights(options, tokenizer, tensors, dropout_notes(config))


def write_proteinlm_tape(weights: Weights, directory: Path, dtype: str = "float32") -> tuple[str, ...]:
    """Write such a directory; returns what is not carried. The format is one pickle: all is in memory when it is written."""
    options, ours, theirs = weights.options, weights.tokenizer, _tape_tokenizer()
    if not ours.one_letter_a_token:
        raise UserError(
            f"--to {MODEL_TYPE}: the model's tokens are the pieces of {ours.name}, and TAPE's are letters; --to native "
            "keeps the model with its tokenizer"
        )
    export = export_tensors(key_map(options, ours), weights, dtype)
    write_pickle({key: compact(tensor) for key, tensor in export.stream}, directory / PYTORCH_FILE)
    config = {
        "model_type": MODEL_TYPE,
        **fields_from(options, theirs, dtype),
        "hidden_act": "gelu",
        "max_position_embeddings": None,
    }
    write_json(directory / CONFIG_JSON, config)
    lost = [t for t, role in zip(ours.tokens, token_roles(ours), strict=True) if role not in token_roles(theirs)]
    return (f"the rows of {', '.join(lost)}: TAPE's IUPAC vocabulary has no such tokens",) if lost else ()


def _tape_tokenizer() -> Tokenizer:
    return get_tokenizer("tape-iupac")


FORMAT = Format(
    name=MODEL_TYPE,
    mark=CONFIG_JSON,
    recognises=lambda path: model_type_of(path) == MODEL_TYPE,
    read=read_proteinlm_tape,
    write=write_proteinlm_tape,
    looks_like=f"a {CONFIG_JSON} with model_type {MODEL_TYPE!r}",
)
