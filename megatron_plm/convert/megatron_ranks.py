"""The rank files of a Megatron-LM checkpoint: found, joined to whole tensors, and cut.

    latest_checkpointed_iteration.txt                        the number of an iteration, or "release"
    iter_0001000/mp_rank_00/model_optim_rng.pt               one folder a tensor-parallel rank,
    iter_0001000/mp_rank_00_000/model_optim_rng.pt           with more than one pipeline stage also one a stage

Layout, names and the dimensions that ranks share: megatron/checkpointing.py and megatron/mpu/layers.py of Megatron-LM
1 and 2. Modules nest as dictionaries; here their names are joined by dots, and the layers, which each stage counts from
0, are counted through.
"""

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plm.convert.keymap import listed
from megatron_plm.convert.lazy import LazyTensors
from megatron_plm.convert.pickles import PLAIN_RECORDS, read_pickle
from megatron_plm.convert.transforms import same_values
from megatron_plm.errors import UserError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
RELEASE = "release"  # in place of an iteration: weights that no training goes on from

# Where a dictionary ends and names with dots begin.
_MODULES = (
    "language_model.embedding.word_embeddings",
    "language_model.embedding.position_embeddings",
    "language_model.transformer",
    "lm_head",
)
# The dimension along which the ranks of a stage hold a tensor's parts; of all others each has the whole.
_SPLIT_DIMS = (
    (re.compile(r"(query_key_value|dense_h_to_4h)\.(weight|bias)$|word_embeddings\w*\.weight$|^lm_head\.bias$"), 0),
    (re.compile(r"(attention\.dense|dense_4h_to_h)\.weight$"), 1),
)
# The fields of args that all ranks share: what the model is, and how it was cut.
_ARCHITECTURE = (
    "num_layers", "num_unique_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
    "max_position_embeddings", "layernorm_epsilon", "apply_residual_connection_post_layernorm", "openai_gelu",
    "bias_gelu_fusion", "make_vocab_size_divisible_by", "model_parallel_size", "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)  # fmt: skip
_RANK_FOLDER = re.compile(r"mp_rank_([0-9]{2,6})(?:_([0-9]{3,6}))?")
_ITERATION = re.compile(r"[0-9]{1,12}")
_LAYER = re.compile(r"^(language_model\.transformer\.layers\.)(\d+)(?=\.)")


def iteration_folder(path: Path) -> Path | None:
    """The folder with the ranks of the checkpoint at `path`: itself, or the one its tracker names; None if neither.

    Raises UserError where the tracker names what is not there.
    """
    tracker = path / TRACKER_FILE
    if not tracker.is_file():
        return path if any(_RANK_FOLDER.fullmatch(child.name) for child in path.glob("mp_rank_*")) else None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != RELEASE and not _ITERATION.fullmatch(text):
        raise UserError(f"{tracker}: is {text[:40]!r}; expected the number of an iteration or {RELEASE!r}")
    folder = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise UserError(f"{folder}: is missing, and {tracker.name} names it; copy the checkpoint again")
    return folder


def rank_files(folder: Path) -> list[list[Path]]:
    """The files of each pipeline stage's tensor-parallel ranks; UserError, naming them, if some are missing."""
    found: dict[tuple[int, int], Path] = {}
    for child in folder.glob("mp_rank_*"):
        match = _RANK_FOLDER.fullmatch(child.name)
        if match is not None:
            found[int(match[2] or 0), int(match[1])] = child / RANK_FILE
    num_stages, num_ranks = (1 + max(numbers) for numbers in zip(*found, strict=True))
    refuse_missing(folder, expected_files(folder, num_stages, num_ranks))
    return [[found[stage, rank] for rank in range(num_ranks)] for stage in range(num_stages)]


def refuse_missing(folder: Path, files: Sequence[Path]) -> None:
    """Raise UserError listing those of a checkpoint's files that are not there."""
    missing = [str(path.relative_to(folder)) for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{folder}: {listed(missing)} missing; copy all ranks of the checkpoint")


def expected_files(folder: Path, num_stages: int, num_ranks: int) -> list[Path]:
    """The files of a checkpoint of so many pipeline stages and tensor-parallel ranks."""
    return [
        folder / _folder_name(stage, rank, num_stages) / RANK_FILE
        for stage in range(num_stages)
        for rank in range(num_ranks)
    ]


def read_rank(path: Path, *, trust_pickle: bool) -> dict[str, Any]:
    """The content of one rank's file, its tensors left in the file; UserError if it is no such file."""
    content = read_pickle(path, records=PLAIN_RECORDS, trust=trust_pickle)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: expected a Megatron-LM checkpoint with an entry 'model', found other things")
    return content


def shared_args(stages: Sequence[Sequence[Mapping[str, Any]]], files: Sequence[Sequence[Path]]) -> dict[str, Any]:
    """The arguments saved in the ranks' files; UserError if one has none, or of another architecture than the first."""
    first = stages[0][0].get("args")
    for rank, file in zip(itertools.chain(*stages), itertools.chain(*files), strict=True):
        args = rank.get("args")
        if not isinstance(args, argparse.Namespace):
            raise UserError(f"{file}: has no args, so the shape of its model is unknown; give the files as saved")
        for name in _ARCHITECTURE:
            here, there = getattr(args, name, None), getattr(first, name, None)
            if here != there:
                raise UserError(
                    f"{file}: its args have {name} {here!r}, and those of {files[0][0]} {there!r}; copy all ranks of "
                    "one iteration"
                )
    return vars(first)


def join_ranks(stages: Sequence[Sequence[Mapping[str, Any]]], files: Sequence[Sequence[Path]]) -> LazyTensors:
    """The whole model's tensors, of the entries 'model' of each stage's ranks, which `files` hold.

    Raises UserError where the ranks of a stage hold other names, shapes or types, where two stages hold the same name,
    and, when a tensor is read of which each rank has the whole, where they have different ones.
    """
    whole: dict[str, tuple[int, str, list[Tensor]]] = {}  # the stage, the name there, the ranks' parts
    first_layer = 0
    for number, ranks in enumerate(stages):
        parts = [dict(_flat(rank, file)) for rank, file in zip(ranks, files[number], strict=True)]
        for part, file in zip(parts, files[number], strict=True):
            _check_like_first(part, parts[0], file, files[number][0])
        layers = {int(match[2]) for key in parts[0] if (match := _LAYER.match(key))}
        for key in parts[0]:
            layer = _LAYER.match(key)
            name = key if layer is None else f"{layer[1]}{first_layer + int(layer[2])}{key[layer.end() :]}"
            if name in whole:
                raise UserError(
                    f"{files[number][0]}: holds {key}, which {files[whole[name][0]][0]}, another stage, holds, too; "
                    "copy all of one iteration"
                )
            whole[name] = number, key, [part[key] for part in parts]
        first_layer += 1 + max(layers, default=-1)

    def join(name: str, parts: Sequence[Tensor]) -> Tensor:
        dim = _split_dim(name)
        return parts[0] if dim is None or len(parts) == 1 else torch.cat(list(parts), dim=dim)

    def read(name: str) -> Tensor:
        number, key, parts = whole[name]
        for part, file in zip(parts, files[number], strict=True):
            if _split_dim(name) is None and not same_values(part, parts[0]):
                raise UserError(
                    f"{file}: {key} has other values than in {files[number][0]}, and all ranks have the whole of it; "
                    "copy all ranks of one iteration"
                )
        return join(name, parts)

    meta = {name: join(name, [part.to("meta") for part in parts]) for name, (_, _, parts) in whole.items()}
    return LazyTensors(meta, read)


def _check_like_first(part: Mapping[str, Tensor], first: Mapping[str, Tensor], file: Path, first_file: Path) -> None:
    for key in [*first, *part]:
        here, there = part.get(key), first.get(key)
        if here is None or there is None or (here.shape, here.dtype) != (there.shape, there.dtype):
            raise UserError(
                f"{file}: {key} is {_described(here)}, and {_described(there)} in {first_file}; copy all ranks of one "
                "iteration"
            )


def _described(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"


def part_of_rank(name: str, tensor: Tensor, rank: int, num_ranks: int) -> Tensor:
    """What rank `rank` of `num_ranks` holds of the whole tensor `name`."""
    dim = _split_dim(name)
    return tensor if dim is None else tensor.chunk(num_ranks, dim=dim)[rank]


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The entry 'model' of a rank's file, of its tensors by joined names."""
    model: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module = next(module for module in _MODULES if name.startswith(f"{module}."))
        place = model
        for step in module.split("."):
            place = place.setdefault(step, {})
        place[name.removeprefix(f"{module}.")] = tensor
    return model


def _folder_name(stage: int, rank: int, num_stages: int) -> str:
    return f"mp_rank_{rank:02d}_{stage:03d}" if num_stages > 1 else f"mp_rank_{rank:02d}"


def _split_dim(name: str) -> int | None:
    return next((dim for pattern, dim in _SPLIT_DIMS if pattern.search(name)), None)


def _flat(content: Mapping[str, Any], place: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, place, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        else:
            raise UserError(f"{place}: {prefix}{key} is no tensor; expected the weights of a model")
