"""Fuzzing the index reader and the command on top of it: damaged, mutated and made-up datasets."""

import contextlib
import io
import json
import struct
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from megatron_plm.data.indexed import IndexedDataset, dataset_paths
from megatron_plm.data.inspect.command import main
from megatron_plm.data.inspect.contents import tokenizer_of
from megatron_plm.data.inspect.verify import verify
from megatron_plm.errors import UserError, run_command
from megatron_plm.tokenizers import get_tokenizer

_HEADER = 34
_CODES = {1: "B", 8: "H", 4: "i"}


class Files(NamedTuple):
    """The content of .idx, .bin and .json; no .json where that is None."""

    idx: bytes
    bin: bytes
    json: bytes | None


def valid_files(sequences: list[list[int]], code: int, documents: list[int]) -> Files:
    """A good dataset, packed field by field."""
    lengths = [len(sequence) for sequence in sequences]
    itemsize = struct.calcsize(_CODES[code])
    pointers = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
    index += struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(documents)}q", *lengths, *pointers, *documents)
    tokens = b"".join(struct.pack(f"<{len(sequence)}{_CODES[code]}", *sequence) for sequence in sequences)
    tokenizer = get_tokenizer("esm2")
    description = {
        "format": "megatron-plm-dataset",
        "version": 1,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "num_sequences": len(sequences),
        "num_residues": sum(lengths),
    }
    return Files(index, tokens, json.dumps(description).encode())


_WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)


@st.composite
def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["word", "byte", "cut", "insert"])):
            case "word":  # on a field's boundary more often than not
                fields = range(_HEADER, len(data) + 1, 4)
                place = draw(st.sampled_from([9, 18, 26, *fields, place]))
                data[place : place + 8] = struct.pack("<Q", draw(_WORDS))
            case "byte":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[place:]
            case "insert":
                data[place:place] = draw(st.binary(max_size=20))
    return bytes(data)


_JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_KEYS = st.sampled_from(
    ["num_sequences", "num_residues", "tokenizer", "sha256", "length_histogram", "token_counts", "command", "format"]
)
_HISTOGRAMS = st.fixed_dictionaries(
    {"min": _JSON_VALUES, "max": _JSON_VALUES, "bins": st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3)}
)


@st.composite
def files(draw: st.DrawFn) -> Files:
    """Good datasets with damage in any of their files, or none; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return Files(
            draw(st.binary(max_size=200)), draw(st.binary(max_size=50)), draw(st.none() | st.binary(max_size=50))
        )
    code = draw(st.sampled_from(sorted(_CODES)))
    sequences = draw(st.lists(st.lists(st.integers(0, 40), max_size=6), min_size=1, max_size=6))
    inner = sorted(draw(st.lists(st.integers(0, len(sequences)), max_size=4)))
    good = valid_files(sequences, code, [0, *inner, len(sequences)])
    description = good.json
    match draw(st.sampled_from(["none", "good", "keys", "bytes"])):
        case "none":
            description = None
        case "keys":
            content: dict[str, Any] = json.loads(good.json or b"")
            content |= draw(st.dictionaries(_KEYS, _JSON_VALUES | _HISTOGRAMS, max_size=3))
            description = json.dumps(content).encode()
        case "bytes":
            description = draw(_damaged(good.json or b""))
    return Files(draw(_damaged(good.idx)), draw(_damaged(good.bin)), description)


def check(case: Files) -> None:
    """The dataset opens and every access stays inside its files, or a UserError says why not; no other error."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "p"
        for path, content in zip(dataset_paths(prefix).__dict__.values(), (case.bin, case.idx, case.json), strict=True):
            if content is not None:
                path.write_bytes(content)
        for flags in ([], ["--verify"]):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                code = run_command(main, [str(prefix), "--samples", "9", "--seed", "1", *flags])
            assert code in (0, 2), code
            assert errors.getvalue().count("\n") == (code == 2), errors.getvalue()
        try:
            dataset = IndexedDataset(prefix)
        except UserError:
            return
        with contextlib.suppress(UserError):
            assert dataset.sha256 is None or len(dataset.sha256) == 64
        readable = [_read(dataset, i, case.bin) for i in range(len(dataset))]
        try:
            verify(dataset, tokenizer_of(dataset)[0], lambda _: None)
        except UserError:
            return
        assert b"".join(part for part in readable if part is not None) == case.bin, "verified, but with gaps"
        assert list(dataset.document_indices) == sorted(dataset.document_indices)


def _read(dataset: IndexedDataset, index: int, content: bytes) -> bytes | None:
    """The bytes of a sequence, which must be those of the file; None where it is refused."""
    try:
        tokens = dataset[index]
    except UserError:
        return None
    begin = int(dataset.pointers[index])
    assert len(tokens) == dataset.lengths[index]
    assert tokens.tobytes() == content[begin : begin + tokens.nbytes]
    return tokens.tobytes()


def fuzz_index(*, seconds: int, seed_: int, keep: Path) -> bool:
    """Check made-up datasets for so long; whether all were fine. Failing ones are printed, made as small as can be."""
    start, num_examples, round_size = time.monotonic(), 0, 1000
    while time.monotonic() - start < seconds:

        @seed(seed_ + num_examples)
        @settings(
            max_examples=round_size,
            deadline=None,
            database=DirectoryBasedExampleDatabase(keep),
            suppress_health_check=list(HealthCheck),
        )
        @given(files())
        def one_round(case: Files) -> None:
            check(case)

        try:
            one_round()
        except Exception as error:
            print(f"index: {''.join(traceback.format_exception(error))}")
            return False
        num_examples += round_size
    print(f"index: {num_examples} datasets")
    return True
