"""Files of predictions: CSV, JSON lines or Parquet, written block by block.

JSON lines hold what `Task.predictions` gives, behind `id`, `length` and `cropped`. The two tables hold a column for
each of its keys; where `probabilities` has one a class, a column `probability_CLASS` for each class. What is a list
for each residue or pair is a list in Parquet and JSON text in CSV; several labels of a protein are joined by '|'.
"""

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from megatron_plm.errors import UserError

Row = Mapping[str, Any]
Write = Callable[[Sequence[Row]], None]


def check_name(path: Path) -> None:
    """Raise UserError where the name's end stands for no format, or that format's package is missing."""
    if _ending(path) is None:
        raise UserError(f"--output {path}: expected a name that ends in {', '.join(_WRITERS)}")
    if _ending(path) == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError(
                f"--output {path}: Parquet needs the package pyarrow; run: pip install 'megatron-plm[parquet]'"
            ) from None


def writing(path: Path, name: Path) -> AbstractContextManager[Write]:
    """Open `path` for the format that `name` stands for; gives a function that appends rows, all with the same keys."""
    ending = _ending(name)
    assert ending is not None, "check_name was asked"
    return _WRITERS[ending](path)


def _ending(path: Path) -> str | None:
    return next((ending for ending in _WRITERS if path.name.lower().endswith(ending)), None)


@contextmanager
def _json_lines(path: Path, *, compressed: bool = False) -> Iterator[Write]:
    with _text(path, compressed) as file:
        yield lambda rows: file.writelines(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _csv(path: Path, *, compressed: bool = False) -> Iterator[Write]:
    columns: list[str] = []
    with _text(path, compressed) as file:
        writer = csv.writer(file, lineterminator="\n")

        def write(rows: Sequence[Row]) -> None:
            for row in map(_flat, rows):
                if not columns:
                    columns.extend(row)
                    writer.writerow(columns)
                writer.writerow([_cell(row[column]) for column in columns])

        yield write


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as opened:
        writer: Any = None

        def write(rows: Sequence[Row]) -> None:
            nonlocal writer
            flat = [_flat(row) for row in rows]
            if writer is None and flat:
                writer = opened.enter_context(pq.ParquetWriter(path, pa.schema(_parquet_types(flat[0]))))
            if flat:
                writer.write_table(pa.Table.from_pylist(flat, schema=writer.schema))

        yield write


_WRITERS: dict[str, Callable[[Path], AbstractContextManager[Write]]] = {
    ".csv": _csv,
    ".csv.gz": lambda path: _csv(path, compressed=True),
    ".jsonl": _json_lines,
    ".jsonl.gz": lambda path: _json_lines(path, compressed=True),
    ".parquet": _parquet,
}


@contextmanager
def _text(path: Path, compressed: bool) -> Iterator[TextIO]:
    """A UTF-8 text file to write; gzip data holds neither name nor time, so that equal rows give equal bytes."""
    with contextlib.ExitStack() as opened:
        file: BinaryIO = opened.enter_context(path.open("wb"))
        if compressed:
            file = cast(BinaryIO, opened.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0)))
        yield opened.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))


def _flat(row: Row) -> dict[str, Any]:
    """A row of a table: one value a column."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"probability_{label}": p for label, p in value.items()}
        elif name == "labels" and isinstance(value, list):
            flat[name] = "|".join(value)
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    """A value as CSV has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else value


def _parquet_types(row: Row) -> list[tuple[str, Any]]:
    import pyarrow as pa

    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    return [(name, plain.get(type(value), pa.list_(pa.list_(pa.float64())))) for name, value in row.items()]
