"""Which format an input is in: by its first bytes, with its name as a hint."""

import re
from pathlib import PurePath

from megatron_plm.errors import UserError

_EXTENSIONS = {
    "fasta": (".fasta", ".fa", ".faa", ".fna", ".ffn", ".fas", ".pep"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "text": (".txt", ".text", ".seq"),
    "parquet": (".parquet", ".pq"),
    "lmdb": (".lmdb", ".mdb"),
}
FORMATS = tuple(_EXTENSIONS)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_PARQUET_MAGIC = b"PAR1"
_LMDB_MAGIC = b"\xde\xc0\xef\xbe"  # behind the 16 bytes that head a page
_LMDB_MAGIC_PLACE = 16
_SEQUENCE_LINE = re.compile(rb"[A-Za-z*.\- ]+")
# Formats of which any text could be one: the name decides.
_LINES = ("csv", "tsv", "text")


def named_format(name: str) -> str | None:
    """Return the format that a file's name stands for, None where it tells none."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return next((kind for kind, known in _EXTENSIONS.items() if suffixes and suffixes[-1] in known), None)


def has_first_line(head: bytes) -> bool:
    """Whether the first line that is not blank lies in `head` as a whole: enough to tell the format."""
    return b"\n" in head.lstrip()


def told_format(head: bytes, name: str, label: str) -> tuple[str, str | None]:
    """Return the format of what begins with `head`, and a note where its name stands for another one.

    `label` names the input in messages. Raises UserError where the format cannot be told, or cannot be what the
    name says.
    """
    named = named_format(name)
    content = _format_of(head)
    if content is None and named not in (None, "parquet", "lmdb") and head.strip():
        content = named  # what is wrong is told with its line
    if content is None and not head.strip():
        content = named or "fasta"  # nothing to tell it by, nor to read
    if content is None or (named in ("parquet", "lmdb") and content in _LINES):
        hint = f" (by its name {named})" if named else ""
        raise UserError(
            f"{label}: its format cannot be told by its first bytes{hint}: expected one of {', '.join(FORMATS)}; "
            "name it with --format"
        )
    if named is None or named == content:
        return content, None
    if content == "text" and named in ("csv", "tsv"):
        return named, None  # a table of one column, or its header
    if content in _LINES and named in ("fasta", "jsonl"):
        return named, None  # its reader says at which line it is none
    return content, f"'{name}': by its name {named}, by its content {content}; it is read as {content}"


def _format_of(head: bytes) -> str | None:
    if head.startswith(_PARQUET_MAGIC):
        return "parquet"
    if head[_LMDB_MAGIC_PLACE:].startswith(_LMDB_MAGIC):
        return "lmdb"
    lines = [line for line in head.splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].startswith(b";"):  # FASTA's comments
        lines = lines[1:]
    first = lines[0].lstrip() if lines else b""
    if first.startswith(b">"):
        return "fasta"
    if first.startswith(b"{"):
        return "jsonl"
    if not first or any(byte < 0x20 and byte not in b"\t\r" for byte in first):
        return None
    if b"\t" in first:
        return "tsv"
    if b"," in first:
        return "csv"
    return "text" if _SEQUENCE_LINE.fullmatch(first.rstrip()) else None
