"""The native format: torch Distributed Checkpoint directories, read and written in one process, tensor by tensor.

Only the model's tensors are read; the optimizer's stay on disk.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_plm.checkpoint_format import (
    STATE_FILE,
    CheckpointState,
    checkpoint_tokenizer,
    find_checkpoint,
    is_native,
    read_description,
    write_description,
    write_tokenizer,
)
from megatron_plm.convert.format import Format
from megatron_plm.convert.keymap import check_keys, check_shapes
from megatron_plm.convert.lazy import LazyTensors, compact, empty_meta, meta_of
from megatron_plm.convert.pickles import save_pickle
from megatron_plm.convert.weights import (
    CONTACT_HEAD,
    Weights,
    as_float32,
    check_contact_head,
    config_of,
    contact_head_shapes,
    native_shapes,
)
from megatron_plm.distributed_checkpoint import READ_ERRORS, SafeReader, reason_of, without_single_process_warning
from megatron_plm.errors import UserError

_MODEL = "model."


def read_native(path: Path) -> Weights:
    """Read the weights of a checkpoint, or of the latest one of a run directory."""
    directory = find_checkpoint(path)
    config, state = read_description(directory)
    tokenizer = checkpoint_tokenizer(directory, state)
    expected = {**native_shapes(config.model, tokenizer), **contact_head_shapes(config.model)}
    try:
        reader = _KnownReader(directory)
        reader.known = reader.read_metadata()
    except READ_ERRORS as error:
        raise _damaged(directory, error) from None
    meta = {
        key.removeprefix(_MODEL): empty_meta(entry.size, entry.properties.dtype)
        for key, entry in reader.known.state_dict_metadata.items()
        if key.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    check_keys(meta, set(expected), set(CONTACT_HEAD), str(directory))
    check_contact_head(meta, CONTACT_HEAD, str(directory))
    check_shapes({name: tensor.shape for name, tensor in meta.items()}, expected, str(directory))
    _check_files(directory, reader.known)

    def read(name: str) -> Tensor:
        tensor = torch.empty(meta[name].shape, dtype=meta[name].dtype)
        try:
            with without_single_process_warning():
                load({"model": {name: tensor}}, storage_reader=reader, no_dist=True)
        except READ_ERRORS as error:
            raise _damaged(directory, error) from None
        return tensor

    return Weights(config.model, tokenizer, as_float32(LazyTensors(meta, read), str(directory)))


def write_native(weights: Weights, directory: Path, dtype: str = "float32") -> tuple[str, ...]:
    """Write the weights into an empty directory as a checkpoint of step 0 without optimizer; nothing is lost."""
    assert dtype == "float32", "training begins with float32 weights"
    try:
        with without_single_process_warning():
            save(
                {"model": meta_of(weights.tensors)},
                storage_writer=_TensorByTensor(directory),
                planner=_LazyPlanner(weights.tensors),
                no_dist=True,
            )
    except CheckpointException as error:  # no subclass of Exception, and its text is a report over all processes
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, UserError | OSError) else OSError(reason_of(error)) from None
    state = CheckpointState(tokenizer=weights.tokenizer.name, tokenizer_sha256=weights.tokenizer.sha256)
    write_description(directory, config_of(weights.options), state)
    write_tokenizer(directory, weights.tokenizer)
    return ()


class _KnownReader(SafeReader):
    """A reader of many small loads: the metadata, read once, is kept."""

    known: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self.known or super().read_metadata(*args, **kwargs)


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors of the meta device, and looks the values up when each is written."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return compact(self._tensors[write_item.index.fqn.removeprefix(_MODEL)])


class _TensorByTensor(FileSystemWriter):
    """torch's writer, which keeps all tensors of a file until the file is complete, without that."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"  # as torch's own has it
        results = []
        with (Path(self.path) / name).open("wb") as file:
            for item in plan.items:
                start = file.tell()
                save_pickle(planner.resolve_data(item), file)
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Raise UserError where a file that holds some of the model's tensors is missing or ends before they do."""
    needed: dict[str, int] = {}
    for index, info in (metadata.storage_data or {}).items():
        if index.fqn.startswith(_MODEL):
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in needed.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < size:
            fault = f"{name} is missing" if found is None else f"{name} has {found:,} of at least {size:,} bytes"
            raise _damaged(directory, ValueError(fault))


def _damaged(directory: Path, error: BaseException) -> UserError:
    return UserError(
        f"{directory}: the checkpoint is damaged or incomplete ({reason_of(error)}); use another one of the run"
    )


FORMAT = Format(
    name="native",
    mark=STATE_FILE,
    recognises=is_native,
    read=read_native,
    write=write_native,
    looks_like=f"a run directory, or a checkpoint with {STATE_FILE}",
    has_contact_head=True,
)
