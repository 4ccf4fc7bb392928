"""The file of embeddings: npz, HDF5 or Parquet, written from columns on the disk in bounded memory.

Proteins stand in the order of the input, under the names that they have there; a name may stand twice. Shapes: n
proteins, R residues of them all, D hidden size.
"""

import importlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError
from megatron_plm.inference.names import LENGTHS, NAME_DTYPES, PROTEINS_AT_A_TIME, names_of
from megatron_plm.inference.resumable import Column

_GROUP_BYTES = 1 << 24  # of a row group of Parquet


@dataclass(frozen=True)
class Content:
    """What goes into the file.

    Attributes:
        columns: the names and lengths, and the values by name: [n, D] each, or [R, D] where `per_residue` names it.
        per_residue: see above.
        about: what the values are, as JSON.
    """

    columns: Mapping[str, Column]
    per_residue: frozenset[str]
    about: Mapping[str, Any]

    @property
    def num_proteins(self) -> int:
        return self.columns[LENGTHS].size

    @property
    def values(self) -> dict[str, Column]:
        """The columns of values."""
        return {name: column for name, column in self.columns.items() if name not in NAME_DTYPES}

    def offsets(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield where the residues of each protein begin, and the end, n + 1 numbers, some at a time."""
        yield np.zeros(1, dtype=np.int64)
        end = 0
        for lengths in self.columns[LENGTHS].blocks(PROTEINS_AT_A_TIME):
            ends = end + np.cumsum(lengths, dtype=np.int64)
            end = int(ends[-1])
            yield ends


def write_npz(content: Content, path: Path) -> None:
    """`numpy.load` opens it: arrays `ids` [n], `lengths` [n], the values, and with residues `offsets` [n + 1]."""
    width = max(1, max(len(name) for names in names_of(content.columns) for name in names))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        ids = (np.array(names, dtype=f"<U{width}") for names in names_of(content.columns))
        _npy(file, "ids", np.dtype(f"<U{width}"), content.num_proteins, ids)
        lengths = content.columns[LENGTHS]
        _npy(file, "lengths", lengths.dtype, lengths.size, lengths.blocks())
        if content.per_residue:
            _npy(file, "offsets", np.dtype(np.int64), content.num_proteins + 1, content.offsets())
        for name, column in content.values.items():
            _npy(file, name, column.dtype, column.size, column.blocks())
        about = np.array(json.dumps(content.about))
        _npy(file, "about", about.dtype, None, iter([about]))


def _npy(
    file: zipfile.ZipFile, name: str, dtype: np.dtype[Any], size: int | None, blocks: Iterator[npt.NDArray[Any]]
) -> None:
    """Add one array, block by block; no `size`, no dims."""
    shape = (*(() if size is None else (size,)), *dtype.shape)
    info = zipfile.ZipInfo(f"{name}.npy")  # its time is 1980: the same embeddings are the same bytes
    info.external_attr = 0o644 << 16
    with file.open(info, "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype.base), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.ascontiguousarray(block).tobytes())


def write_hdf5(content: Content, path: Path) -> None:
    """The datasets are the arrays of `write_npz`; `about` is an attribute of the file."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["about"] = json.dumps(content.about)
        _dataset(file, "ids", h5py.string_dtype(), content.num_proteins, names_of(content.columns))
        lengths = content.columns[LENGTHS]
        _dataset(file, "lengths", lengths.dtype, lengths.size, lengths.blocks())
        if content.per_residue:
            _dataset(file, "offsets", np.dtype(np.int64), content.num_proteins + 1, content.offsets())
        for name, column in content.values.items():
            _dataset(file, name, column.dtype, column.size, column.blocks())


def _dataset(file: Any, name: str, dtype: np.dtype[Any], size: int, blocks: Iterator[Any]) -> None:
    dataset = file.create_dataset(name, shape=(size, *dtype.shape), dtype=dtype.base)
    begin = 0
    for block in blocks:
        dataset[begin : begin + len(block)] = block
        begin += len(block)


def write_parquet(content: Content, path: Path) -> None:
    """A row for each protein: `id`, `length`, and the values, of residues a list of vectors."""
    import pyarrow as arrow
    import pyarrow.parquet

    kinds = {}
    for name, column in content.values.items():
        kind = arrow.list_(arrow.from_numpy_dtype(column.dtype.base), column.dtype.shape[0])
        kinds[name] = arrow.large_list(kind) if name in content.per_residue else kind
    schema = arrow.schema(
        [("id", arrow.string()), ("length", arrow.int32()), *kinds.items()],
        metadata={"about": json.dumps(content.about)},
    )
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for batch in _batches(content, arrow, schema):
            writer.write_batch(batch, row_group_size=batch.num_rows)


def _batches(content: Content, arrow: Any, schema: Any) -> Iterator[Any]:
    """Row groups of about `_GROUP_BYTES`, or of one protein."""
    names = (name for some in names_of(content.columns) for name in some)
    with ExitStack() as stack:
        readers = {name: stack.enter_context(column.reader()) for name, column in content.values.items()}
        for lengths in _row_groups(content):
            columns = [arrow.array(list(islice(names, len(lengths))), arrow.string()), arrow.array(lengths)]
            for name, reader in readers.items():
                kind = schema.field(name).type
                if name in content.per_residue:
                    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
                    rows = _vectors(arrow, reader.take(int(offsets[-1])), kind.value_type)
                    columns.append(arrow.LargeListArray.from_arrays(arrow.array(offsets), rows))
                else:
                    columns.append(_vectors(arrow, reader.take(len(lengths)), kind))
            yield arrow.record_batch(columns, schema=schema)


def _vectors(arrow: Any, rows: npt.NDArray[Any], kind: Any) -> Any:
    return arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), type=kind)


def _row_groups(content: Content) -> Iterator[npt.NDArray[np.int32]]:
    """The lengths of the proteins of each row group."""
    fixed = sum(c.dtype.itemsize for name, c in content.values.items() if name not in content.per_residue)
    varying = sum(c.dtype.itemsize for name, c in content.values.items() if name in content.per_residue)
    group: list[int] = []
    size = 0
    for length in (
        length for block in content.columns[LENGTHS].blocks(PROTEINS_AT_A_TIME) for length in block.tolist()
    ):
        price = fixed + varying * length
        if group and size + price > _GROUP_BYTES:
            yield np.array(group, dtype=np.int32)
            group, size = [], 0
        group.append(length)
        size += price
    yield np.array(group, dtype=np.int32)


@dataclass(frozen=True)
class FileFormat:
    """One format: what writes it, its endings, and the package that it needs with the extra that brings it."""

    write: Callable[[Content, Path], None]
    endings: tuple[str, ...]
    package: str | None = None
    extra: str = ""


FILE_FORMATS = {
    "npz": FileFormat(write_npz, (".npz",)),
    "hdf5": FileFormat(write_hdf5, (".h5", ".hdf5"), "h5py", "hdf5"),
    "parquet": FileFormat(write_parquet, (".parquet", ".pq"), "pyarrow", "parquet"),
}


def file_format(path: Path, name: str | None) -> FileFormat:
    """The format called `name`, or else the one that the path ends with; UserError where there is none, or where its
    package is missing."""
    endings = {ending: key for key, entry in FILE_FORMATS.items() for ending in entry.endings}
    name = name or endings.get(path.suffix.lower())
    if name is None:
        raise UserError(
            f"--output {path}: its ending tells no format; expected {', '.join(endings)}, or name the format with "
            "--output-format"
        )
    entry = FILE_FORMATS[name]
    if entry.package is not None:
        try:
            importlib.import_module(entry.package)
        except ImportError:
            raise UserError(
                f"--output {path}: writing {name} needs the package {entry.package}: run "
                f"`pip install 'megatron-plm[{entry.extra}]'`"
            ) from None
    return entry
