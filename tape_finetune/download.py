"""The command download_tape: TAPE's labelled data from its public archive.

The archive (github.com/songlab-cal/tape, README, "Data") has for each task one TASK.tar.gz with TASK/TASK_SPLIT.lmdb,
and one with TASK/TASK_SPLIT.json, a JSON array. TAPE publishes no checksums; the MD5 sums of the databases are those
of TorchDrug's loaders (github.com/DeepGraphLearning/torchdrug, torchdrug/datasets), which has none for ProteinNet.
"""

import argparse
import hashlib
import json
import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.files import Busy, atomic_directory, exclusive, write_errors_told
from megatron_plm.invocation import typeable
from tape_finetune.data import DEFAULT_DATA_DIR
from tape_finetune.fetch import fetch, remove
from tape_finetune.flags import add_flag
from tape_finetune.progress import say, track
from tape_finetune.unpack import convert, unpack

BASE_URL = "http://s3.amazonaws.com/songlabdata/proteindata"
FOLDERS = {"lmdb": "data_pytorch", "json": "data_raw_pytorch"}
SPLITS = {
    "secondary_structure": ("train", "valid", "casp12", "ts115", "cb513"),
    "proteinnet": ("train", "valid", "test"),
    "remote_homology": ("train", "valid", "test_fold_holdout", "test_family_holdout", "test_superfamily_holdout"),
    "fluorescence": ("train", "valid", "test"),
    "stability": ("train", "valid", "test"),
}
_MD5 = {
    "secondary_structure": "2f61e8e09c215c032ef5bc8b910c8e97",
    "remote_homology": "1d687bdeb9e3866f77504d6079eed00a",
    "fluorescence": "d63d1d51ec8c20ff0d981e4cbd67457a",
    "stability": "aa1e06eb5a59e0ecdae581e9ea029675",
}
_HASHES = {32: "md5", 64: "sha256"}  # by the number of hexadecimal digits
_RECORD = "download.json"


def main(argv: Sequence[str]) -> int:
    """Fetch, check, unpack and, if asked for, convert each task's data; raises UserError."""
    arguments = _parser().parse(argv)
    base_url = _base_url(arguments.base_url)
    sums = _checksums(arguments.checksums) if arguments.checksums else _known_sums(base_url, arguments.format)
    data_dir: Path = arguments.output_dir
    wanted = {task: f"{base_url}/{FOLDERS[arguments.format]}/{task}.tar.gz" for task in dict.fromkeys(arguments.tasks)}
    missing = {task: url for task, url in wanted.items() if not _is_there(data_dir / task, url, arguments)}
    with write_errors_told(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
    for task, url in missing.items():
        try:
            with exclusive(data_dir / f".{task}.tar.gz.lock"):
                _one_task(task, url, sums.get(f"{task}.tar.gz"), data_dir, arguments)
        except Busy:
            raise UserError(f"{data_dir / task}: another process is fetching it; wait for it") from None
    task = "contact_prediction" if next(iter(wanted)) == "proteinnet" else next(iter(wanted))
    if arguments.format == "json" and not arguments.convert:
        say("note: the tasks read JSON lines and databases, no JSON arrays; --convert jsonl makes lines of them")
    say(f"next: {typeable('tape-train', ['onehot', task, '--data_dir', data_dir])}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="download_tape",
        description="Download TAPE's labelled data. What was cut off goes on where it stopped; a task that is there "
        "already is left alone.",
    )
    tasks = ", ".join(SPLITS)
    text = f"default: all of {tasks}"
    add_flag(parser, "tasks", nargs="+", choices=list(SPLITS), default=list(SPLITS), metavar="TASK", help=text)
    text = f"gets DIR/TASK/ (default: {DEFAULT_DATA_DIR})"
    add_flag(parser, "output_dir", type=Path, default=DEFAULT_DATA_DIR, metavar="DIR", help=text)
    text = "TAPE's databases (lmdb), or its raw data, larger (json; default: lmdb)"
    add_flag(parser, "format", choices=list(FOLDERS), default="lmdb", help=text)
    add_flag(parser, "convert", choices=["jsonl"], help="write TASK_SPLIT.jsonl.gz in place of what the archive holds")
    text = f"a mirror that has {' and '.join(FOLDERS.values())} (default: {BASE_URL})"
    add_flag(parser, "base_url", default=BASE_URL, metavar="URL", help=text)
    text = "sums of the archives, as md5sum or sha256sum write them (default: the known ones of TAPE's own address)"
    add_flag(parser, "checksums", type=Path, metavar="FILE", help=text)
    add_flag(parser, "force", action="store_true", help="replace the folders of these tasks")
    return parser


def _base_url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--base_url {text}: expected an address that begins with http:// or https://")
    return text.rstrip("/")


def _known_sums(base_url: str, archive_format: str) -> dict[str, str]:
    if base_url != BASE_URL or archive_format != "lmdb":
        return {}
    return {f"{task}.tar.gz": md5 for task, md5 in _MD5.items()}


def _checksums(path: Path) -> dict[str, str]:
    """The sums in a file by archive name; raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--checksums {path}: cannot be read ({error}); give a text file") from None
    sums = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        digits, _, name = line.strip().partition(" ")
        digits = digits.lower()
        if len(digits) not in _HASHES or set(digits) - set("0123456789abcdef") or not name.strip():
            raise UserError(f"--checksums {path}, line {number}: expected an MD5 or SHA-256 sum and a file's name")
        sums[Path(name.strip().lstrip("*")).name] = digits
    return sums


def _is_there(folder: Path, url: str, arguments: argparse.Namespace) -> bool:
    """Whether the folder is what this command would make of `url`; raises UserError where it is something else."""
    if arguments.force or not folder.exists():
        return False
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, *JSON_ERRORS):
        record = None
    if isinstance(record, dict) and (record.get("url"), record.get("convert")) == (url, arguments.convert):
        say(f"{folder} is there already, of {url}")
        return True
    raise UserError(
        f"{folder} exists already and is not what this command would write; give another --output_dir, "
        "or --force to replace it"
    )


def _one_task(task: str, url: str, expected_sum: str | None, data_dir: Path, arguments: argparse.Namespace) -> None:
    archive = data_dir / f".{task}.tar.gz"
    part = fetch(url, archive)
    try:
        found = _check_sum(part, url, expected_sum)
        with atomic_directory(data_dir / task, force=arguments.force) as aside:
            unpack(part, task, aside)
            files = _split_files(task, aside, arguments.format, url)
            counts = _convert_all(files, url) if arguments.convert else {}
            record = {"url": url, "bytes": part.stat().st_size, **found, "convert": arguments.convert}
            (aside / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except UserError as error:
        # A full disk is no fault of the archive.
        if not isinstance(error.__cause__, OSError):
            remove(archive)
        raise
    remove(archive)
    checked = "" if expected_sum is None else f", {_HASHES[len(expected_sum)]} as expected"
    say(f"wrote {data_dir / task}: {', '.join(_described(files, counts))} ({record['bytes']:,} bytes{checked})")


def _check_sum(part: Path, url: str, expected: str | None) -> dict[str, str]:
    """MD5 and SHA-256 of the archive; raises UserError where the expected one of the two differs."""
    found = {}
    for name in _HASHES.values():
        with part.open("rb") as file:
            found[name] = hashlib.file_digest(file, name).hexdigest()
    if expected is not None and expected not in found.values():
        name = _HASHES[len(expected)]
        raise UserError(
            f"{url}: its {name} sum is {found[name]}, not {expected}; it was removed: run the command again, and if it "
            "stays so but you trust the address, give that sum with --checksums"
        )
    return found


def _split_files(task: str, folder: Path, suffix: str, url: str) -> dict[str, Path]:
    """The files of the splits; raises UserError where one that TAPE has is missing."""
    files = {
        path.name.removeprefix(f"{task}_").removesuffix(f".{suffix}"): path
        for path in sorted(folder.glob(f"{task}_*.{suffix}"))
    }
    for split in SPLITS[task]:
        if split not in files:
            raise UserError(f"{url}: the archive holds no {task}_{split}.{suffix}; use TAPE's own, or a copy of it")
    return files


def _convert_all(files: Mapping[str, Path], url: str) -> dict[str, int]:
    """Turn each split's file into JSON lines; returns how many records each has."""
    counts = {}
    for split, path in track(list(files.items()), "converting"):
        counts[split] = convert(path, path.with_suffix(".jsonl.gz"), f"{url}: {path.name}")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return counts


def _described(files: Mapping[str, Any], counts: Mapping[str, int]) -> list[str]:
    return [f"{split} {counts[split]:,}" if split in counts else split for split in files]
