"""`megatron`: the checkpoints of ProteinLM, and of the Megatron-LM 1 and 2 it was made of (files: megatron_ranks.py).

Key names as in their `model/bert_model.py` and `language_model.py`; ProteinLM's vocabulary, whose rows are padded in
the files. Read at any number of tensor-parallel ranks and pipeline stages, in all three orders of query_key_value;
written as version 3.0 without stages.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import ForeignConfig, checked, require_options
from megatron_plm.convert.format import Format
from megatron_plm.convert.keymap import Entry, KeyMap, module
from megatron_plm.convert.lazy import compact
from megatron_plm.convert.megatron_ranks import (
    RANK_FILE,
    RELEASE,
    TRACKER_FILE,
    expected_files,
    iteration_folder,
    join_ranks,
    nested,
    part_of_rank,
    rank_files,
    read_rank,
    refuse_missing,
    shared_args,
)
from megatron_plm.convert.pickles import write_pickle
from megatron_plm.convert.transforms import chain, padded_rows, qkv_rows, repeat, vocabulary_rows
from megatron_plm.convert.weights import DTYPES, Weights, drop_not_carried, export_tensors, import_tensors
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.tokenizers import Tokenizer, get_tokenizer, token_roles

NAME = "megatron"
VERSION = 3.0
_TOKENIZER = "proteinlm"
_VOCABULARY_MULTIPLE = 128  # of rows that each rank has, --make-vocab-size-divisible-by
_LARGEST_MULTIPLE = 2**20
_LAYER = "language_model.transformer.layers.{i}"
_EMBEDDING_OF_HEAD = "word_embeddings_for_head.weight"  # the last stage's copy, where there are several

_CARRIED = {
    "norm_placement": "pre",
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "activation": ("gelu_tanh", "gelu"),
    "add_bias_linear": True,
    "embedding_layernorm": False,
    "head_transform": True,
    "untie_embeddings_and_output_weights": False,
    "token_dropout": False,
}

NOT_CARRIED = {
    "binary_head.weight": "the head for the next sentence, which proteins do not have",
    "binary_head.bias": "the head for the next sentence, which proteins do not have",
    "language_model.pooler.dense.weight": "the pooler, which a masked language model never reads",
    "language_model.pooler.dense.bias": "the pooler, which a masked language model never reads",
}


def key_map(
    options: ModelOptions, ours: Tokenizer, *, version: float, tensor_parallel_size: int, vocabulary_rows_stored: int
) -> KeyMap:
    """The table for a model of ours with vocabulary `ours`, and their tensors joined over ranks and stages."""
    theirs = get_tokenizer(_TOKENIZER)
    rows = chain(
        vocabulary_rows(token_roles(ours), token_roles(theirs)),
        padded_rows(theirs.vocab_size, vocabulary_rows_stored),
    )
    embedding = "language_model.embedding"
    block = "encoder.blocks.{i}"
    qkv = qkv_rows(version, tensor_parallel_size, options.num_attention_heads)
    table = [
        Entry(
            ("encoder.embedding.tokens.weight",),
            (f"{embedding}.word_embeddings.weight", _EMBEDDING_OF_HEAD),
            chain(rows, repeat(2)),
            optional=(_EMBEDDING_OF_HEAD,),
        ),
        Entry(("encoder.embedding.positions.weight",), (f"{embedding}.position_embeddings.weight",)),
        *module(f"{block}.attention_norm", f"{_LAYER}.input_layernorm"),
        *module(f"{block}.attention.qkv", f"{_LAYER}.attention.query_key_value", transform=qkv),
        *module(f"{block}.attention.out", f"{_LAYER}.attention.dense"),
        *module(f"{block}.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *module(f"{block}.mlp.up", f"{_LAYER}.mlp.dense_h_to_4h"),
        *module(f"{block}.mlp.down", f"{_LAYER}.mlp.dense_4h_to_h"),
        *module("encoder.final_norm", "language_model.transformer.final_layernorm"),
        *module("head.dense", "lm_head.dense"),
        *module("head.norm", "lm_head.layernorm"),
        Entry(("head.bias",), ("lm_head.bias",), rows),
    ]
    return KeyMap.build(table, options.num_layers)


def read_megatron(path: Path, *, trust_pickle: bool = False) -> Weights:
    """Read a checkpoint's folder, one iteration's, or the file of a single rank; the model has ProteinLM's vocabulary.

    `trust_pickle` lets the files name more than tensors, plain values and records: then they can run any code.
    """
    folder, files = _rank_files(path)
    stages = [[read_rank(file, trust_pickle=trust_pickle) for file in ranks] for ranks in files]
    version, args = _version_and_args(stages, files, str(path))
    size = "model_parallel_size" if version < VERSION else "tensor_model_parallel_size"
    num_stages = args.get("pipeline_model_parallel_size", int, len(stages))
    num_ranks = args.get(size, int, len(stages[0]))
    if (num_stages, num_ranks) != (len(stages), len(stages[0])):
        if folder is None:
            raise UserError(f"{path}: is one of {num_stages * num_ranks} ranks; give the folder that holds all of them")
        refuse_missing(folder, expected_files(folder, num_stages, num_ranks))
        raise UserError(f"{folder}: holds more ranks than the {num_stages * num_ranks} of its args; remove the others")
    options = _options_from(args)
    if options.num_attention_heads % num_ranks:
        raise UserError(
            f"{args.place} have {options.num_attention_heads} heads for {num_ranks} ranks, which cannot share them; "
            "fetch the checkpoint again"
        )
    multiple = args.get("make_vocab_size_divisible_by", int, _VOCABULARY_MULTIPLE)
    if not 1 <= multiple <= _LARGEST_MULTIPLE:
        raise UserError(
            f"{args.place}: make_vocab_size_divisible_by is {multiple}; expected 1 to {_LARGEST_MULTIPLE}; fetch the "
            "checkpoint again"
        )
    models = [[rank["model"] for rank in ranks] for ranks in stages]
    tensors, dropped = drop_not_carried(join_ranks(models, files), NOT_CARRIED)
    tokenizer = get_tokenizer(_TOKENIZER)
    table = key_map(
        options,
        tokenizer,
        version=version,
        tensor_parallel_size=num_ranks,
        vocabulary_rows_stored=_padded(tokenizer.vocab_size, multiple * num_ranks),
    )
    return Weights(options, tokenizer, import_tensors(table, tensors, options, tokenizer, str(path)), dropped)


def write_megatron(
    weights: Weights, directory: Path, dtype: str = "float32", target_tensor_parallel_size: int = 1
) -> tuple[str, ...]:
    """Write such a checkpoint, "release" in place of an iteration, rank by rank; returns what is not carried.

    A rank's file is one pickle: its weights are in memory when it is written.
    """
    options, tokenizer, num_ranks = weights.options, weights.tokenizer, target_tensor_parallel_size
    require_options(options, _CARRIED, NAME)
    if tokenizer.sha256 != get_tokenizer(_TOKENIZER).sha256:
        raise UserError(
            f"--to {NAME}: the model's vocabulary is {tokenizer.name}, and the format's is {_TOKENIZER}; --to native "
            "keeps it"
        )
    for name, count in (("attention heads", options.num_attention_heads), ("feed-forward features", options.ffn_size)):
        if num_ranks < 1 or count % num_ranks:
            raise UserError(
                f"--target-tensor-parallel-size {num_ranks}: does not divide the model's {count} {name}; give a number "
                "that does"
            )
    rows = _padded(tokenizer.vocab_size, _VOCABULARY_MULTIPLE * num_ranks)
    table = key_map(options, tokenizer, version=VERSION, tensor_parallel_size=num_ranks, vocabulary_rows_stored=rows)
    args = _args_from(options, dtype, num_ranks, rows)
    for rank, path in enumerate(expected_files(directory / RELEASE, 1, num_ranks)):
        path.parent.mkdir(parents=True)
        state = {"args": args, "checkpoint_version": VERSION, "iteration": 0}
        write_pickle({**state, "model": nested(_parts_of_rank(table, weights, dtype, rank, num_ranks))}, path)
    (directory / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
    return ()


def _parts_of_rank(table: KeyMap, weights: Weights, dtype: str, rank: int, num_ranks: int) -> dict[str, Tensor]:
    export = export_tensors(table, weights, dtype, leave_out=(_EMBEDDING_OF_HEAD,))
    return {name: compact(part_of_rank(name, tensor, rank, num_ranks)) for name, tensor in export.stream}


def recognises(path: Path) -> bool:
    """Whether `path` is such a checkpoint; UserError for one of megatron-core's own, which is none."""
    file = _single_file(path)
    return file.name == RANK_FILE if file is not None else path.is_dir() and _iteration_folder(path) is not None


def folder_read(path: Path) -> Path:
    """The folder whose ranks `read_megatron` reads for `path`; the file of a single rank where there is none."""
    folder, files = _rank_files(path)
    return files[0][0] if folder is None else folder


def _single_file(path: Path) -> Path | None:
    """The rank's file that `path` is, or directly holds."""
    return next((file for file in (path, path / RANK_FILE) if file.is_file()), None)


def _rank_files(path: Path) -> tuple[Path | None, list[list[Path]]]:
    """The folder with the ranks of the checkpoint that `path` means, and its stages' ranks' files.

    A file of one rank means all beside it; without such a folder around it the folder is None.
    """
    file = _single_file(path)
    folder = _iteration_folder(path if file is None else file.parent.parent)
    if file is not None and (folder is None or file.parent.parent != folder):
        return None, [[file]]
    if folder is None:
        raise UserError(f"{path}: has no {TRACKER_FILE} and no mp_rank_* folders; give a Megatron-LM checkpoint")
    return folder, rank_files(folder)


def _iteration_folder(path: Path) -> Path | None:
    folder = iteration_folder(path)
    for place in (path, *([folder] if folder else [])):
        try:
            metadata = json.loads((place / "metadata.json").read_text(encoding="utf-8"))
            backend = metadata["sharded_backend"]
        except (OSError, *JSON_ERRORS, LookupError, TypeError):
            continue
        raise UserError(
            f"{place}: holds a distributed checkpoint of megatron-core ({backend}), which cannot be read yet; save it "
            "there with --ckpt-format torch, which gives mp_rank_* folders"
        )
    return folder


def _version_and_args(
    stages: list[list[dict[str, Any]]], files: list[list[Path]], place: str
) -> tuple[float, ForeignConfig]:
    """The checkpoint's version and the arguments of the command that trained it; UserError if the ranks disagree."""
    ranks = [rank for stage in stages for rank in stage]
    for name in ("checkpoint_version", "iteration"):
        found = sorted({str(rank.get(name)) for rank in ranks})
        if len(found) > 1:
            raise UserError(f"{place}: its ranks have {name} {' and '.join(found)}; copy all ranks of one iteration")
    version = ranks[0].get("checkpoint_version", 0)
    is_number = isinstance(version, int | float) and not isinstance(version, bool)
    if not is_number or not (version in (0, 1) or 2 <= version <= VERSION):
        raise UserError(f"{place}: has checkpoint_version {version!r}; expected 0, 1, or 2 to {VERSION}")
    return version, ForeignConfig(shared_args(stages, files), f"{place}: args")


def _options_from(args: ForeignConfig) -> ModelOptions:
    args.require("apply_residual_connection_post_layernorm", False, "pre-LN models only can be read", default=False)
    args.require("openai_gelu", False, "the heads here have the exact GELU", default=False)
    num_layers, hidden_size = args.get("num_layers", int), args.get("hidden_size", int)
    args.require("num_unique_layers", num_layers, "each layer here has weights of its own", default=num_layers)
    inner_size = args.get("ffn_hidden_size", int, 4 * hidden_size)
    options = ModelOptions(
        tokenizer=_TOKENIZER,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=args.get("num_attention_heads", int),
        ffn_hidden_size=None if inner_size == 4 * hidden_size else inner_size,
        layernorm_epsilon=args.get("layernorm_epsilon", float),
        position_embedding_type="learned_absolute",
        max_position_embeddings=args.get("max_position_embeddings", int),
        # The fused kernel, which is on unless it was switched off, has the tanh form.
        activation="gelu_tanh" if args.get("bias_gelu_fusion", bool, True) else "gelu",
        hidden_dropout=args.get("hidden_dropout", float, 0.0),
        attention_dropout=args.get("attention_dropout", float, 0.0),
        token_dropout=False,
        init_method_std=args.get("init_method_std", float, 0.02),
    )
    return checked(options, args.place)


def _args_from(options: ModelOptions, dtype: str, num_ranks: int, rows: int) -> argparse.Namespace:
    """What `_options_from` reads, and what Megatron-LM compares with its own arguments when it loads."""
    return argparse.Namespace(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_size,
        num_attention_heads=options.num_attention_heads,
        max_position_embeddings=options.max_position_embeddings,
        layernorm_epsilon=options.layernorm_epsilon,
        apply_residual_connection_post_layernorm=False,
        openai_gelu=False,
        onnx_safe=None,
        bias_gelu_fusion=options.activation == "gelu_tanh",
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        init_method_std=options.init_method_std,
        make_vocab_size_divisible_by=_VOCABULARY_MULTIPLE,
        padded_vocab_size=rows,
        tokenizer_type="BertWordPieceLowerCase",
        tensor_model_parallel_size=num_ranks,
        pipeline_model_parallel_size=1,
        params_dtype=DTYPES[dtype],
        fp16=dtype == "float16",
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


FORMAT = Format(
    name=NAME,
    mark=f"{RELEASE}/mp_rank_00/{RANK_FILE}",  # a run's own folder, with iterations, has none
    recognises=recognises,
    read=read_megatron,
    write=write_megatron,
    looks_like=f"{TRACKER_FILE}, or mp_rank_* folders with {RANK_FILE}",
    read_flags=("trust_pickle",),
    write_flags=("target_tensor_parallel_size",),
)
