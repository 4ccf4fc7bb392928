"""`megatron`: the checkpoints of ProteinLM, and of the Megatron-LM 1 and 2 it was made of (files: megatron_ranks.py).

Key names as in their `model/bert_model.py` and `language_model.py`. The files do not tell the vocabulary, whose rows
are padded in them: it is ProteinLM's, unless vocab.txt beside them or --tokenizer say otherwise. Read at any number of
tensor-parallel ranks and pipeline stages, in all three orders of query_key_value; written as version 3.0, no stages.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import require_letters, require_options
from megatron_plm.convert.format import Format
from megatron_plm.convert.keymap import Entry, KeyMap, module
from megatron_plm.convert.lazy import compact
from megatron_plm.convert.megatron_args import VERSION, VOCABULARY_MULTIPLE, args_from, options_from, version_and_args
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
)
from megatron_plm.convert.pickles import write_pickle
from megatron_plm.convert.transforms import chain, padded_rows, qkv_rows, repeat, vocabulary_rows
from megatron_plm.convert.vocabulary import VOCABULARY_FILE, given_vocabulary, vocabulary_in
from megatron_plm.convert.weights import DTYPES, Weights, drop_not_carried, export_tensors, import_weights
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.tokenizers import Tokenizer

NAME = "megatron"
_TOKENIZER = "proteinlm"
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
    options: ModelOptions, ours: Tokenizer, theirs: Sequence[str], *, version: float, tensor_parallel_size: int,
    vocabulary_rows_stored: int,
) -> KeyMap:  # fmt: skip
    """The table for a model of ours with vocabulary `ours`, and their tensors joined over ranks and stages, with the
    rows of the tokens `theirs`."""
    rows = chain(vocabulary_rows(ours.tokens, theirs), padded_rows(len(theirs), vocabulary_rows_stored))
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


def read_megatron(path: Path, *, trust_pickle: bool = False, tokenizer: str | None = None) -> Weights:
    """Read a checkpoint's folder, one iteration's, or the file of a single rank.

    Its vocabulary is that of vocab.txt beside the tracker, or the one that `tokenizer` means, or else ProteinLM's;
    UserError where both are there and differ.
    `trust_pickle` lets the files name more than tensors, plain values and records: then they can run any code.
    """
    folder, files = _rank_files(path)
    stages = [[read_rank(file, trust_pickle=trust_pickle) for file in ranks] for ranks in files]
    version, args = version_and_args(stages, files, str(path))
    size = "model_parallel_size" if version < VERSION else "tensor_model_parallel_size"
    num_stages = args.get("pipeline_model_parallel_size", int, len(stages))
    num_ranks = args.get(size, int, len(stages[0]))
    if (num_stages, num_ranks) != (len(stages), len(stages[0])):
        if folder is None:
            raise UserError(f"{path}: is one of {num_stages * num_ranks} ranks; give the folder that holds all of them")
        refuse_missing(folder, expected_files(folder, num_stages, num_ranks))
        raise UserError(f"{folder}: holds more ranks than the {num_stages * num_ranks} of its args; remove the others")
    ours, tokens = _vocabulary(folder, tokenizer)
    options = options_from(args, ours)
    if options.num_attention_heads % num_ranks:
        raise UserError(
            f"{args.place} have {options.num_attention_heads} heads for {num_ranks} ranks, which cannot share them; "
            "fetch the checkpoint again"
        )
    multiple = args.get("make_vocab_size_divisible_by", int, VOCABULARY_MULTIPLE)
    if not 1 <= multiple <= _LARGEST_MULTIPLE:
        raise UserError(
            f"{args.place}: make_vocab_size_divisible_by is {multiple}; expected 1 to {_LARGEST_MULTIPLE}; fetch the "
            "checkpoint again"
        )
    models = [[rank["model"] for rank in ranks] for ranks in stages]
    tensors, dropped = drop_not_carried(join_ranks(models, files), NOT_CARRIED)
    table = key_map(
        options,
        ours,
        tokens,
        version=version,
        tensor_parallel_size=num_ranks,
        vocabulary_rows_stored=_padded(len(tokens), multiple * num_ranks),
    )
    return import_weights(table, tensors, options, ours, str(path), dropped)


def write_megatron(
    weights: Weights, directory: Path, dtype: str = "float32", target_tensor_parallel_size: int = 1
) -> tuple[str, ...]:
    """Write such a checkpoint, "release" in place of an iteration, rank by rank; returns what is not carried.

    A rank's file is one pickle: its weights are in memory when it is written.
    """
    options, tokenizer, num_ranks = weights.options, weights.tokenizer, target_tensor_parallel_size
    require_options(options, _CARRIED, NAME)
    require_letters(tokenizer, NAME)
    for name, count in (("attention heads", options.num_attention_heads), ("feed-forward features", options.ffn_size)):
        if num_ranks < 1 or count % num_ranks:
            raise UserError(
                f"--target-tensor-parallel-size {num_ranks}: does not divide the model's {count} {name}; give a number "
                "that does"
            )
    rows = _padded(tokenizer.vocab_size, VOCABULARY_MULTIPLE * num_ranks)
    table = key_map(
        options, tokenizer, tokenizer.tokens, version=VERSION, tensor_parallel_size=num_ranks,
        vocabulary_rows_stored=rows,
    )  # fmt: skip
    args = args_from(options, DTYPES[dtype], num_ranks, rows)
    for rank, path in enumerate(expected_files(directory / RELEASE, 1, num_ranks)):
        path.parent.mkdir(parents=True)
        state = {"args": args, "checkpoint_version": VERSION, "iteration": 0}
        write_pickle({**state, "model": nested(_parts_of_rank(table, weights, dtype, rank, num_ranks))}, path)
    (directory / VOCABULARY_FILE).write_text("\n".join(tokenizer.tokens) + "\n", encoding="utf-8")
    (directory / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
    return ()


def _vocabulary(folder: Path | None, given: str | None) -> tuple[Tokenizer, list[str]]:
    """The vocabulary of the checkpoint with its ranks in `folder`, and its tokens in the order of the rows."""
    beside = None if folder is None else folder.parent / VOCABULARY_FILE
    if beside is None or not beside.exists():
        return given_vocabulary(given, _TOKENIZER)
    told = vocabulary_in(beside)
    if given is not None and given_vocabulary(given, _TOKENIZER) != told:
        raise UserError(
            f"--tokenizer {given}: {beside} says otherwise what the rows mean; leave the flag out, or move the file"
        )
    return told


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


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


FORMAT = Format(
    name=NAME,
    mark=f"{RELEASE}/mp_rank_00/{RANK_FILE}",  # a run's own folder, with iterations, has none
    recognises=recognises,
    read=read_megatron,
    write=write_megatron,
    looks_like=f"{TRACKER_FILE}, or mp_rank_* folders with {RANK_FILE}",
    read_flags=("trust_pickle", "tokenizer"),
    write_flags=("target_tensor_parallel_size",),
)
