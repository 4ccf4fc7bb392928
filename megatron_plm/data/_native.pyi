"""Types of the compiled extension (csrc/data/module.cpp)."""

import enum

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

class Alphabet:
    def __init__(self, token_of_byte: npt.NDArray[np.uint8], unknown_token: int, strict: bool) -> None: ...

class RecordBlock:
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_lines(self) -> int: ...
    @property
    def num_stops(self) -> int: ...
    @property
    def lengths(self) -> npt.NDArray[np.int32]: ...
    @property
    def names(self) -> npt.NDArray[np.uint64]: ...
    @property
    def identifiers(self) -> bytes: ...
    @property
    def identifier_ends(self) -> npt.NDArray[np.int64]: ...
    @property
    def byte_counts(self) -> npt.NDArray[np.uint64]: ...
    @property
    def fault(self) -> tuple[int, str] | None: ...

def scan_fasta(alphabet: Alphabet, data: Buffer, out: npt.NDArray[np.uint8], with_names: bool) -> RecordBlock: ...
def scan_text(alphabet: Alphabet, data: Buffer, out: npt.NDArray[np.uint8]) -> RecordBlock: ...
def scan_values(
    alphabet: Alphabet, data: Buffer, offsets: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]
) -> RecordBlock: ...
def scan_json_lines(
    alphabet: Alphabet, data: Buffer, out: npt.NDArray[np.uint8], key: str, name_key: str | None
) -> RecordBlock: ...
def scan_table(
    alphabet: Alphabet,
    data: Buffer,
    out: npt.NDArray[np.uint8],
    separator: str,
    num_columns: int,
    column: int,
    name_column: int | None,
) -> RecordBlock: ...
def read_table_header(data: Buffer, separator: str) -> tuple[list[bytes], int, int, str]: ...
def last_record_start(data: Buffer, start: int) -> int: ...
def last_line_end(data: Buffer, start: int) -> int: ...
def last_row_end(data: Buffer, separator: str) -> int: ...
def hash_names(data: Buffer, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]: ...

class LetterTable:
    def __init__(self, texts: list[bytes]) -> None: ...
    def hash_records(
        self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.int32], seed: int = 0
    ) -> npt.NDArray[np.uint64]: ...

def add_token_counts(tokens: npt.NDArray[np.integer], counts: npt.NDArray[np.uint64]) -> None: ...
def read_cluster_lines(data: Buffer) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], int]: ...
def gather(
    data: npt.NDArray[np.uint8], begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]: ...
def pack_best_fit(
    tokens: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    max_tokens: int,
    max_labels: int,
    max_segments: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...

class Objective(enum.Enum):
    mlm_exact = 0
    mlm_bernoulli = 1
    mlm_spans = 2
    clm = 3

class Corruption:
    def __init__(
        self,
        *,
        objective: Objective,
        probability: float,
        mask_below: int,
        random_below: int,
        span_stop: float,
        longest_span: int,
    ) -> None: ...

class Vocabulary:
    def __init__(
        self, *, cls: int, eos: int, pad: int, mask: int, is_letter: list[int], replacements: list[int]
    ) -> None: ...

def build_rows(
    *,
    files: list[npt.NDArray[np.integer]],
    file: npt.NDArray[np.int64],
    pointer: npt.NDArray[np.int64],
    residues: npt.NDArray[np.int64],
    sequence: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    length: npt.NDArray[np.int64],
    key: npt.NDArray[np.uint64],
    row_offsets: npt.NDArray[np.int64],
    vocabulary: Vocabulary,
    corruption: Corruption,
    row_tokens: int,
    row_labels: int,
    row_segments: int,
) -> tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.int32],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    int,
    int,
    int,
]: ...
