"""Hashes of records: against another implementation of the algorithm, and what they depend on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_plm.data._native import LetterTable, add_token_counts, gather
from megatron_plm.data.letters import LetterHashes
from megatron_plm.data.records import RecordBatch
from megatron_plm.tokenizers import get_tokenizer

IDENTITY = LetterTable([bytes([byte]) for byte in range(256)])


def batch_of(records: list[bytes], dtype: type = np.uint8) -> RecordBatch:
    tokens = np.frombuffer(b"".join(records), dtype=np.uint8).astype(dtype)
    return RecordBatch(tokens, np.array([len(record) for record in records], dtype=np.int32))


# Made with mmh3.hash64(data, seed, x64arch=True, signed=False), version 5.3.1.
VECTORS = [
    (b"", 0, (0x0000000000000000, 0x0000000000000000)),
    (b"", 1, (0x4610ABE56EFF5CB5, 0x51622DAA78F83583)),
    (b"M", 0, (0x9230D153ECCE584C, 0x3EA71871B2DDE72A)),
    (b"MKTAYIAK", 1, (0xB161229F41D80760, 0xAB8B5D8A04B58517)),
    (b"MKTAYIAKQRQISFVK", 2, (0x868A408497C3994E, 0x8DD6A4E1160E6CBE)),
    (b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", 4294967295, (0xC1F134631E917FAE, 0x0C58B23ABBCFC7EE)),
    (b"hello, world", 0, (0x342FAC623A5EBC8E, 0x4CDCBC079642414D)),
]


@pytest.mark.parametrize(("data", "seed", "expected"), VECTORS)
def test_known_hashes(data: bytes, seed: int, expected: tuple[int, int]) -> None:
    batch = batch_of([data])
    assert tuple(IDENTITY.hash_records(batch.tokens, batch.lengths, seed)[0].tolist()) == expected


@given(
    st.lists(st.binary(max_size=70), max_size=9),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.uint8, np.uint16, np.int32]),
)
def test_hashes_are_those_of_another_implementation(records: list[bytes], seed: int, dtype: type) -> None:
    mmh3 = pytest.importorskip("mmh3")
    batch = batch_of(records, dtype)
    hashes = IDENTITY.hash_records(batch.tokens, batch.lengths, seed)
    expected = [mmh3.hash64(record, seed, x64arch=True, signed=False) for record in records]
    assert [tuple(pair) for pair in hashes.tolist()] == expected


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=5))
def test_tokens_of_several_letters_are_hashed_as_their_letters(records: list[list[int]]) -> None:
    texts = [b"", b"AUG", b"C", b"GATTACA"]
    tokens = np.array(list(itertools.chain(*records)), dtype=np.uint16)
    lengths = np.array([len(record) for record in records], dtype=np.int32)
    spelt = batch_of([b"".join(texts[token] for token in record) for record in records])
    by_table = LetterTable(texts).hash_records(tokens, lengths, 5)
    assert by_table.tolist() == IDENTITY.hash_records(spelt.tokens, spelt.lengths, 5).tolist()


def test_what_is_no_record_is_refused() -> None:
    table = LetterTable([b"A", b"B"])
    two = np.array([1], dtype=np.int32)
    for token in (2, -1):
        with pytest.raises(IndexError, match="outside the table"):
            table.hash_records(np.array([token], dtype=np.int32), two)
    for lengths in ([2], [3, -2], []):
        with pytest.raises(ValueError, match="whole records"):
            table.hash_records(np.array([1], dtype=np.uint8), np.array(lengths, dtype=np.int32))


@pytest.mark.parametrize("letters_only", [False, True])
def test_tokenizers_that_know_the_letters_agree(letters_only: bool) -> None:
    sequences = ["MKTAYIAKQR", "mktayiakqr", "ACDEFGHIKLMNPQRSTVWYXBZUO", "MKJ*"]
    hashes = []
    for name in ("esm2", "tape-iupac"):
        tokenizer = get_tokenizer(name)
        tokens = np.concatenate([tokenizer.encode(sequence) for sequence in sequences])
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
        hashes.append(LetterHashes(tokenizer, letters_only=letters_only).of(RecordBatch(tokens, lengths)).tolist())
    assert hashes[0] == hashes[1]
    assert hashes[0][0] == hashes[0][1]
    assert len({tuple(pair) for pair in hashes[0]}) == 3


def test_only_hashes_of_letters_alone_take_gaps_and_unknown_letters_alike() -> None:
    tokenizer = get_tokenizer("esm2")
    sequences = ["MK-", "MK.", "MK*"]
    batch = RecordBatch(np.concatenate([tokenizer.encode(s) for s in sequences]), np.full(3, 3, dtype=np.int32))
    assert len({tuple(pair) for pair in LetterHashes(tokenizer, letters_only=True).of(batch).tolist()}) == 1
    assert len({tuple(pair) for pair in LetterHashes(tokenizer, letters_only=False).of(batch).tolist()}) == 3


@given(st.binary(max_size=50), st.data())
def test_stretches_are_gathered_as_by_slicing(data: bytes, draw: st.DataObject) -> None:
    pairs = draw.draw(st.lists(st.tuples(st.integers(0, len(data)), st.integers(0, len(data))).map(sorted)))
    begins = np.array([begin for begin, _ in pairs], dtype=np.int64)
    sizes = np.array([end - begin for begin, end in pairs], dtype=np.int64)
    found = gather(np.frombuffer(data, dtype=np.uint8), begins, sizes)
    assert found.tobytes() == b"".join(data[begin:end] for begin, end in pairs)


@pytest.mark.parametrize(("begin", "size"), [(-1, 1), (0, 4), (4, 0), (2, 2), (1, -1), (2**62, 2**62)])
def test_a_stretch_outside_the_data_is_refused(begin: int, size: int) -> None:
    with pytest.raises(IndexError, match="outside the data"):
        gather(np.zeros(3, dtype=np.uint8), np.array([begin]), np.array([size]))


@given(st.lists(st.integers(0, 40)), st.sampled_from([np.uint8, np.uint16, np.int32]))
def test_tokens_are_counted_as_by_numpy(ids: list[int], dtype: type) -> None:
    counts = np.full(41, 7, dtype=np.uint64)
    add_token_counts(np.array(ids, dtype=dtype), counts)
    assert counts.tolist() == (7 + np.bincount(np.array(ids, dtype=np.int64), minlength=41)).tolist()


@pytest.mark.parametrize("token", [3, -1])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(IndexError, match="outside the vocabulary"):
        add_token_counts(np.array([token], dtype=np.int32), np.zeros(3, dtype=np.uint64))
