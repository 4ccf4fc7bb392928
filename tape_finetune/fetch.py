"""Fetching a file over HTTP so that a fetch that was cut off goes on where it stopped.

The bytes go to NAME.part, and what says whether they still belong to the file on the server to NAME.part.json: its
address and its validator (RFC 9110: a strong ETag, else Last-Modified). A server that has another file by then, or
that sends no parts of files, sends all of it, and the fetch begins anew.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_plm.data.progress import shown_progress
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.files import write_errors_told

_BLOCK_SIZE = 1 << 16
_TIMEOUT = 30.0  # seconds without a byte
_TRIES = 5  # of one command, where the connection breaks
_PAUSE = 1.0  # seconds between two of them
_AGAIN = "run the same command again to go on from there"


def fetch(url: str, path: Path) -> Path:
    """Fetch `url` to PATH.part, going on with what is there; returns that path once it is whole.

    Proxies are those of the environment (http_proxy, https_proxy, no_proxy). Raises UserError where the server has no
    such file or can't be reached, the connection keeps breaking, or the disk is full; what has come stays then.
    """
    part = path.with_name(f"{path.name}.part")
    error = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        try:
            if _fetch_rest(url, part, path.name):
                return part
            error = "the connection ended early"
        except urllib.error.HTTPError as failed:
            raise UserError(_refusal(url, failed)) from None
        except (OSError, http.client.HTTPException) as failed:
            reason = getattr(failed, "reason", failed)
            error = str(reason) or type(reason).__name__
            if isinstance(failed, urllib.error.URLError) and not attempt:
                break  # no such host, no network: nothing that waiting a second would mend
    raise UserError(
        f"{url}: cannot be fetched ({error}), {_size(part):,} bytes are there; check the network and the proxies "
        f"(http_proxy, https_proxy), then {_AGAIN}"
    )


def remove(path: Path) -> None:
    """Remove what `fetch` wrote."""
    for name in (f"{path.name}.part", f"{path.name}.part.json"):
        path.with_name(name).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Answer:
    """What the headers say: where in the file the body begins, and how many bytes the file has (None: unknown)."""

    start: int
    total: int | None


def _fetch_rest(url: str, part: Path, name: str) -> bool:
    """Append what is missing; returns whether all of it is there. OSError of urllib where the connection fails."""
    begun = _size(part)
    validator = _validator_of(part, url) if begun else None
    headers = {"Range": f"bytes={begun}-", "If-Range": validator} if validator else {}
    request = urllib.request.Request(url, headers={"User-Agent": "megatron-plm", **headers})
    opener = urllib.request.build_opener()  # urlopen's own keeps the proxies that it first met
    try:
        response = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # not satisfiable: there is nothing behind what we have
            raise
        if error.headers.get("Content-Range") == f"bytes */{begun}":
            return True
        part.unlink()
        return False
    with response:
        answer = _answer(response)
        if answer.start not in (0, begun):
            raise UserError(f"{url}: the server sent bytes from {answer.start:,} on, not from {begun:,}; use another")
        _note_validator(part, url, response.headers)
        with write_errors_told(part):
            file = part.open("ab" if answer.start else "wb")
        with file, shown_progress(answer.total or 0, f"fetching {name}") as progress:
            size = _copy(response, lambda block: _write(file.write, block, part), answer.start, progress.read)
    return answer.total is None or size == answer.total


def _copy(
    response: http.client.HTTPResponse, write: Callable[[bytes], None], start: int, tell: Callable[[int], None]
) -> int:
    """Copy the body; returns how many bytes of the file are there then."""
    size = start
    while block := response.read(_BLOCK_SIZE):
        write(block)
        size += len(block)
        tell(size)
    return size


def _write(write: Callable[[bytes], int], block: bytes, part: Path) -> None:
    # A fault of the disk is none of the connection: both are OSErrors.
    with write_errors_told(part):
        write(block)


def _answer(response: http.client.HTTPResponse) -> _Answer:
    if response.status == 206:
        # bytes FIRST-LAST/TOTAL
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first = span.partition("-")[0]
        return _Answer(int(first) if first.isdigit() else -1, int(total) if total.isdigit() else None)
    length = response.headers.get("Content-Length", "")
    return _Answer(0, int(length) if length.isdigit() else None)


def _validator_of(part: Path, url: str) -> str | None:
    """What names the file that the bytes are of; None where they cannot be gone on with."""
    try:
        about = json.loads(_about(part).read_text(encoding="utf-8"))
    except (OSError, *JSON_ERRORS):
        return None
    return about.get("validator") if isinstance(about, dict) and about.get("url") == url else None


def _note_validator(part: Path, url: str, headers: http.client.HTTPMessage) -> None:
    tag = headers.get("ETag")
    validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    with write_errors_told(part):
        _about(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _about(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    if error.code in (403, 404, 410):
        return f"{url}: the server has no such file ({error.code} {error.reason}); name a mirror with --base_url"
    return f"{url}: the server refused ({error.code} {error.reason}); try again later, or a mirror with --base_url"
