"""`proteinlm-tape`: the names and files of ProteinLM's fork of tape-proteins, for pre-LN models.

config.json and pytorch_model.bin; keys as in the fork's `tape/models/modeling_bert.py` (ProteinBertForMaskedLM); rows
of the vocabulary in the order of TAPE's IUPAC tokens. The fork knows learned positions and the exact GELU only. A model
with rotary positions has config.json say so in fields of its own, `max_position_embeddings` is null, on which the
fork's constructor stops instead of running with random positions, and one tensor is added. At the tanh GELU,
`gelu_new`, the fork stops, too.

The fork's own directories have no model_type in config.json. They are read, too, as the model that their numbers were
made for; what the fork did to these is among the notes.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert import bert
from megatron_plm.convert.bert import TOKEN_TYPES
from megatron_plm.convert.config_json import (
    CONFIG_JSON,
    ForeignConfig,
    fields_from,
    model_type_of,
    options_from,
    require_letters,
    require_options,
    write_json,
)
from megatron_plm.convert.format import Format
from megatron_plm.convert.keymap import Entry, KeyMap, Transform, module
from megatron_plm.convert.lazy import compact
from megatron_plm.convert.pickles import write_pickle
from megatron_plm.convert.tensor_files import PYTORCH_FILE, holds_tensor, read_tensors
from megatron_plm.convert.transforms import (
    chain,
    repeat,
    split_qkv,
    vocabulary_rows,
    with_token_types,
)
from megatron_plm.convert.vocabulary import given_vocabulary
from megatron_plm.convert.weights import (
    INVERSE_FREQUENCIES,
    Weights,
    drop_not_carried,
    export_tensors,
    import_weights,
)
from megatron_plm.tokenizers import Tokenizer, get_tokenizer, token_roles

MODEL_TYPE = "proteinlm-tape"
_LAYER = "bert.encoder.layer.{i}"
_TIED_DECODER = "mlm.decoder.weight"
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # ours: transformers' name, of which TAPE has the first
_POSITIONS = {"rope": "rotary", "learned_absolute": "absolute"}

_CARRIED = {
    "norm_placement": "pre",
    "normalization": "LayerNorm",
    "activation": tuple(_ACTIVATIONS),
    "add_bias_linear": True,
    "embedding_layernorm": False,
    "head_transform": True,
    "untie_embeddings_and_output_weights": False,
}

# What the fork's own files hold beyond the model.
_FORKS_OWN = {
    _TIED_DECODER: "the fork takes the token embedding in its place when it loads the file",
    "bert.bert_tail_dense.weight": "a layer that the fork never runs",
    "bert.bert_tail_dense.bias": "a layer that the fork never runs",
}
_FORKS_HEAD = (
    "ProteinLM's head: the fork's converter leaves it out, so mlm.transform and mlm.bias are those of the model that "
    "it filled; --from megatron has ProteinLM's",
)
_FORKS_NORM = (
    "the fork's neglect of bert.encoder.final_ln, whose output it computes and drops: here it counts, as in ProteinLM",
)
_FORKS_GELU = (
    "the tanh GELU of ProteinLM's training: hidden_act is gelu, the exact one, as the fork computes; "
    "hidden_act gelu_new in config.json means the tanh form",
)
_FORKS_MARKS = ("bert.encoder.layer.0.input_ln.weight", "encoder.layer.0.input_ln.weight")
_TOKENIZER = "tape-iupac"


def key_map(options: ModelOptions, rows: Transform, num_token_types: int = 1) -> KeyMap:
    """The table of a model of ours, whose vocabulary's `rows` become theirs."""
    block = "encoder.blocks.{i}"
    attention = [f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")]
    table = [
        Entry(
            ("encoder.embedding.tokens.weight",),
            ("bert.embeddings.word_embeddings.weight", _TIED_DECODER),
            chain(rows, repeat(2)),
            optional=(_TIED_DECODER,),
        ),
        _positions(options, num_token_types),
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


def _positions(options: ModelOptions, num_token_types: int) -> Entry:
    if options.position_embedding_type == "rope":
        return Entry((INVERSE_FREQUENCIES,), ("bert.encoder.rotary.inverse_frequencies",))
    theirs = ("bert.embeddings.position_embeddings.weight", TOKEN_TYPES)
    return Entry(("encoder.embedding.positions.weight",), theirs, with_token_types(num_token_types))


def read_proteinlm_tape(directory: Path, *, tokenizer: str | None = None) -> Weights:
    """Read such a directory, whose vocabulary `tokenizer` tells where it is not TAPE's IUPAC; UserError for anything a
    model of ours cannot compute."""
    config = ForeignConfig.read(directory)
    ours, tokens = given_vocabulary(tokenizer, _TOKENIZER)
    require_vocabulary(config, len(tokens), tokenizer)
    is_forks_own = model_type_of(directory) == ""
    if is_forks_own:
        reason = (
            f"the fork's own models, which have no model_type, have learned positions; {MODEL_TYPE} has rotary ones"
        )
        config.require("position_embedding_type", _POSITIONS["learned_absolute"], reason, default="absolute")
    positions = config.choice("position_embedding_type", _POSITIONS, "absolute" if is_forks_own else None)
    options = options_from(
        config,
        ours,
        token_dropout=config.get("token_dropout", bool, False if is_forks_own else None),
        activation=config.choice("hidden_act", _ACTIVATIONS),
        position_embedding_type=positions,
        max_position_embeddings=config.get("max_position_embeddings", int) if positions != "rope" else None,
    )
    table = key_map(options, vocabulary_rows(ours.tokens, tokens), config.get("type_vocab_size", int, 1))
    kept = read_tensors(directory)
    notes: tuple[str, ...] = ()
    if is_forks_own:
        kept, notes = drop_not_carried(bert.with_prefix(kept, directory), {**bert.NOT_CARRIED, **_FORKS_OWN})
    if is_forks_own:
        gelu = _FORKS_GELU if options.activation == "gelu" else ()
        head = _FORKS_HEAD if "mlm.bias" in kept else ()
        notes = (*notes, *bert.token_type_notes(kept), *head, *_FORKS_NORM, *gelu)
    return import_weights(table, kept, options, ours, str(directory), notes)


def require_vocabulary(config: ForeignConfig, size: int, given: str | None) -> None:
    """UserError unless the configuration has that many tokens, of --tokenizer if `given`, else TAPE's."""
    of_tape = f"TAPE's IUPAC vocabulary has {size} tokens; convert it with --tokenizer if it has another one"
    config.require("vocab_size", size, of_tape if given is None else f"--tokenizer {given} has {size} tokens")


def write_proteinlm_tape(weights: Weights, directory: Path, dtype: str = "float32") -> tuple[str, ...]:
    """Write such a directory; returns what is not carried. One pickle: all is in memory when it is written."""
    tensors, lost = fork_tensors(weights, dtype)
    write_pickle(tensors, directory / PYTORCH_FILE)
    write_json(directory / CONFIG_JSON, fork_config(weights.options, dtype))
    return lost


def fork_tensors(weights: Weights, dtype: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The model's tensors by the fork's names, in memory, and what is not carried; UserError if the fork has no such
    model."""
    options, ours, theirs = weights.options, weights.tokenizer, _tape_tokenizer()
    require_options(options, _CARRIED, MODEL_TYPE)
    require_letters(ours, MODEL_TYPE)
    rows = vocabulary_rows(token_roles(ours), token_roles(theirs))
    export = export_tensors(key_map(options, rows), weights, dtype)
    tensors = {key: compact(tensor) for key, tensor in export.stream}
    return tensors, lost_rows(ours, theirs)


def lost_rows(ours: Tokenizer, theirs: Tokenizer) -> tuple[str, ...]:
    """What is not carried of a model with vocabulary `ours`, if anything."""
    lost = [t for t, role in zip(ours.tokens, token_roles(ours), strict=True) if role not in token_roles(theirs)]
    return (f"the rows of {', '.join(lost)}: TAPE's IUPAC vocabulary has no such tokens",) if lost else ()


def fork_config(options: ModelOptions, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "model_type": MODEL_TYPE,
        **fields_from(options, _tape_tokenizer(), dtype),
        "hidden_act": _ACTIVATIONS[options.activation],
        "position_embedding_type": _POSITIONS[options.position_embedding_type],
        "max_position_embeddings": options.max_position_embeddings,
        "type_vocab_size": 1,
        "token_dropout": options.token_dropout,
    }


def _tape_tokenizer() -> Tokenizer:
    return get_tokenizer(_TOKENIZER)


def _recognises(path: Path) -> bool:
    model_type = model_type_of(path)
    return model_type == MODEL_TYPE or (model_type == "" and holds_tensor(path, *_FORKS_MARKS))


FORMAT = Format(
    name=MODEL_TYPE,
    mark=CONFIG_JSON,
    recognises=_recognises,
    read=read_proteinlm_tape,
    write=write_proteinlm_tape,
    read_flags=("tokenizer",),
    looks_like=f"a {CONFIG_JSON} with model_type {MODEL_TYPE!r}",
)
