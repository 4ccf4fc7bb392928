"""A small archive of a TAPE task, and a web server on this machine for it, with Range and If-Range as RFC 9110 has
them, and ways to fail."""

import gzip
import hashlib
import io
import json
import pickle
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from megatron_plm.errors import run_command
from tape_finetune.download import main


class Archives:
    """What a server holds by path, what it was asked for, and how it behaves.

    Attributes:
        files: content by path.
        requests: (path, Range header or None) in order.
        cut_after: bytes of a body after which the connection is closed, for as many answers as `cuts`.
        hold_after: bytes of a body after which an answer waits for `released`.
        ranges: whether parts are sent at all.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.cut_after: int | None = None
        self.cuts = 0
        self.hold_after: int | None = None
        self.released = threading.Event()
        self.ranges = True
        self.address = ""


@contextmanager
def serving(archives: Archives) -> Iterator[Archives]:
    """Serve them on a free port of the loopback device; `address` is where."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, archives)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    archives.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield archives
    finally:
        archives.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def answer(request: BaseHTTPRequestHandler, archives: Archives) -> None:
    asked = request.headers.get("Range")
    archives.requests.append((request.path, asked))
    content = archives.files.get(request.path)
    if content is None:
        request.send_error(404)
        return
    tag = f'"{hashlib.md5(content).hexdigest()}"'
    start = 0
    span = re.fullmatch(r"bytes=(\d+)-", asked or "")
    if span and archives.ranges and request.headers.get("If-Range", tag) == tag:
        start = int(span[1])
        if start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        request.send_response(200)
    request.send_header("ETag", tag)
    request.send_header("Content-Length", str(len(content) - start))
    request.end_headers()
    body = content[start:]
    if archives.cuts:
        archives.cuts -= 1
        request.wfile.write(body[: archives.cut_after])
        request.close_connection = True
        return
    if archives.hold_after is not None:
        request.wfile.write(body[: archives.hold_after])
        request.wfile.flush()
        archives.released.wait(60)
        body = body[archives.hold_after :]
    request.wfile.write(body)


TASK = "fluorescence"
ARCHIVE = f"/data_pytorch/{TASK}.tar.gz"
RAW = f"/data_raw_pytorch/{TASK}.tar.gz"


def record(split: str, number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {
        "primary": "MKTAYIAKQR"[: 5 + number],
        "id": f"{split}{number}".encode(),
        "protein_length": np.int64(5 + number),
        "log_fluorescence": rng.normal(size=1).astype(np.float32),
        "num_mutations": number,
        "tertiary": np.where(np.arange(3) == 1, np.nan, rng.normal(size=3)).astype(np.float32),
    }


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def database(folder: Path, records: list[Any]) -> bytes:
    with lmdb.open(str(folder), map_size=1 << 22) as made, made.begin(write=True) as writer:
        writer.put(b"num_examples", pickle.dumps(len(records)))
        for number, value in enumerate(records):
            writer.put(str(number).encode(), pickle.dumps(value))
    return (folder / "data.mdb").read_bytes()


def databases(folder: Path, records: dict[str, list[Any]]) -> dict[str, bytes]:
    """The members of TAPE's archive of the task."""
    folder.mkdir(exist_ok=True)
    names = {split: f"{TASK}/{TASK}_{split}.lmdb/data.mdb" for split in records}
    return {names[split]: database(folder / split, records[split]) for split in records}


def flags(server: Archives, folder: Path, *more: str) -> list[str]:
    return ["--tasks", TASK, "--base-url", server.address, "--output_dir", str(folder), *more]


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert run_command(main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
