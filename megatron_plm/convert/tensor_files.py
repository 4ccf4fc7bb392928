"""Files of tensors by name: safetensors, PyTorch's .bin, and either of them in shards with an index.

Formats: safetensors, https://github.com/huggingface/safetensors; transformers' index, {"weight_map": {key: file}}.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_plm.distributed_checkpoint import reason_of
from megatron_plm.errors import JSON_ERRORS, UserError

PYTORCH_FILE = "pytorch_model.bin"
SAFETENSORS_FILE = "model.safetensors"


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory: model.safetensors or pytorch_model.bin, or the shards that an index lists.

    Raises UserError for missing and damaged files. A .bin file is a pickle: only tensors are unpickled, and one that
    asks for anything else is refused.
    """
    for name, read in ((SAFETENSORS_FILE, _read_safetensors), (PYTORCH_FILE, _read_pytorch)):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return read(directory / name)
        if index.is_file():
            return {key: tensor for shard in _shards(index) for key, tensor in read(shard).items()}
    raise UserError(f"{directory}: no weights; expected {SAFETENSORS_FILE} or {PYTORCH_FILE} beside its configuration")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors; OSError if the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})  # transformers asks for the metadata
    except SafetensorError as error:
        raise OSError(str(error)) from None


def write_pytorch(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as `torch.save` does; OSError if the disk refuses."""
    try:
        torch.save(dict(tensors), path)
    except RuntimeError as error:
        raise OSError(reason_of(error)) from None


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: damaged, or a pickle that holds more than tensors and would run code (nothing of it was run); "
            f"fetch it again, or ask for {SAFETENSORS_FILE}"
        ) from None
    except Exception as error:  # torch's unpickler lets a damaged pickle raise anything
        raise _damaged(path, error) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected tensors by name, as a model's state_dict is, found other things")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from None


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names; all lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index.parent}: shard {name}, which {index.name} lists, is missing; fetch it again")
    return [index.parent / name for name in names]


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({reason_of(error)}), it may be cut short; fetch it again")
