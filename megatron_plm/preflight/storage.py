"""The file system of `--save`: that all nodes share it, how fast it is, and whether the checkpoints fit."""

import os
import secrets
import shutil
import time
from pathlib import Path

import torch

from megatron_plm.checkpoint_format import CHECKPOINTS
from megatron_plm.config.options import Config
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.preflight.meeting import Meeting
from megatron_plm.preflight.page import Check
from megatron_plm.tokenizers import get_tokenizer

_BLOCK = 2**24  # bytes of one write
_SECONDS_TO_APPEAR = 10.0  # network file systems tell other nodes of a new file after some seconds
_BYTES_A_PARAMETER = 12  # in a checkpoint: the fp32 weight and AdamW's two moments


def check_storage(config: Config, meeting: Meeting, *, num_bytes: int) -> list[Check]:
    """Write, sync and read back so many bytes from the first process of each node at once. Collective."""
    if config.training.save is None:
        return [Check("storage", None, "not checked, as --save is not given")]
    save = Path(config.training.save)
    folder = next(place for place in (save.absolute(), *save.absolute().parents) if place.is_dir())
    shared = _check_shared(folder, meeting)
    nodes = meeting.first_of_node
    told = meeting.gather("storage", _write_and_read(folder, num_bytes) if meeting.rank in nodes else None, ranks=nodes)
    failed = {rank: outcome for rank, outcome in told.items() if isinstance(outcome, str)}
    if failed:
        text = "; ".join(f"{reason} (on {meeting.hosts[rank]})" for rank, reason in failed.items())
        return [shared, Check("storage", False, text)]
    total = len(told) * num_bytes
    write, read = (total / max(speeds[index] for speeds in told.values()) for index in (0, 1))
    seconds = checkpoint_bytes(config) / write
    where = f"{len(told)} nodes at once" if len(told) > 1 else "one node"
    speed = Check(
        "storage",
        True,
        f"{folder}: {write / 1e9:.2f} GB/s written and synced, {read / 1e9:.2f} GB/s read, by {where}; at this speed a "
        f"checkpoint takes {seconds:.0f} s",
        {"write_bytes_per_second": write, "read_bytes_per_second": read},
    )
    return [shared, speed, _check_space(config, folder, save)]


def checkpoint_bytes(config: Config) -> int:
    """The size of one checkpoint."""
    with torch.device("meta"):
        model = MaskedLanguageModel(config.model, get_tokenizer(config.model.tokenizer))
    return _BYTES_A_PARAMETER * sum(parameter.numel() for parameter in model.parameters())


def free_bytes(folder: Path) -> int:
    """What the file system has left; a quota that it doesn't count among its free space is not seen."""
    return shutil.disk_usage(folder).free


def _check_shared(folder: Path, meeting: Meeting) -> Check:
    """Whether every node sees a file that rank 0 wrote."""
    name = "shared folder"
    path = folder / f".preflight.{meeting.gather('token', secrets.token_hex(8), ranks=[0])[0]}"
    try:
        if meeting.rank == 0:
            path.touch()
        outcome: str | None = None
    except OSError as error:
        outcome = f"{path.parent}: cannot be written to by rank 0 ({error.strerror})"
    refused = meeting.gather("written", outcome, ranks=[0])[0]
    if refused:
        return Check(name, False, refused)
    nodes = meeting.first_of_node
    seen = meeting.gather("seen", meeting.rank in nodes and _appears(path), ranks=nodes)
    if meeting.rank == 0:
        path.unlink()
    blind = [meeting.hosts[rank] for rank, sees in seen.items() if not sees]
    if blind:
        return Check(
            name,
            False,
            f"{', '.join(blind)} doesn't see what rank 0 writes in {folder}; --save must be on a file system that all "
            "nodes share",
        )
    return Check(name, True, f"{folder} is the same for all {len(nodes)} nodes" if len(nodes) > 1 else f"{folder}")


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _write_and_read(folder: Path, num_bytes: int) -> tuple[float, float] | str:
    """Seconds to write and sync, and to read, a file of this node; or what went wrong."""
    path = folder / f".preflight.{secrets.token_hex(8)}.data"
    block = secrets.token_bytes(min(_BLOCK, num_bytes))  # which no file system can compress
    count = max(1, num_bytes // len(block))
    try:
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(count):
                file.write(block)
            os.fsync(file.fileno())
        written = time.perf_counter() - started
        with path.open("rb", buffering=0) as file:
            # Else it would come from this node's memory. A server's own memory can't be emptied from here.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            for _ in range(count):
                if file.read(len(block)) != block:
                    return f"{folder}: what was read is not what was written"
            read = time.perf_counter() - started
        return written, read
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    finally:
        path.unlink(missing_ok=True)


def _check_space(config: Config, folder: Path, save: Path) -> Check:
    """A save is complete before the oldest checkpoint goes, so there is one more than are kept."""
    keep, size = config.training.keep_last, checkpoint_bytes(config)
    there = len(list((save / CHECKPOINTS).glob("step_*")))
    needed = size * max(1, keep + 1 - there)
    free = free_bytes(folder)
    text = f"{free / 1e9:.1f} GB free in {folder}, {needed / 1e9:.1f} GB needed for checkpoints of {size / 1e9:.1f} GB"
    if free < needed:
        text += f"; free some, choose another --save, or lower --keep-last {keep}"
    return Check("free space", free >= needed, text, {"free_bytes": free, "needed_bytes": needed})
