"""The MMIDIDX reader: against files packed by hand, against megatron-core, and on damaged files."""

import json
import resource
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.errors import UserError

CODES = {"uint8": 1, "uint16": 8, "int32": 4}
FORMATS = {"uint8": "B", "uint16": "H", "int32": "i"}


def pack(sequences: Sequence[Sequence[int]], dtype: str, documents: Sequence[int] | None = None) -> tuple[bytes, bytes]:
    """Return the bytes of .idx and .bin, field by field as the format's description has them."""
    tokens, pointers = b"", []
    for sequence in sequences:
        pointers.append(len(tokens))
        tokens += struct.pack(f"<{len(sequence)}{FORMATS[dtype]}", *sequence)
    documents = range(len(sequences) + 1) if documents is None else documents
    n = len(sequences)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], n, len(documents))
    index += struct.pack(f"<{n}i", *map(len, sequences))
    index += struct.pack(f"<{n}q", *pointers)
    index += struct.pack(f"<{len(documents)}q", *documents)
    return index, tokens


def put(prefix: Path, index: bytes, tokens: bytes) -> Path:
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(tokens)
    return prefix


SEQUENCES = [[4, 5, 6], [7], [], [8, 9, 255, 0]]


@pytest.mark.parametrize("dtype", CODES)
@given(data=st.data())
def test_files_packed_by_hand_read_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, data: st.DataObject
) -> None:
    token = st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max)
    sequences = data.draw(st.lists(st.lists(token, max_size=8), min_size=1, max_size=8))
    dataset = IndexedDataset(put(tmp_path_factory.mktemp("packed") / "p", *pack(sequences, dtype)))
    assert [sequence.tolist() for sequence in dataset] == sequences
    assert all(sequence.dtype == dtype and sequence.ndim == 1 for sequence in dataset)
    assert dataset.lengths.dtype == np.int32
    assert dataset.lengths.tolist() == [len(sequence) for sequence in sequences]
    assert dataset.document_indices.tolist() == list(range(len(sequences) + 1))
    assert len(dataset) == len(sequences)
    assert dataset.num_tokens == sum(map(len, sequences))
    assert dataset.metadata == {}


def test_sequences_are_read_only_views_and_indices_have_bounds(tmp_path: Path) -> None:
    dataset = IndexedDataset(put(tmp_path / "p", *pack(SEQUENCES, "uint8")))
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 1
    assert dataset[np.int64(3)].tolist() == SEQUENCES[3]
    for wrong in (4, -1):
        with pytest.raises(IndexError):
            dataset[wrong]


@pytest.mark.filterwarnings("ignore:::megatron")
@pytest.mark.parametrize("dtype", CODES)
def test_megatron_core_writes_what_we_read(tmp_path: Path, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "p.bin"), dtype=getattr(np, dtype))
    for tokens, lengths in [([4, 5, 6, 7], [3, 1]), ([8, 9, 100], [3])]:
        builder.add_document(torch.tensor(tokens), lengths)
    builder.finalize(str(tmp_path / "p.idx"))
    dataset = IndexedDataset(tmp_path / "p")
    assert [sequence.tolist() for sequence in dataset] == [[4, 5, 6], [7], [8, 9, 100]]
    assert dataset.document_indices.tolist() == [0, 2, 3]
    packed = pack([[4, 5, 6], [7], [8, 9, 100]], dtype, [0, 2, 3])
    assert ((tmp_path / "p.idx").read_bytes(), (tmp_path / "p.bin").read_bytes()) == packed


def test_an_index_cut_at_any_place_is_told(tmp_path: Path) -> None:
    index, tokens = pack(SEQUENCES, "uint8")
    for size in range(len(index)):
        with pytest.raises(UserError, match=r"p\.idx' is (truncated|no dataset index)"):
            IndexedDataset(put(tmp_path / "p", index[:size], tokens))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"PK\x03\x04", r"p\.idx' is no dataset index: it begins with b'PK.*expected b'MMIDIDX"),
        (9, struct.pack("<Q", 2), r"p\.idx' has version 2 of the index format, expected 1"),
        (17, b"\x06", r"dtype code 6, expected one of 1 \(uint8\), 8 \(uint16\), 4 \(int32\)"),
        (18, struct.pack("<Q", 2**60), r"p\.idx' is truncated: 122 bytes, but its header of 1,152,921,504"),
        (18, struct.pack("<Q", 3), r"p\.idx' is damaged: 122 bytes, but its header of 3 sequences"),
        (34 + 12, struct.pack("<i", 5), r"sequence 3 is said to lie in bytes 4 to 9 of '.*p\.bin', which has 8"),
        (34 + 12, struct.pack("<i", -1), r"sequence 3 is said to lie in bytes 4 to 3"),
        (34 + 16, struct.pack("<q", -8), r"sequence 0 is said to lie in bytes -8 to -5"),
        (34 + 16 + 32 + 32, struct.pack("<q", 3), r"its documents end at sequence 3, but it lists 4"),
    ],
)
def test_a_damaged_index_is_told(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    index, tokens = pack(SEQUENCES, "uint8")
    index = index[:offset] + value + index[offset + len(value) :]
    with pytest.raises(UserError, match=message):
        IndexedDataset(put(tmp_path / "p", index, tokens))


def test_tokens_shorter_than_promised_are_told(tmp_path: Path) -> None:
    index, tokens = pack(SEQUENCES, "uint16")
    for size in range(len(tokens)):
        with pytest.raises(UserError, match=r"p\.bin', which has \d+; make the dataset again"):
            IndexedDataset(put(tmp_path / "p", index, tokens[:size]))


def test_a_pointer_in_the_middle_that_leaves_the_tokens_is_told_when_read(tmp_path: Path) -> None:
    index, tokens = pack(SEQUENCES, "uint8")
    place = 34 + 16 + 8
    damaged = index[:place] + struct.pack("<q", 2**40) + index[place + 8 :]
    dataset = IndexedDataset(put(tmp_path / "p", damaged, tokens))
    with pytest.raises(UserError, match=r"p\.idx' is damaged: sequence 1 is said to lie in bytes 1099511627776"):
        dataset[1]
    assert dataset[3].tolist() == SEQUENCES[3]


def test_missing_files_and_empty_datasets_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.idx' does not exist; give the common path"):
        IndexedDataset(tmp_path / "none")
    (tmp_path / "half.idx").write_bytes(pack(SEQUENCES, "uint8")[0])
    with pytest.raises(UserError, match=r"half\.bin' does not exist"):
        IndexedDataset(tmp_path / "half")
    with pytest.raises(UserError, match="holds no sequences"):
        IndexedDataset(put(tmp_path / "empty", *pack([], "uint8")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"p\.json' cannot be read as JSON"),
        ("[]", r"p\.json' is not a description of a dataset \(megatron-plm-dataset, version 1\)"),
        ('{"format": "megatron-plm-dataset", "version": 2}', "is not a description of a dataset"),
        ('{"format": "megatron-plm-dataset", "version": 1}', "describes None sequences"),
        (
            '{"format": "megatron-plm-dataset", "version": 1, "num_sequences": 4, "num_residues": 9}',
            "describes 4 sequences and 9 residues, but the dataset has 4 and 8: the files are not of one run",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_told(tmp_path: Path, content: str, message: str) -> None:
    put(tmp_path / "p", *pack(SEQUENCES, "uint8"))
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "p")


def test_the_description_is_the_metadata(tmp_path: Path) -> None:
    put(tmp_path / "p", *pack(SEQUENCES, "uint8"))
    content = {"format": "megatron-plm-dataset", "version": 1, "num_sequences": 4, "num_residues": 8, "more": "µ"}
    (tmp_path / "p.json").write_text(json.dumps(content), encoding="utf-8")
    assert IndexedDataset(tmp_path / "p").metadata == content


def test_opening_a_billion_sequences_reads_the_header_and_little_more(tmp_path: Path) -> None:
    n = 10**9
    with (tmp_path / "p.idx").open("wb") as file:  # sparse: lengths, pointers and documents are holes, so zeros
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 1, n, n + 1))
        file.truncate(34 + 12 * n + 8 * (n + 1))
        file.seek(34 + 12 * n + 8 * n)
        file.write(struct.pack("<q", n))
    (tmp_path / "p.bin").write_bytes(b"")
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    dataset = IndexedDataset(tmp_path / "p")
    assert dataset[n // 2].size == 0
    assert len(dataset) == n
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 200
