"""torch Distributed Checkpoint, read without running anything that a file says.

A checkpoint's `.metadata` and its byte entries are pickles, which torch reads without restriction. Here they can build
torch's own records and plain values, and nothing that acts.
"""

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_plm.checkpoint_format import DCP_METADATA

# What reading a damaged or incomplete checkpoint can raise.
READ_ERRORS = (CheckpointException, OSError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError)

# What a checkpoint's metadata, a pickle, may name: torch's own plain records and nothing that acts.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13's name of it
}  # fmt: skip


class SafeReader(FileSystemReader):
    """torch's reader, with a metadata pickle that can build torch's records but run nothing."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        content = (Path(self.path) / DCP_METADATA).read_bytes()
        try:
            metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise pickle.UnpicklingError(f"{DCP_METADATA}: {error!r}") from None
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{DCP_METADATA} holds {type(metadata).__name__}, not checkpoint metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _METADATA_CLASSES.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{DCP_METADATA} names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, whose byte entries (the optimizer's plain settings) can hold plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


@contextlib.contextmanager
def without_single_process_warning() -> Iterator[None]:
    """Silence torch's remark that it works in one process, which is what is asked of it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def reason_of(error: BaseException) -> str:
    """The first sentence of the cause; torch adds advice to it, and wraps it in a report over all processes."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].partition(". ")[0]
