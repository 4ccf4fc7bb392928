"""The native format: torch Distributed Checkpoint directories, read and written in one process.

Only the model's tensors are read; the optimizer's stay on disk.
"""

from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_plm.checkpoint_format import (
    CheckpointState,
    checkpoint_tokenizer,
    find_checkpoint,
    read_description,
    write_description,
    write_tokenizer,
)
from megatron_plm.config.options import Config
from megatron_plm.convert.keymap import check_keys, check_shapes
from megatron_plm.convert.weights import Weights, cast, native_shapes, to_float32
from megatron_plm.distributed_checkpoint import READ_ERRORS, SafeReader, reason_of, without_single_process_warning
from megatron_plm.errors import UserError

_MODEL = "model."


def read_native(path: Path) -> Weights:
    """Read the weights of a checkpoint, or of the latest one of a run directory."""
    directory = find_checkpoint(path)
    config, state = read_description(directory)
    tokenizer = checkpoint_tokenizer(directory, state)
    expected = native_shapes(config.model, tokenizer)
    try:
        reader = SafeReader(directory)
        stored = {
            key.removeprefix(_MODEL): entry
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if key.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        check_keys(stored, set(expected), set(), str(directory))
        check_shapes({name: entry.size for name, entry in stored.items()}, expected, str(directory))
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
        with without_single_process_warning():
            load({"model": tensors}, storage_reader=reader, no_dist=True)
    except READ_ERRORS as error:
        raise UserError(
            f"{directory}: the checkpoint is damaged or incomplete ({reason_of(error)}); use another one of the run"
        ) from None
    tensors = {name: to_float32(name, tensor, str(directory)) for name, tensor in tensors.items()}
    return Weights(config.model, tokenizer, tensors)


def write_native(weights: Weights, directory: Path, dtype: str) -> tuple[str, ...]:
    """Write the weights into an empty directory as a checkpoint of step 0 without optimizer; nothing is lost."""
    tensors = cast(weights.tensors, dtype)
    try:
        with without_single_process_warning():
            save({"model": tensors}, storage_writer=FileSystemWriter(directory), no_dist=True)
    except CheckpointException as error:  # no subclass of Exception, and its text is a report over all processes
        raise OSError(reason_of(error)) from None
    state = CheckpointState(tokenizer=weights.tokenizer.name, tokenizer_sha256=weights.tokenizer.sha256)
    write_description(directory, Config(model=weights.options), state)
    write_tokenizer(directory, weights.tokenizer)
    return ()
