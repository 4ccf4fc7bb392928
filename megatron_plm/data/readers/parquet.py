"""Sequences in a column of Parquet files, by pyarrow."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_plm.data.readers.inputs import Input
from megatron_plm.data.readers.values import Values
from megatron_plm.errors import UserError, suggestion

_BATCH_BYTES = 1 << 21  # of the column at a time, about
_MOST_ROWS = 1 << 12
_BUFFER_SIZE = 1 << 20  # a column is read piece by piece, not as a whole


def parquet_values(source: Input, *, with_names: bool) -> Iterator[Values]:
    """Yield the column of the sequences, and of the names, some rows at a time.

    Raises UserError where the file is damaged or lacks them.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{source.label}: reading parquet needs the package pyarrow: run `pip install 'megatron-plm[parquet]'`"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=_BUFFER_SIZE, pre_buffer=False) as file:
            columns = [source.fields.column, *([source.fields.name_column] if with_names else [])]
            for column in columns:
                _check(arrow, source, file.schema_arrow, column, numbers=column != source.fields.column)
            for group in range(file.metadata.num_row_groups):
                rows = _rows_at_a_time(file.metadata.row_group(group), columns[0])
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    names = _values(arrow, batch.column(columns[1])) if with_names else None
                    sequences = _values(arrow, batch.column(columns[0]))
                    yield Values(sequences.data, sequences.offsets, names)
    except (arrow.ArrowException, OSError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{source.label} is no parquet file that can be read, or is damaged: {first_line}") from None


def _rows_at_a_time(group: Any, column: str) -> int:
    """So many rows that their sequences take about `_BATCH_BYTES`, by the mean of their group."""
    parts = [group.column(index) for index in range(group.num_columns)]
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema == column)
    return max(1, min(_MOST_ROWS, group.num_rows * _BATCH_BYTES // max(size, 1)))


def _check(arrow: Any, source: Input, schema: Any, name: str, *, numbers: bool) -> None:
    """Refuse a table without the column, or with one that holds no text (or, with `numbers`, integers)."""
    if schema.names.count(name) != 1:
        raise UserError(
            f"{source.label} has no column '{name}', or several: it has {', '.join(schema.names[:20])}"
            f"{suggestion(name, schema.names)}; name the column of the sequences with --column"
        )
    kind = schema.field(name).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if str(kind) not in texts and not (numbers and arrow.types.is_integer(kind)):
        raise UserError(f"{source.label}: its column '{name}' holds {kind}, not text")


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
