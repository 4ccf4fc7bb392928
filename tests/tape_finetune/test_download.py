"""download_tape against a server on this machine: what comes is what the server has, also after a kill."""

import hashlib
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from archive_server import ARCHIVE, RAW, TASK, Archives, error_of, flags, lines, names, tar_of
from full_disk import full_disk
from processes import REPOSITORY, environment, wait_for

from megatron_plm.errors import run_command
from tape_finetune import fetch as fetching
from tape_finetune.download import main


def test_the_databases_come_as_they_are(
    server: Archives, tmp_path: Path, archive_records: dict[str, list[Any]]
) -> None:
    assert run_command(main, flags(server, tmp_path)) == 0
    assert names(tmp_path) == {TASK}
    with (
        lmdb.open(str(tmp_path / TASK / f"{TASK}_valid.lmdb"), readonly=True, lock=False) as made,
        made.begin() as cursor,
    ):
        assert pickle.loads(cursor.get(b"num_examples")) == 3
        assert pickle.loads(cursor.get(b"2"))["id"] == archive_records["valid"][2]["id"]
    about = json.loads((tmp_path / TASK / "download.json").read_text())
    assert about["sha256"] == hashlib.sha256(server.files[ARCHIVE]).hexdigest()
    assert about["url"] == server.address + ARCHIVE
    assert not list((tmp_path / TASK).glob("._*"))


def test_a_second_run_asks_the_server_for_nothing(server: Archives, tmp_path: Path) -> None:
    assert run_command(main, flags(server, tmp_path)) == 0
    asked = len(server.requests)
    assert run_command(main, flags(server, tmp_path)) == 0
    assert len(server.requests) == asked


@pytest.mark.parametrize("archive_format", ["lmdb", "json"])
def test_converted_records_are_the_archives(
    server: Archives, tmp_path: Path, archive_records: dict[str, list[Any]], archive_format: str
) -> None:
    expected = {
        split: [
            {
                **value,
                "id": value["id"].decode(),
                "protein_length": int(value["protein_length"]),
                "log_fluorescence": value["log_fluorescence"].tolist(),
                "tertiary": [None if np.isnan(x) else float(x) for x in value["tertiary"]],
            }
            for value in values
        ]
        for split, values in archive_records.items()
    }
    if archive_format == "json":
        members = {f"{TASK}/{TASK}_{split}.json": json.dumps(values).encode() for split, values in expected.items()}
        server.files[RAW] = tar_of(members)
    assert run_command(main, flags(server, tmp_path, "--convert", "jsonl", "--format", archive_format)) == 0
    for split, values in expected.items():
        assert lines(tmp_path / TASK / f"{TASK}_{split}.jsonl.gz") == values
    assert not list((tmp_path / TASK).glob("*.lmdb"))
    assert not list((tmp_path / TASK).glob(f"{TASK}_*.json"))


def test_a_killed_download_goes_on_where_it_stopped(server: Archives, tmp_path: Path, archive: bytes) -> None:
    server.hold_after = 200_000
    command = [sys.executable, str(REPOSITORY / "tools/download_tape.py"), *flags(server, tmp_path)]
    part = tmp_path / f".{TASK}.tar.gz.part"
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: part.exists() and part.stat().st_size > 50_000, "bytes", process=process)
        process.send_signal(signal.SIGKILL)
    have = part.stat().st_size
    assert 0 < have < len(archive)
    assert archive.startswith(part.read_bytes())
    assert not (tmp_path / TASK).exists()
    server.hold_after = None
    assert run_command(main, flags(server, tmp_path)) == 0
    assert server.requests == [(ARCHIVE, None), (ARCHIVE, f"bytes={have}-")]
    assert names(tmp_path) == {TASK}
    about = json.loads((tmp_path / TASK / "download.json").read_text())
    assert about["md5"] == hashlib.md5(archive).hexdigest()


def test_a_connection_that_breaks_is_taken_up_again(server: Archives, tmp_path: Path) -> None:
    server.cuts, server.cut_after = 2, 100_000
    assert run_command(main, flags(server, tmp_path)) == 0
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize("change", ["another file", "no ranges"])
def test_what_cannot_be_gone_on_with_begins_anew(
    server: Archives, tmp_path: Path, archive: bytes, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts, server.cut_after = 5, 20_000
    error_of(capsys, flags(server, tmp_path))
    if change == "no ranges":
        server.ranges = False
    else:
        server.files[ARCHIVE] = archive + b"\0" * 512  # padding, which gzip allows
    assert run_command(main, flags(server, tmp_path)) == 0
    about = json.loads((tmp_path / TASK / "download.json").read_text())
    assert about["md5"] == hashlib.md5(server.files[ARCHIVE]).hexdigest()


def test_an_archive_that_was_whole_when_killed_is_not_fetched_again(server: Archives, tmp_path: Path) -> None:
    fetching.fetch(server.address + ARCHIVE, tmp_path / f".{TASK}.tar.gz")
    assert run_command(main, flags(server, tmp_path)) == 0
    assert server.requests[1:] == [(ARCHIVE, f"bytes={len(server.files[ARCHIVE])}-")]


def test_a_server_that_always_ends_early_is_told_and_the_bytes_are_kept(
    server: Archives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts, server.cut_after = 5, 1000
    error = error_of(capsys, flags(server, tmp_path))
    assert "the connection ended early" in error
    assert "5,000 bytes are there" in error
    assert (tmp_path / f".{TASK}.tar.gz.part").stat().st_size == 5000
    assert not (tmp_path / TASK).exists()


def test_a_missing_file_and_no_server_are_told(
    server: Archives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, ["--tasks", "stability", *flags(server, tmp_path)[2:]])
    assert "/data_pytorch/stability.tar.gz: the server has no such file (404" in error
    # Port 9 of this machine: nothing listens there.
    error = error_of(capsys, ["--tasks", TASK, "--base_url", "http://127.0.0.1:9", "--output_dir", str(tmp_path)])
    assert "cannot be fetched" in error
    assert "http_proxy" in error
    assert names(tmp_path) == set()


def test_the_proxy_of_the_environment_is_asked(
    server: Archives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    url = "http://mirror.invalid/tape"
    server.files[url + ARCHIVE] = server.files[ARCHIVE]  # a proxy is asked for the whole address
    assert run_command(main, ["--tasks", TASK, "--base-url", url + "/", "--output_dir", str(tmp_path)]) == 0
    assert server.requests == [(url + ARCHIVE, None)]


def test_a_full_disk_is_told_and_the_download_goes_on_later(
    server: Archives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(100_000):
        code = run_command(main, flags(server, tmp_path))
    assert code == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not (tmp_path / TASK).exists()
    assert run_command(main, flags(server, tmp_path)) == 0
    assert server.requests[1][1] == "bytes=100000-"
