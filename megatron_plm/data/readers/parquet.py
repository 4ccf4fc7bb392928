"""Sequences in a column of Parquet files, by pyarrow."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from megatron_plm.data._native import gather
from megatron_plm.data.readers.inputs import Input
from megatron_plm.data.readers.values import Values
from megatron_plm.errors import UserError, suggestion

_BATCH_BYTES = 1 << 21  # of the column at a time, about
_MOST_ROWS = 1 << 8  # texts are decoded a batch at a time, and some may be much longer than their group's mean
_MOST_CODES = 1 << 16  # rows of a dictionary: these are decoded piece by piece
_LARGEST_DICTIONARY = 1 << 23  # bytes: it is held several times
_CODE_BYTES = 8  # of a row in the pages of a dictionary's codes, at most: four, and what a page needs
_BUFFER_SIZE = 1 << 20  # a column is read piece by piece, not as a whole


def parquet_values(source: Input, *, with_names: bool) -> Iterator[Values]:
    """Yield the column of the sequences, and of the names, some rows at a time.

    Where a column is a dictionary and its codes, the codes are read and the dictionary's texts taken about
    `_BATCH_BYTES` at a time, since a few long texts may stand for any number of rows. Raises UserError where the file
    is damaged or lacks them.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{source.label}: reading parquet needs the package pyarrow: run `pip install 'megatron-plm[parquet]'`"
        ) from None
    try:
        opened = partial(pyarrow.parquet.ParquetFile, source.path, buffer_size=_BUFFER_SIZE, pre_buffer=False)
        with opened() as file:
            columns = [source.fields.column, *([source.fields.name_column] if with_names else [])]
            for column in columns:
                _check(arrow, source, file.schema_arrow, column, numbers=column != source.fields.column)
            is_dictionary = arrow.types.is_dictionary(file.schema_arrow.field(columns[0]).type)
            for group in range(file.metadata.num_row_groups):
                parts = _parts(file.metadata.row_group(group), columns[0])
                coded = all(map(_holds_codes, parts))
                rows = _MOST_CODES if coded else _rows_at_a_time(parts, _MOST_CODES if is_dictionary else _MOST_ROWS)
                with opened(metadata=file.metadata, read_dictionary=columns[:1] if coded else None) as reader:
                    for batch in reader.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                        names = _values(arrow, batch.column(columns[1])) if with_names else None
                        yield from _pieces(arrow, batch.column(columns[0]), names)
    except (arrow.ArrowException, OSError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{source.label} is no parquet file that can be read, or is damaged: {first_line}") from None


def _parts(group: Any, column: str) -> list[Any]:
    """What the file's description tells of the column in a group of rows."""
    parts = [group.column(index) for index in range(group.num_columns)]
    return [part for part in parts if part.path_in_schema == column]


def _holds_codes(part: Any) -> bool:
    """Whether rows are numbers of texts in a small dictionary: behind that there is hardly room for anything else."""
    if not part.has_dictionary_page or part.total_uncompressed_size > _LARGEST_DICTIONARY:
        return False
    size = part.total_compressed_size - (part.data_page_offset - part.dictionary_page_offset)
    return bool(size <= _CODE_BYTES * (part.num_values + 100))


def _rows_at_a_time(parts: list[Any], most: int) -> int:
    """So many rows, at most `most`, that their sequences take about `_BATCH_BYTES`, by the mean of their group."""
    size, num_rows = sum(part.total_uncompressed_size for part in parts), sum(part.num_values for part in parts)
    return max(1, min(most, num_rows * _BATCH_BYTES // max(size, 1)))


def _check(arrow: Any, source: Input, schema: Any, name: str, *, numbers: bool) -> None:
    """Refuse a table without the column, or with one that holds no text (or, with `numbers`, integers)."""
    what, flag = ("names", "--name-column") if numbers else ("sequences", "--column")
    if schema.names.count(name) != 1:
        raise UserError(
            f"{source.label} has no column '{name}', or several: it has {', '.join(schema.names[:20])}"
            f"{suggestion(name, schema.names)}; name the column of the {what} with {flag}"
        )
    kind = schema.field(name).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if str(kind) not in texts and not (numbers and arrow.types.is_integer(kind)):
        raise UserError(f"{source.label}: its column '{name}' holds {kind}, not text")


def _pieces(arrow: Any, column: Any, names: Values | None) -> Iterator[Values]:
    """The column's texts; those of a dictionary in pieces, each of about `_BATCH_BYTES` or one text."""
    if not arrow.types.is_dictionary(column.type):
        texts = _values(arrow, column)
        yield Values(texts.data, texts.offsets, names)
        return
    texts = _values(arrow, column.dictionary)
    data = np.frombuffer(texts.data, dtype=np.uint8)
    codes = column.indices.cast(arrow.int64()).fill_null(len(column.dictionary)).to_numpy()
    begins, sizes = texts.offsets[codes], np.append(np.diff(texts.offsets), 0)[codes]
    ends = np.cumsum(sizes)
    bounds = np.flatnonzero(np.diff((ends - 1) // _BATCH_BYTES)) + 1
    for rows in np.split(np.arange(len(codes)), bounds):
        offsets = np.concatenate([[0], np.cumsum(sizes[rows])])
        own_names = None if names is None else Values(names.data, names.offsets[rows[0] : rows[-1] + 2])
        yield Values(gather(data, begins[rows], sizes[rows]), offsets, own_names)


def _values(arrow: Any, column: Any) -> Values:
    """The column's texts where they lie; a missing one is empty."""
    text = column.cast(arrow.string()) if arrow.types.is_integer(column.type) else column
    texts = text.cast(arrow.large_binary())
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return Values(b"", np.zeros(len(texts) + 1, dtype=np.int64))
    all_offsets = np.frombuffer(offsets, dtype=np.int64)
    own = all_offsets[texts.offset : texts.offset + len(texts) + 1]
    # The buffer may hold other rows too: only what these need is scanned.
    return Values(memoryview(data)[own[0] : own[-1]], own - own[0])
