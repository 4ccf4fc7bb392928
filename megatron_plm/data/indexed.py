"""Reading MMIDIDX datasets: Megatron's memory-mapped pair of PREFIX.bin (tokens) and PREFIX.idx (where each begins).

PREFIX.idx, little-endian: 9 bytes `MMIDIDX\\0\\0`; uint64 version 1; uint8 dtype code; uint64 number of sequences n;
uint64 number of document entries d; int32 lengths [n], in tokens; int64 pointers [n], in bytes of PREFIX.bin; int64
document entries [d], where entry k is the first sequence of document k and the last is n. The layout is
megatron.core.datasets.indexed_dataset's. PREFIX.json is this project's addition (see indexed_writer.py).
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, npt.DTypeLike] = {1: np.uint8, 8: np.uint16, 4: np.int32}
METADATA_FORMAT = "megatron-plm-dataset"
METADATA_VERSION = 1


@dataclass(frozen=True)
class DatasetPaths:
    """The files of a dataset."""

    bin: Path
    idx: Path
    json: Path


def dataset_paths(prefix: str | os.PathLike[str]) -> DatasetPaths:
    """Return the files of the dataset `prefix`, which is their common path without .bin, .idx and .json."""
    return DatasetPaths(*(Path(f"{os.fspath(prefix)}.{extension}") for extension in ("bin", "idx", "json")))


class IndexedDataset:
    """A memory-mapped dataset; `dataset[i]` is sequence i's tokens, a read-only 1-D view without special tokens.

    Opening reads the header and a few entries whatever the size. Raises UserError, naming the file, where a file is
    missing, is no MMIDIDX index, is truncated, or where index and tokens do not belong together.

    Attributes:
        lengths: number of tokens of each sequence, int32 [n].
        pointers: first byte of each sequence in PREFIX.bin, int64 [n].
        document_indices: first sequence of each document, then n; int64 [d].
        num_tokens: tokens in PREFIX.bin.
        prefix: as it was given.
        metadata: content of PREFIX.json; empty where there is none, as for datasets that Megatron wrote.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._paths = dataset_paths(prefix)
        try:
            idx_size, bin_size = (path.stat().st_size for path in (self._paths.idx, self._paths.bin))
            dtype, num_sequences, num_entries = _read_header(self._paths.idx, idx_size)
            self._bin, index = _map(self._paths.bin, bin_size), _map(self._paths.idx, idx_size)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "does not exist" if missing else f"cannot be opened ({error.strerror})"
            raise UserError(
                f"dataset '{self.prefix}': '{error.filename}' {reason}; give the common path of its files "
                "without extension, or make it with tools/preprocess_data.py"
            ) from None
        self._dtype = np.dtype(dtype)
        lengths_end = HEADER.size + 4 * num_sequences
        pointers_end = lengths_end + 8 * num_sequences
        documents_end = pointers_end + 8 * num_entries
        # The arrays begin at odd addresses: index them, don't np.take (which would copy the whole array first).
        self.lengths: npt.NDArray[np.int32] = index[HEADER.size : lengths_end].view("<i4")
        self.pointers: npt.NDArray[np.int64] = index[lengths_end:pointers_end].view("<i8")
        self.document_indices: npt.NDArray[np.int64] = index[pointers_end:documents_end].view("<i8")
        self.num_tokens = bin_size // self._dtype.itemsize
        self.metadata = _read_metadata(self._paths.json)
        self._check()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents: one for each sequence, or clusters of sequences."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All tokens of PREFIX.bin, end to end; a read-only view of the file."""
        return self._bin[: self.num_tokens * self._dtype.itemsize].view(self._dtype)

    @property
    def tokenizer(self) -> dict[str, str] | None:
        """Name and vocabulary hash (`sha256`) of the tokenizer, where PREFIX.json tells them."""
        found = self.metadata.get("tokenizer")
        if found is None:
            return None
        if not isinstance(found, dict) or not all(_is_word(found.get(key)) for key in ("name", "sha256")):
            raise UserError(f"'{self._paths.json}': tokenizer must hold a name and a sha256; make the dataset again")
        return found

    @property
    def sha256(self) -> str | None:
        """What identifies the content: the checksum over those of .idx and .bin that PREFIX.json holds, if any."""
        sums = self.metadata.get("sha256")
        if sums is None:
            return None
        if not isinstance(sums, dict) or not all(_is_word(sums.get(name)) for name in ("idx", "bin")):
            raise UserError(f"'{self._paths.json}': sha256 must hold the checksums of .idx and .bin; make it again")
        return hashlib.sha256(f"{sums['idx']} {sums['bin']}".encode()).hexdigest()

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of a dataset of {len(self)}")
        begin = int(self.pointers[index])
        end = begin + int(self.lengths[index]) * self._dtype.itemsize
        if not 0 <= begin <= end <= len(self._bin):
            raise UserError(
                f"'{self._paths.idx}' is damaged: sequence {index} is said to lie in bytes {begin} to {end} of "
                f"'{self._paths.bin}', which has {len(self._bin)}; make the dataset again"
            )
        return self._bin[begin:end].view(self._dtype)

    def _check(self) -> None:
        """The checks that take constant time; a wrong entry in the middle is found when it is read."""
        if int(self.document_indices[-1]) != len(self):
            raise UserError(
                f"'{self._paths.idx}' is damaged: its documents end at sequence {self.document_indices[-1]}, "
                f"but it lists {len(self)}; make the dataset again"
            )
        for index in (0, len(self) - 1):
            self[index]
        described = self.metadata.get("num_sequences"), self.metadata.get("num_residues")
        if self.metadata and described != (len(self), self.num_tokens):
            raise UserError(
                f"'{self._paths.json}' describes {described[0]!r} sequences and {described[1]!r} residues, but the "
                f"dataset has {len(self)} and {self.num_tokens}: the files are not of one run; make the dataset again"
            )


def _map(path: Path, size: int) -> npt.NDArray[np.uint8]:
    # A plain view of the map is sliced several times faster than np.memmap; an empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if size else np.empty(0, dtype=np.uint8)


def _read_header(path: Path, size: int) -> tuple[npt.DTypeLike, int, int]:
    """Return dtype, number of sequences and of document entries of an index whose size fits them."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise UserError(f"'{path}' is no dataset index: it begins with {header[:9]!r}, expected {MAGIC!r}")
    if len(header) < HEADER.size:
        raise UserError(f"'{path}' is truncated: {size} bytes, a header has {HEADER.size}; make the dataset again")
    _, version, code, num_sequences, num_entries = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"'{path}' has version {version} of the index format, expected {VERSION}")
    if code not in DTYPE_CODES:
        known = ", ".join(f"{code} ({np.dtype(dtype).name})" for code, dtype in DTYPE_CODES.items())
        raise UserError(f"'{path}' has tokens of dtype code {code}, expected one of {known}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    # Megatron's multimodal index adds a byte for each sequence, which has no use here.
    if size not in (expected, expected + num_sequences):
        state = "truncated" if size < expected else "damaged"
        raise UserError(
            f"'{path}' is {state}: {size:,} bytes, but its header of {num_sequences:,} sequences and "
            f"{num_entries:,} document entries makes {expected:,}; make the dataset again"
        )
    if num_sequences == 0 or num_entries == 0:
        raise UserError(f"'{path}' holds no sequences")
    return DTYPE_CODES[code], num_sequences, num_entries


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(
            metadata, ensure_ascii=False
        ).encode()  # half a character, which JSON can tell, can't be written again
    except FileNotFoundError:
        return {}
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON ({error}); make the dataset again") from None
    found = (metadata.get("format"), metadata.get("version")) if isinstance(metadata, dict) else None
    if found != (METADATA_FORMAT, METADATA_VERSION):
        raise UserError(f"'{path}' is not a description of a dataset ({METADATA_FORMAT}, version {METADATA_VERSION})")
    return metadata
