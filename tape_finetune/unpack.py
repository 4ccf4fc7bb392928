"""From a TAPE archive to a folder of its splits, and from databases and JSON arrays to JSON lines."""

import gzip
import json
import math
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_plm.data.readers.lmdb_records import lmdb_records
from megatron_plm.errors import JSON_ERRORS, UserError, json_fault

_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


def unpack(archive: Path, folder: str, target: Path) -> None:
    """Write the files that the archive has below `folder` into the directory `target`.

    Only plain files and directories are taken, as new files with default rights. Raises UserError where the archive
    is damaged, or holds a link, a device, or a path outside `folder`.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                place = _place(archive, member, folder)
                if place is None:
                    continue
                path = target / place
                if member.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None, "a plain file has content"
                with content, path.open("xb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    except _DAMAGED as error:
        raise UserError(f"{archive}: no tar.gz archive, or a damaged one ({error}); fetch it again") from None
    except FileExistsError as error:
        raise UserError(f"{archive}: holds {Path(error.filename).name} twice; use another archive") from None


def _place(archive: Path, member: tarfile.TarInfo, folder: str) -> PurePosixPath | None:
    """Where a member goes below the target; None for the folder itself and what macOS adds."""
    path = PurePosixPath(member.name)
    if not (member.isfile() or member.isdir()):
        raise UserError(f"{archive}: {member.name} is a link or a device, which no data needs; use another archive")
    if path.is_absolute() or ".." in path.parts or path.parts[:1] not in ((), (folder,)):
        raise UserError(f"{archive}: {member.name} lies outside {folder}/; use another archive")
    if path.name.startswith("._") or path.name == ".DS_Store":
        return None
    return PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 else None


def convert(source: Path, target: Path, label: str) -> int:
    """Write the records of a TAPE database (.lmdb) or of a JSON array (.json) as gzipped JSON lines; returns how many.
    `label` is how messages name the source.

    Databases are read with an unpickler that runs nothing. Arrays become lists, numbers that are not finite null.
    Raises UserError naming the record at fault.
    """
    records = lmdb_records(str(source), label) if source.suffix == ".lmdb" else _json_records(source, label)
    return _write_lines(records, target, label)


def _json_records(source: Path, label: str) -> Iterator[dict[Any, Any]]:
    try:
        value = json.loads(source.read_bytes())
    except JSON_ERRORS as error:
        raise UserError(f"{label}: not valid JSON ({json_fault(error)}); fetch it again") from None
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise UserError(f"{label}: expected a JSON array of objects, as TAPE's raw data has it")
    yield from value


def _write_lines(records: Iterable[dict[Any, Any]], target: Path, label: str) -> int:
    count = 0
    # Neither name nor time in the file: the same records give the same bytes.
    with target.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        for record in records:
            plain = {_text(key): _plain(item, f"{label}, record {count}, {key!r}") for key, item in record.items()}
            file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
            count += 1
    return count


def _plain(value: Any, where: str) -> Any:
    """A value as JSON has it; raises UserError for what it has no way to write."""
    if isinstance(value, np.ndarray | np.generic):
        finite = value.dtype.kind not in "fc" or bool(np.isfinite(value).all())
        return value.tolist() if finite and value.dtype.kind in "biufU" else _plain(value.tolist(), where)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict):
        return {_text(key): _plain(item, where) for key, item in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    raise UserError(f"{where}: a {type(value).__name__} cannot be written as JSON; leave out --convert")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
