"""Parquet and TAPE's LMDB: what is read, and what is refused without being run."""

import contextlib
import gzip
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
from harmful_pickle import Calls
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import ESM2, encode, hash_of

from megatron_plm.data.readers import SequenceReader, open_inputs
from megatron_plm.data.readers.tape_pickle import RefusedPickle, load_record
from megatron_plm.errors import UserError

SEQUENCES = ["MKTAYIAKQRQISF", "MKVLAG", "ACDEFGHIKLMNPQRSTVWY"] * 2000
NAMES = [f"P{number} some" for number in range(len(SEQUENCES))]
HASHES = [hash_of(name.split()[0].encode()) for name in NAMES]


def check(path: Path, **options: str) -> None:
    for workers in (1, 3):
        (source,) = open_inputs([path], **options)
        batches = list(SequenceReader(ESM2, workers=workers, names=True, identifiers=True).read([source]))
        tokens = b"".join(batch.tokens for batch in batches)
        assert tokens == b"".join(encode([sequence.encode() for sequence in SEQUENCES]))
        assert np.concatenate([batch.lengths for batch in batches]).tolist() == list(map(len, SEQUENCES))
        assert [name.tolist() for batch in batches for name in batch.names] == HASHES
        assert [name for batch in batches for name in batch.identifiers] == NAMES
        assert source.position == source.size > 0


def refused(path: Path, **options: str) -> str:
    with pytest.raises(UserError) as error:
        list(SequenceReader(ESM2).read(open_inputs([path], **options)))
    assert path.name in str(error.value)
    return str(error.value)


# --- parquet ---


def parquet(path: Path, **columns: Any) -> Path:
    arrow.parquet.write_table(arrow.table(columns), path, row_group_size=2500)
    return path


def test_long_sequences_come_a_few_at_a_time(tmp_path: Path) -> None:
    path = parquet(tmp_path / "long.parquet", sequence=[f"{'MKTAYIAKQR' * 10_000}{'A' * n}" for n in range(300)])
    batches = list(SequenceReader(ESM2).read(open_inputs([path])))
    assert sum(len(batch.lengths) for batch in batches) == 300
    assert max(batch.tokens.nbytes for batch in batches) <= 4 << 20


@pytest.mark.parametrize(
    "kind", [arrow.string(), arrow.large_string(), arrow.binary(), arrow.string_view(), "dictionary"]
)
def test_a_column_of_any_kind_of_text_is_read(tmp_path: Path, kind: Any) -> None:
    column = arrow.array(SEQUENCES)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    check(parquet(tmp_path / "a.parquet", id=NAMES, sequence=column, x=list(range(len(NAMES)))))


def test_other_columns_are_read_where_named_and_numbers_are_names(tmp_path: Path) -> None:
    path = parquet(tmp_path / "nameless", number=[7, 8], seq=["MK", "LA*"])
    (source,) = open_inputs([path], column="seq", name_column="number")
    (batch,) = SequenceReader(ESM2, names=True).read([source])
    assert batch.names is not None
    assert batch.names.tolist() == [hash_of(b"7"), hash_of(b"8")]
    assert ESM2.decode(batch.tokens) == "MKLA"


def test_bad_parquet_is_told(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", id=NAMES, seq=SEQUENCES)
    assert "has no column 'sequence', or several: it has id, seq; name the column" in refused(path)
    assert ", row 3: the sequence is empty" in refused(parquet(tmp_path / "b.parquet", sequence=["MK", "L", None]))
    row = [*SEQUENCES, "MK\0"]
    message = refused(parquet(tmp_path / "c.parquet", sequence=row))
    assert f", row {len(row)}: byte 0x00 in the sequence: the file is damaged" in message
    assert "column 'sequence' holds double, not text" in refused(parquet(tmp_path / "d.parquet", sequence=[0.5]))
    path.write_bytes(path.read_bytes()[:-100])
    assert "is no parquet file that can be read, or is damaged" in refused(path)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "parquet is read in any order: decompress it" in refused(path, format="parquet")


def test_parquet_without_its_package_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", sequence=["MK"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs the package pyarrow: run `pip install 'megatron-plm[parquet]'`" in refused(path)


# --- LMDB ---


def database(path: Path, records: list[Any], *, subdir: bool = True, count: Any = None) -> Path:
    with lmdb.open(str(path), map_size=1 << 26, subdir=subdir) as environment, environment.begin(write=True) as writer:
        for number, record in enumerate(records):
            value = record if isinstance(record, bytes) else pickle.dumps(record)
            writer.put(str(number).encode(), value)
        writer.put(b"num_examples", pickle.dumps(len(records) if count is None else count))
    return path


@pytest.mark.parametrize("subdir", [True, False])
def test_a_tape_database_is_read(tmp_path: Path, subdir: bool) -> None:
    records = [
        {
            "primary": sequence,
            "protein_length": len(sequence),
            "id": name.encode() if len(name) % 2 else name,
            "ss3": np.zeros(len(sequence), dtype=np.int64),
            "log_fluorescence": np.array([0.5], dtype=np.float32),
        }
        for sequence, name in zip(SEQUENCES, NAMES, strict=True)
    ]
    check(database(tmp_path / "a.lmdb", records, subdir=subdir))


@pytest.mark.parametrize("place", ["record", "num_examples"])
def test_a_pickle_that_calls_a_function_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    harm = Calls(os.mkdir, str(tmp_path / "harm"))
    if place == "record":
        path = database(tmp_path / "a.lmdb", [{"primary": "MK"}, {"primary": "MK", "x": [harm]}])
        what = "record 1: its pickle names posix.mkdir, which no record needs and which may run code"
    else:
        path = database(tmp_path / "a.lmdb", [{"primary": "MK"}], count=harm)
        what = "key 'num_examples': its pickle names posix.mkdir"
    assert what in refused(path)
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(harm))
    assert (tmp_path / "harm").exists(), "the same pickle, where it may"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"primary": "MK"}, {"id": "x"}], "record 1: expected text under 'primary', the record lacks it"),
        ([{"primary": 3}], "record 0: expected text under 'primary', found int"),
        ([["MK"]], "record 0: expected a dictionary, found list"),
        ([b"junk"], "record 0: its pickle is damaged"),
        ([{"primary": "MK"}, {"primary": ""}], "record 1: the sequence is empty"),
        ([{"primary": "MÉ"}], "record 0: byte 0xC3 in the sequence"),
        ([], "holds no sequence"),
    ],
)
def test_bad_records_are_told(tmp_path: Path, records: list[Any], message: str) -> None:
    assert message in refused(database(tmp_path / "a.lmdb", records))


def test_bad_databases_are_told(tmp_path: Path) -> None:
    assert "has no record 1: the database is damaged" in refused(database(tmp_path / "a", [{"primary": "M"}], count=2))
    assert "expected a count, found str" in refused(database(tmp_path / "b", [{"primary": "M"}], count="1"))
    with lmdb.open(str(tmp_path / "c")) as environment, environment.begin(write=True) as writer:
        writer.put(b"0", b"x")
    assert "has no key 'num_examples': expected an LMDB database as TAPE writes them" in refused(tmp_path / "c")
    (tmp_path / "c" / "data.mdb").write_bytes(b"no database")
    assert "is no LMDB database that can be read, or is damaged" in refused(tmp_path / "c")
    assert "is an LMDB folder, not csv: leave out --format" in refused(tmp_path / "b", format="csv")


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    np.array([], dtype=np.uint8),
    np.array([True, False]),
    np.array(["a", "bc"]),
    np.array(3.5),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_of_every_protocol_and_numpy_are_loaded(protocol: int, core: str) -> None:
    record = {"arrays": ARRAYS, "scalar": np.float32(0.5), "set": {1, 2}, "x": (1.5, None, True, b"\xff", 2**80, 1j)}
    content = pickle.dumps(record, protocol)
    if protocol == 0:  # names end at a newline
        content = content.replace(b"numpy._core.", f"{core}.".encode())
    elif core == "numpy.core":
        if protocol >= 4:  # names carry their length
            content = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
            content = content.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
            content = _without_frame(content)
        else:
            content = content.replace(b"cnumpy._core.", b"cnumpy.core.")
    assert (b"numpy._core" in content) == (core == "numpy._core")
    loaded = load_record(content)
    for array, found in zip(ARRAYS, loaded["arrays"], strict=True):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert {**loaded, "arrays": None} == {**record, "arrays": None}


def _without_frame(content: bytes) -> bytes:
    """A frame tells the length of what follows, which has changed; pickles may do without."""
    assert content[2:3] == b"\x95"
    return content[:2] + content[11:]


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\ngetattr\n.",
        b"cbuiltins\nexec\n.",
        b"cos\nsystem\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"(S'x'\ni__main__\nX\n.",
        b"cnumpy._core.numeric\n_frombuffer\n(N}S'x'\nNstb.",  # sets an attribute of what it was handed
        b"c__builtin__\nbytes\n(L9000000000L\ntR.",
        b"Nr\x00\x00\x00\x20.",  # a value at a far place
        b"Np500000000\n.",
        b"",
        b".",
        b"\x80\x05",
    ],
)
def test_other_names_and_damaged_pickles_are_refused(content: bytes) -> None:
    with pytest.raises(RefusedPickle):
        load_record(content)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=300)
@given(st.data())
def test_a_damaged_pickle_is_refused_or_loads_plain_values(data: st.DataObject) -> None:
    content = bytearray(pickle.dumps({"primary": "MK", "x": ARRAYS[0]}, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RefusedPickle):
        load_record(bytes(content))


# Calls of what a record may name, with arguments that none has.
RECONSTRUCT = np.empty(0).__reduce__()[0]


@pytest.mark.parametrize(
    "value",
    [
        Calls(np.ndarray, (1,), np.dtype("O"), b"\x10" * 8),  # eight bytes as a pointer
        Calls(np.ndarray, (1,)),
        Calls(RECONSTRUCT, list, (0,), b"b"),
        Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, b"\x10" * 8)),
        Calls(RECONSTRUCT, np.ndarray, (0,), b"b"),
        Calls(np.dtype, "f8", state=(3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0x3F)),
        np.array([object.__name__, 1], dtype=object),
        np.zeros(3, dtype=[("a", "f8")]),
    ],
)
def test_nothing_in_a_pickle_makes_pointers_of_bytes(value: Any) -> None:
    for protocol in (2, 4, 5):
        with pytest.raises(RefusedPickle):
            load_record(pickle.dumps({"primary": "MK", "x": value}, protocol))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "u1", "<i8", "?", "U5", "S3", "<c8"])
def test_arrays_and_numbers_of_every_plain_dtype_are_read(dtype: str, protocol: int) -> None:
    matrix = np.arange(12).reshape(3, 4).astype(dtype)
    record = {"a": matrix, "f": np.asfortranarray(matrix), "n": matrix[1, 2], "in": [(matrix[0], 1)], "e": matrix[:0]}
    found = load_record(pickle.dumps(record, protocol))
    for key in ("a", "f", "e"):
        np.testing.assert_array_equal(found[key], record[key])
        assert found[key].dtype == record[key].dtype
        assert type(found[key]) is np.ndarray
    assert found["n"] == record["n"]
    np.testing.assert_array_equal(found["in"][0][0], matrix[0])
