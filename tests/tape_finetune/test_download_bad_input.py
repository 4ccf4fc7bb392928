"""download_tape refuses what is not TAPE's data, and writes nothing of it."""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from archive_server import ARCHIVE, TASK, Archives, databases, error_of, flags, names, tar_of
from harmful_pickle import Calls

from megatron_plm.errors import run_command
from tape_finetune.download import _MD5, BASE_URL, SPLITS, main


@pytest.mark.parametrize("digest", ["md5", "sha256"])
def test_the_given_sum_decides(
    server: Archives, tmp_path: Path, archive: bytes, digest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = tmp_path / "sums"
    right = hashlib.new(digest, archive).hexdigest()
    sums.write_text(f"{right[::-1]}  data_pytorch/{TASK}.tar.gz\n")
    data = tmp_path / "data"
    error = error_of(capsys, flags(server, data, "--checksums", str(sums)))
    assert f"its {digest} sum is {right}, not {right[::-1]}" in error
    assert names(data) == set()
    sums.write_text(f"{right} *{TASK}.tar.gz\n")
    assert run_command(main, flags(server, data, "--checksums", str(sums))) == 0
    assert f"{digest} as expected" in capsys.readouterr().out


def test_the_known_sums_are_of_tasks_of_tapes_own_address() -> None:
    assert _MD5.keys() < SPLITS.keys()
    assert all(len(md5) == 32 and int(md5, 16) for md5 in _MD5.values())
    assert BASE_URL.startswith("http://s3.amazonaws.com/songlabdata/")


def evil(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (evil("/etc/passwd"), "lies outside"),
        (evil(f"{TASK}/../../harm"), "lies outside"),
        (evil("other/file"), "lies outside"),
        (evil(f"{TASK}/link", tarfile.SYMTYPE, "/etc"), "is a link or a device"),
        (evil(f"{TASK}/link", tarfile.LNKTYPE, "/etc/passwd"), "is a link or a device"),
        (evil(f"{TASK}/device", tarfile.FIFOTYPE), "is a link or a device"),
        (evil(f"{TASK}/nothing"), f"holds no {TASK}_train.lmdb"),
        (b"<html>no archive</html>", "no tar.gz archive, or a damaged one"),
    ],
    ids=["absolute", "above", "beside", "symbolic link", "hard link", "device", "empty", "no archive"],
)
def test_an_archive_that_is_none_of_tapes_is_refused(
    server: Archives, tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[ARCHIVE] = content
    data = tmp_path / "data"
    assert message in error_of(capsys, flags(server, data))
    assert names(data) == set()
    assert names(tmp_path) == {"data"}


def test_a_damaged_archive_is_refused(
    server: Archives, tmp_path: Path, archive: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[ARCHIVE] = archive[: len(archive) // 2]
    assert "no tar.gz archive, or a damaged one" in error_of(capsys, flags(server, tmp_path))
    assert names(tmp_path) == set()


def test_a_database_whose_pickle_would_run_code_is_refused(
    server: Archives, tmp_path: Path, archive_records: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    harm = tmp_path / "harm"
    spoilt = {**archive_records, "test": [{"primary": "MK", "x": Calls(os.mkdir, str(harm))}]}
    server.files[ARCHIVE] = tar_of(databases(tmp_path / "made", spoilt))
    error = error_of(capsys, flags(server, tmp_path / "data", "--convert", "jsonl"))
    assert f"{TASK}_test.lmdb, record 0: its pickle names posix.mkdir" in error
    assert not harm.exists()
    assert names(tmp_path / "data") == set()


def test_what_stands_there_is_kept_unless_forced(
    server: Archives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / TASK).mkdir()
    (tmp_path / TASK / "mine").touch()
    assert "exists already" in error_of(capsys, flags(server, tmp_path))
    assert server.requests == []
    assert names(tmp_path / TASK) == {"mine"}
    assert run_command(main, flags(server, tmp_path, "--force")) == 0
    assert "mine" not in names(tmp_path / TASK)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--base_url", "file:///etc"], "begins with http"),
        (["--tasks", "homology"], "invalid choice: 'homology'"),
        (["--checksums", "nowhere"], "--checksums nowhere: cannot be read"),
    ],
)
def test_wrong_flags_are_told(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, ["--output_dir", str(tmp_path / "data"), *argv])
    assert not (tmp_path / "data").exists()
