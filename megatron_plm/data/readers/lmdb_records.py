"""Sequences in TAPE's LMDB databases, whose values are pickles, read without running what they name."""

import pickle
from collections.abc import Iterator
from typing import Any

from megatron_plm.data.readers.inputs import Input
from megatron_plm.data.readers.tape_pickle import RefusedPickle, load_record
from megatron_plm.data.readers.values import Values, joined
from megatron_plm.errors import UserError

_SEQUENCE_KEY = "primary"
_NAME_KEY = "id"
_COUNT_KEY = b"num_examples"
_BLOCK_SIZE = 1 << 20  # letters at a time


def lmdb_records(path: str, label: str) -> Iterator[dict[Any, Any]]:
    """Yield the records of a TAPE database (a file or a folder), in the order of their numbers.

    Raises UserError where it is none, lacks a record, or a record needs more than data to load.
    """
    try:
        import lmdb
    except ImportError:
        raise UserError(
            f"{label}: reading LMDB needs the package lmdb: run `pip install 'megatron-plm[lmdb]'`"
        ) from None
    import os

    try:
        with (
            lmdb.open(path, readonly=True, lock=False, readahead=False, subdir=os.path.isdir(path)) as database,
            database.begin(buffers=False) as transaction,
        ):
            for number in range(_count(transaction.get(_COUNT_KEY), label)):
                value = transaction.get(str(number).encode())
                if value is None:
                    raise UserError(f"{label} has no record {number}: the database is damaged or not TAPE's")
                yield _record(value, f"{label}, record {number}")
    except lmdb.Error as error:
        raise UserError(f"{label} is no LMDB database that can be read, or is damaged: {error}") from None


def lmdb_values(source: Input, *, with_names: bool) -> Iterator[Values]:
    """Yield the sequences (the key `primary`) and names (`id`) of a TAPE database, some records at a time."""
    texts: list[bytes] = []
    names: list[bytes] = []
    size = 0
    for number, record in enumerate(lmdb_records(source.path, source.label)):
        label = f"{source.label}, record {number}"
        texts.append(_text(record, _SEQUENCE_KEY, label))
        if with_names:
            names.append(_text(record, _NAME_KEY, label))
        size += len(texts[-1])
        if size >= _BLOCK_SIZE:
            yield joined(texts, names if with_names else None)
            texts, names, size = [], [], 0
    if texts:
        yield joined(texts, names if with_names else None)


def _count(value: bytes | None, label: str) -> int:
    if value is None:
        raise UserError(f"{label} has no key 'num_examples': expected an LMDB database as TAPE writes them")
    try:
        count = load_record(value)
    except (RefusedPickle, pickle.UnpicklingError) as error:
        raise UserError(f"{label}, key 'num_examples': {error}") from None
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise UserError(f"{label}, key 'num_examples': expected a count, found {type(count).__name__}")
    return count


def _record(value: bytes, label: str) -> dict[Any, Any]:
    try:
        record = load_record(value)
    except (RefusedPickle, pickle.UnpicklingError) as error:
        raise UserError(f"{label}: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{label}: expected a dictionary, found {type(record).__name__}")
    return record


def _text(record: dict[Any, Any], key: str, label: str) -> bytes:
    value = record.get(key)
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value
    if key == _NAME_KEY and isinstance(value, int):
        return str(value).encode()
    found = f"found {type(value).__name__}" if key in record else "the record lacks it"
    raise UserError(f"{label}: expected text under '{key}', {found}")
