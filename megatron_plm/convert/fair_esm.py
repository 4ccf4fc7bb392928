"""`fair-esm`: the files that ESM-2 was published in, NAME.pt, with its contact head in NAME-contact-regression.pt.

A pickle of {"cfg": {"model": Namespace}, "model": tensors by name}; names as in fair-esm's `esm/model/esm2.py`, behind
the prefixes that its `pretrained.py` takes off.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import CONFIG_JSON, ForeignConfig, checked, require_options
from megatron_plm.convert.format import Format
from megatron_plm.convert.keymap import Entry, KeyMap, module
from megatron_plm.convert.lazy import compact, joined, renamed
from megatron_plm.convert.pickles import PLAIN_RECORDS, read_pickle, tensors_by_name, write_pickle
from megatron_plm.convert.transforms import chain, repeat, split_qkv, vocabulary_rows
from megatron_plm.convert.weights import (
    CONTACT_HEAD,
    INVERSE_FREQUENCIES,
    Weights,
    export_tensors,
    import_weights,
)
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer, get_tokenizer

NAME = "fair-esm"
FILE = "esm2.pt"  # fair-esm takes a file for ESM-2 by the beginning of its name
_REGRESSION = "-contact-regression"
_TOKENIZER = "esm2"
_LAYER = "layers.{i}"
_FREQUENCIES = f"{_LAYER}.self_attn.rot_emb.inv_freq"
_TIED_OUTPUT = "lm_head.weight"
_PREFIX = re.compile(r"^encoder\.(sentence_encoder\.)?")

_CARRIED = {
    "norm_placement": "pre",
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "activation": "gelu",
    "add_bias_linear": True,
    "embedding_layernorm": False,
    "head_transform": True,
    "untie_embeddings_and_output_weights": False,
}


def key_map(options: ModelOptions, ours: Tokenizer) -> KeyMap:
    """The table for a model of ours with vocabulary `ours`; their names are without prefix."""
    rows = vocabulary_rows(ours.tokens, get_tokenizer(_TOKENIZER).tokens)
    block = "encoder.blocks.{i}"
    attention = [f"{_LAYER}.self_attn.{part}_proj" for part in "qkv"]
    table = [
        Entry(
            ("encoder.embedding.tokens.weight",),
            ("embed_tokens.weight", _TIED_OUTPUT),
            chain(rows, repeat(2)),
            optional=(_TIED_OUTPUT,),
        ),
        Entry((INVERSE_FREQUENCIES,), (_FREQUENCIES,), repeat(options.num_layers), optional=(_FREQUENCIES,)),
        *module(f"{block}.attention_norm", f"{_LAYER}.self_attn_layer_norm"),
        *module(f"{block}.attention.qkv", *attention, transform=split_qkv(options.num_attention_heads)),
        *module(f"{block}.attention.out", f"{_LAYER}.self_attn.out_proj"),
        *module(f"{block}.mlp_norm", f"{_LAYER}.final_layer_norm"),
        *module(f"{block}.mlp.up", f"{_LAYER}.fc1"),
        *module(f"{block}.mlp.down", f"{_LAYER}.fc2"),
        *module("encoder.final_norm", "emb_layer_norm_after"),
        *module("head.dense", "lm_head.dense"),
        *module("head.norm", "lm_head.layer_norm"),
        Entry(("head.bias",), ("lm_head.bias",), rows),
        *module("contact_head.regression", "contact_head.regression", optional=True),
    ]
    return KeyMap.build(table, options.num_layers)


def read_fair_esm(path: Path, *, trust_pickle: bool = False) -> Weights:
    """Read the file of an ESM-2 model, or a directory with one.

    `trust_pickle` lets the file name more than tensors, plain values and records: then it can run any code.
    """
    file = _model_file(path)
    if file is None:
        raise UserError(f"{path}: holds no NAME.pt, or several; give the file of one ESM-2 model")
    content = read_pickle(file, records=PLAIN_RECORDS, trust=trust_pickle)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file}: expected what fair-esm saves, with entries 'cfg' and 'model', found other things")
    config = _config_of(content, file)
    tokenizer = get_tokenizer(_TOKENIZER)
    options = ModelOptions(
        tokenizer=tokenizer.name,
        num_layers=config.get("encoder_layers", int),
        hidden_size=config.get("encoder_embed_dim", int),
        num_attention_heads=config.get("encoder_attention_heads", int),
        token_dropout=config.get("token_dropout", bool),
    )
    checked(options, str(file))
    found = tensors_by_name(content["model"], file)
    stripped = renamed(found, {_PREFIX.sub("", key): key for key in found})
    stripped = joined(stripped, _regression(file, trust_pickle=trust_pickle))
    return import_weights(key_map(options, tokenizer), stripped, options, tokenizer, str(file))


def write_fair_esm(weights: Weights, directory: Path, dtype: str = "float32") -> tuple[str, ...]:
    """Write the file into `directory`; returns what is not carried. One pickle: all is in memory when it is written."""
    options, tokenizer = weights.options, weights.tokenizer
    require_options(options, _CARRIED, NAME)
    if tokenizer.sha256 != get_tokenizer(_TOKENIZER).sha256 or options.ffn_size != 4 * options.hidden_size:
        raise UserError(
            f"--to {NAME}: its models have the {_TOKENIZER} vocabulary and MLPs of four times the hidden size; this "
            f"one has {tokenizer.name} and {options.ffn_size} for {options.hidden_size}; --to native keeps it"
        )
    export = export_tensors(key_map(options, tokenizer), weights, dtype)
    model = argparse.Namespace(
        arch="esm2",
        encoder_layers=options.num_layers,
        encoder_embed_dim=options.hidden_size,
        encoder_attention_heads=options.num_attention_heads,
        token_dropout=options.token_dropout,
    )
    tensors = {key: compact(tensor) for key, tensor in export.stream}
    regression = {key: tensors.pop(key) for key in CONTACT_HEAD if key in tensors}
    content = {_published(key): tensor for key, tensor in tensors.items()}
    write_pickle({"cfg": {"model": model}, "model": content}, directory / FILE)
    if regression:
        write_pickle({"model": regression}, _regression_file(directory / FILE))
    absent = (
        "contact_head.regression: this model has none; fair-esm's loader of files asks for it beside the weights, "
        "load_model_and_alphabet_core does not"
    )
    dropout = {name: getattr(options, name) for name in ("hidden_dropout", "attention_dropout")}
    return (
        *(f"{name} {rate}: fair-esm has no dropout" for name, rate in dropout.items() if rate),
        *(() if regression else (absent,)),
    )


def _regression_file(file: Path) -> Path:
    """Where the contact head of the model in `file` lies."""
    return file.with_name(f"{file.stem}{_REGRESSION}.pt")


def _regression(file: Path, *, trust_pickle: bool) -> Mapping[str, Tensor]:
    """The tensors of the contact head of the model in `file`; none where it has no such file."""
    beside = _regression_file(file)
    if not beside.exists():
        return {}
    content = read_pickle(beside, records=PLAIN_RECORDS, trust=trust_pickle)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(
            f"{beside}: expected a contact head as fair-esm saves it, an entry 'model'; remove it, or fetch it"
        )
    return tensors_by_name(content["model"], beside)


def _published(key: str) -> str:
    return f"encoder.{key}" if key.startswith("lm_head.") else f"encoder.sentence_encoder.{key}"


def _model_file(path: Path) -> Path | None:
    """The file of a model that `path` means; None if it means none, or several."""
    if path.is_file():
        return path if path.suffix == ".pt" else None
    files = [file for file in path.glob("*.pt") if not file.stem.endswith(_REGRESSION)]
    return files[0] if len(files) == 1 else None


def _config_of(content: dict[str, Any], file: Path) -> ForeignConfig:
    """The arguments of an ESM-2 model; UserError if it is another one of fair-esm's."""
    cfg = content.get("cfg")
    args = cfg.get("model") if isinstance(cfg, dict) else content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise UserError(f"{file}: has no Namespace in 'cfg' or 'args', so the shape of its model is unknown")
    arch = getattr(args, "arch", None)
    if not hasattr(args, "encoder_layers") or (isinstance(arch, str) and not arch.startswith("esm2") and cfg is None):
        raise UserError(f"{file}: its architecture is {arch!r}; of fair-esm's models only ESM-2 can be read")
    return ForeignConfig(vars(args), str(file))


FORMAT = Format(
    name=NAME,
    mark=FILE,
    recognises=lambda path: _model_file(path) is not None and not (path / CONFIG_JSON).exists(),
    read=read_fair_esm,
    write=write_fair_esm,
    looks_like="NAME.pt, or a directory with one",
    read_flags=("trust_pickle",),
    has_contact_head=True,
)
