"""What `torch.save` writes: a pickle with its tensors beside it in one file.

Unpickling can run any code, so what a pickle may name is torch's own short list, and plain records where a format has
some. Files of torch 1.6 and later are mapped into memory, so that a tensor is read when it is used; older ones have to
be read whole.
"""

import argparse
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from megatron_plm.distributed_checkpoint import reason_of
from megatron_plm.errors import UserError

_ZIP_MAGIC = b"PK\x03\x04"
_core = np._core if hasattr(np, "_core") else np.core  # numpy 2 and 1
_new_array = _core.multiarray._reconstruct

# Records that hold values and do nothing: the arguments of a command, and arrays, as of a random generator's state.
# Files name numpy's parts as the version that wrote them did.
PLAIN_RECORDS: tuple[Any, ...] = (
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
    (_new_array, "numpy.core.multiarray._reconstruct"),
    (_new_array, "numpy._core.multiarray._reconstruct"),
)


def read_pickle(path: Path, *, records: tuple[Any, ...] = (), trust: bool | None = None) -> Any:
    """What `torch.save` wrote to `path`, on the CPU.

    Args:
        records: classes that it may name beside tensors and plain values.
        trust: let it name, and run, anything; None where the user has no such choice.

    Raises:
        UserError: it is damaged, or names something else; nothing of it was run.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        # torch warns of old protocols and of TorchScript before it refuses them, in many lines.
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(records)):
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=mapped)
    except pickle.UnpicklingError:
        raise _refused(path, _foreign_names(path, records), has_flag=trust is not None) from None
    except Exception as error:  # torch's unpickler lets a damaged pickle raise anything
        raise damaged(path, error) from None


def write_pickle(content: object, path: Path, *, zipped: bool = True) -> None:
    """Write as `torch.save` does, as versions before 1.6 did if not `zipped`; OSError if the disk refuses."""
    with path.open("wb") as file:  # with a path torch keeps to itself why it could not write
        save_pickle(content, file, zipped=zipped)


def save_pickle(content: object, file: IO[bytes], *, zipped: bool = True) -> None:
    """Write as `write_pickle` does, from where `file` stands."""
    try:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    except RuntimeError as error:
        # What torch's writer says when it is closed in the middle hides the error that stopped it.
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(reason_of(error)) from None


def tensors_by_name(content: object, path: Path) -> dict[str, Tensor]:
    """The content of `path` as tensors by name; UserError if it is anything else."""
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected tensors by name, as a model's state_dict is, found other things")
    return {str(key): tensor.detach() for key, tensor in content.items()}


def damaged(path: Path, error: Exception) -> UserError:
    """What to say of a file that cannot be read."""
    return UserError(f"{path}: cannot be read ({reason_of(error)}), it may be cut short; fetch it again")


def _foreign_names(path: Path, records: tuple[Any, ...]) -> list[str]:
    """What the pickle names beyond `records`, where that can be told."""
    try:
        if not zipfile.is_zipfile(path):
            return []
        with torch.serialization.safe_globals(list(records)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # as above
        return []


def _refused(path: Path, names: list[str], *, has_flag: bool) -> UserError:
    fault = f"names {', '.join(names[:5])} and" if names else "is damaged, or a pickle that"
    trusting = "if you trust who made it, convert it with --trust-pickle, which lets it run"
    way_out = trusting if has_flag else "fetch it again, or as model.safetensors"
    return UserError(f"{path}: {fault} would run code (nothing of it was run); {way_out}")
