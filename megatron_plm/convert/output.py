"""Before any work: an output that may be written or replaced with no harm to the input, or to what is no checkpoint."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_plm.checkpoint_format import find_checkpoint
from megatron_plm.convert import megatron, native
from megatron_plm.convert.megatron_ranks import RELEASE
from megatron_plm.convert.pretrained import FORMATS, detect_format
from megatron_plm.errors import JSON_ERRORS, UserError

CONVERSION_FILE = "conversion.json"


def named(output: Path) -> Path:
    """The output with a name of its own, which `.` and `..` lack; as typed where it has one."""
    return Path(os.path.abspath(output)) if output.name in ("", "..") else output


def check_replaceable(output: Path, *, force: bool) -> None:
    """UserError if `output` is a link, stands there without `force`, or is with `force` no checkpoint to delete."""
    if output.is_symlink():
        raise UserError(f"{output} is a symbolic link, which is not replaced; give another --output, or what it means")
    if not output.exists():
        return
    if not force:
        raise UserError(f"{output} exists already; give another --output, or --force to replace it")
    if not _is_checkpoint(output):
        raise UserError(f"{output} is no checkpoint directory, so --force does not delete it; give another --output")
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    others = [name for name in folders if name != RELEASE and not name.startswith("mp_rank_")]
    if others:  # as the checkpoint-500 of a training by transformers
        raise UserError(
            f"{output} holds {others[0]}, a folder that is no part of the checkpoint in it, so --force does not delete "
            "it; give another --output"
        )


def check_apart(source: Path, source_format: str, output: Path) -> None:
    """UserError if replacing `output` would delete files that reading `source` takes, or if it lies among them."""
    place = _real(output)
    checkpoint = _checkpoint_read(source, source_format)
    if any(path.is_relative_to(place) for start in (source, checkpoint) for path in _paths_of(start)):
        raise UserError(f"{output} holds the input {source}, so --force does not delete it; give another --output")
    if checkpoint.is_dir() and place.is_relative_to(_real(checkpoint)):
        raise UserError(f"{output} lies in the checkpoint {checkpoint}, the input; give an --output outside of it")


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint of a format that is read, or one that a conversion wrote; not a run of many."""
    if not any((path / entry.mark).is_file() for entry in FORMATS.values()):
        return False
    try:
        record = json.loads((path / CONVERSION_FILE).read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"command", "from", "to"} <= record.keys():
            return True
    except (OSError, *JSON_ERRORS):
        pass  # no conversion wrote it
    try:
        return (path / FORMATS[detect_format(path)].mark).is_file()
    except (OSError, UserError):
        return False


def _checkpoint_read(source: Path, source_format: str) -> Path:
    """The directory or the file that reading `source` opens: of a run, one checkpoint."""
    if source_format == native.FORMAT.name:
        return find_checkpoint(source)
    return megatron.folder_read(source) if source_format == megatron.FORMAT.name else source


def _paths_of(start: Path) -> Iterator[Path]:
    """Where `start` lies, and where its links lead; with its files, if it is a checkpoint's directory."""
    yield _real(start.parent) / start.name
    yield _real(start)
    # What lies beside a file may belong to it, as fair-esm's contact head does.
    beside = start.parent.glob(f"{start.stem}*") if start.is_file() else start.glob("*")
    for path in beside:
        yield _real(path)
        if path.is_dir() and path.name.startswith("mp_rank_"):
            yield from (_real(file) for file in path.iterdir())


def _real(path: Path) -> Path:
    """The path without links; of a link that leads to itself as far as it leads, where Path.resolve fails."""
    return Path(os.path.realpath(path))
