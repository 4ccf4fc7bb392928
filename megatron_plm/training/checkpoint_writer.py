"""Saving a run: each checkpoint complete or absent, at any number of processes, beside the training or not."""

import shutil
import threading
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_plm.checkpoint_format import (
    CHECKPOINTS,
    LATEST,
    CheckpointState,
    write_description,
    write_tokenizer,
)
from megatron_plm.distributed_checkpoint import reason_of, without_single_process_warning
from megatron_plm.errors import UserError
from megatron_plm.files import publish_directory, replace_symlink
from megatron_plm.training.checkpoint import run_tensors
from megatron_plm.training.run_directory import run_directory
from megatron_plm.training.state import Run

_COPIED_AHEAD = 10_000_000  # bytes, from a GPU while others are written


@dataclass(frozen=True)
class _Snapshot:
    """What a checkpoint holds, as it was after one step: this process's tensors, and what is said of all."""

    tensors: dict[str, Any]
    state: CheckpointState
    is_staged: bool = False  # the tensors are copies in the host's memory


def save_checkpoint(run: Run, directory: Path) -> Path:
    """Write the run's checkpoint below the run directory `directory`; collective over all processes.

    The checkpoint is written under a hidden name and renamed when it is complete; then `latest` moves, then old
    checkpoints go. A kill at any point leaves the previous `latest` whole. Raises UserError where it can't be written.
    """
    return _write(run, _Snapshot(run_tensors(run, copies=False), _state(run)), directory)


class CheckpointWriter:
    """Writes the checkpoints of a training into its run directory, if it has one.

    With `--async-save` training stands still only while the tensors are copied to the host's memory, which they then
    take a second time; a thread writes them, one checkpoint at a time. The memory of the copies is used again. Leaving
    the context waits for the last one, also where an error ends the training, but not where that may have left this
    process without the others, which its thread would wait for.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._directory = run_directory(run.config)
        self._on_gpu = run.world.device.type == "cuda"
        self._stager: StateDictStager | None = None
        self._group: ProcessGroup | None = None
        if self._directory and run.config.training.async_save:
            # Not torch's DefaultStager around it: that of torch 2.11 throws the memory of the copies away, and fails at
            # the second.
            self._stager = StateDictStager(pin_memory=self._on_gpu)
            self._group = run.world.group_of_a_thread()
        self._thread: threading.Thread | None = None
        self._written: deque[Path] = deque()  # by one thread, and taken by the other
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None and (issubclass(kind, UserError) or self._run.world.size == 1):
            self._thread.join()  # the error on its way is the one that is told

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written here; `finish` then raises why."""
        return self._error is not None

    def save(self) -> None:
        """Write a checkpoint of the run as it is now, or begin to. Collective; raises UserError, as `finish` does."""
        assert self._directory is not None
        if self._stager is None:
            self._written.append(save_checkpoint(self._run, self._directory))
            return
        self.finish()  # what is being written is in the memory that is copied to
        tensors = self._stager.stage(run_tensors(self._run, copies=False), non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        snapshot = _Snapshot(tensors, _state(self._run), is_staged=True)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. All processes call it; raises UserError where that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def written(self) -> list[Path]:
        """The checkpoints that were completed since the last call."""
        return [self._written.popleft() for _ in range(len(self._written))]

    def _write(self, snapshot: _Snapshot) -> None:
        assert self._directory is not None
        try:
            self._written.append(_write(self._run, snapshot, self._directory, self._group))
        except BaseException as error:  # whatever it is, the training's own thread raises it
            self._error = error


def _write(run: Run, snapshot: _Snapshot, directory: Path, group: ProcessGroup | None = None) -> Path:
    """Write a snapshot; its processes meet in `group`. Nothing of `run` is read that training changes."""
    world, config = run.world, run.config
    folder = directory / CHECKPOINTS
    path = folder / f"step_{snapshot.state.step:08d}"
    aside = folder / f".{path.name}.tmp"
    try:
        if world.is_main:
            _delete_leftovers(folder)
            aside.mkdir(parents=True)
        world.barrier(group)
        # Staged tensors are copied ahead no more: torch would do it in the stream that the training computes in.
        ahead = 0 if snapshot.is_staged else _COPIED_AHEAD
        with without_single_process_warning():
            save(
                snapshot.tensors,
                storage_writer=FileSystemWriter(aside, per_thread_copy_ahead=ahead),
                process_group=group,
                no_dist=world.mesh is None,
            )
        if world.is_main:
            write_description(aside, config, snapshot.state)
            write_tokenizer(aside, run.datasets.tokenizer)
            publish_directory(aside, path)
            replace_symlink(folder / LATEST, path.name)
            _delete_old(folder, path, config.training.keep_last)
        world.barrier(group)
    except (CheckpointException, OSError) as error:
        raise UserError(
            f"{path}: the checkpoint cannot be written ({reason_of(error)}); make room there and go on "
            f"with --load {directory}"
        ) from None
    return path


def _state(run: Run) -> CheckpointState:
    return CheckpointState(
        tokenizer=run.datasets.tokenizer.name,
        tokenizer_sha256=run.datasets.tokenizer.sha256,
        step=run.progress.step,
        consumed_tokens=run.progress.consumed_tokens,
        cursor=asdict(run.progress.cursor),
        data_sha256=run.datasets.train.sha256,
        has_optimizer=True,
    )


def _delete_leftovers(folder: Path) -> None:
    """Delete what a killed run left half-written or half-deleted: all of it has hidden names."""
    for path in (*folder.glob(".step_*"), *folder.glob(f".{LATEST}.*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _delete_old(folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `newest`; a half-deleted one has a hidden name already."""
    steps = sorted(p for p in folder.glob("step_*") if p.is_dir() and p.name <= newest.name)
    for path in steps[:-keep]:
        doomed = path.with_name(f".{path.name}.old")
        path.rename(doomed)
        shutil.rmtree(doomed)
