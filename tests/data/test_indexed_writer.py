"""The MMIDIDX writer: byte by byte, against megatron-core, and killed at every step."""

import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_indexed import pack

from megatron_plm import files
from megatron_plm.data import indexed_writer
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.indexed_writer import IndexedDatasetWriter, publish
from megatron_plm.errors import UserError

METADATA = {"format": "megatron-plm-dataset", "version": 1, "num_sequences": 3, "num_residues": 7}
SEQUENCES = [[4, 5, 6], [7], [8, 9, 255]]


def append(writer: IndexedDatasetWriter, sequences: list[list[int]]) -> None:
    tokens = np.array(list(itertools.chain(*sequences)), dtype=np.uint8)
    writer.append(tokens, np.array([len(sequence) for sequence in sequences], dtype=np.int32))


def write(prefix: Path, sequences: list[list[int]] = SEQUENCES, *, force: bool = False) -> None:
    with IndexedDatasetWriter(prefix, force=force) as writer:
        append(writer, sequences)
        counts = {"num_sequences": len(sequences), "num_residues": sum(map(len, sequences))}
        writer.commit({**METADATA, **counts})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=40)  # each example waits for the disk
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=20), st.integers(1, 5))
def test_files_are_those_packed_by_hand(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[list[int]], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_writer, "_CHUNK", chunk)  # so that few sequences take several chunks
        write(folder / "p", sequences)
    index, tokens = pack(sequences, "uint8")
    assert (folder / "p.idx").read_bytes() == index
    assert (folder / "p.bin").read_bytes() == tokens
    assert names(folder) == ["p.bin", "p.idx", "p.json"]
    sha256 = json.loads((folder / "p.json").read_text())["sha256"]
    assert sha256 == {"idx": hashlib.sha256(index).hexdigest(), "bin": hashlib.sha256(tokens).hexdigest()}


def test_lengths_may_come_after_their_tokens(tmp_path: Path) -> None:
    none = np.empty(0, dtype=np.int32)
    with IndexedDatasetWriter(tmp_path / "p") as writer:
        writer.append(np.array([4, 5], dtype=np.uint8), none)
        writer.append(np.array([6, 7, 8], dtype=np.uint8), np.array([3, 1], dtype=np.int32))
        writer.append(np.array([9, 255], dtype=np.uint8), none)
        writer.append(np.empty(0, dtype=np.uint8), np.array([3], dtype=np.int32))
        writer.commit(METADATA)
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "p")] == SEQUENCES


DTYPES = ["uint8", "uint16", "int32"]
TOKENS = {"uint8": [0, 255], "uint16": [0, 255, 256, 65535], "int32": [0, 65536, 2**31 - 1, -1]}
DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4), min_size=1, max_size=6
)


def write_documents(prefix: Path, documents: list[list[np.ndarray]], dtype: str, chunk: int) -> None:
    """Write documents of sequences, some sequences at a time."""
    sequences = list(itertools.chain(*documents))
    starts = [place == 0 for document in documents for place in range(len(document))]
    with IndexedDatasetWriter(prefix, dtype=dtype, documents=True) as writer:
        for first in range(0, len(sequences), chunk):
            part = sequences[first : first + chunk]
            lengths = np.array([len(sequence) for sequence in part], dtype=np.int32)
            writer.append(np.concatenate(part), lengths, np.array(starts[first : first + chunk]))
        assert (writer.num_sequences, writer.num_documents) == (len(sequences), len(documents))
        writer.commit({**METADATA, "num_sequences": len(sequences), "num_residues": sum(map(len, sequences))})


@pytest.mark.filterwarnings("ignore:::megatron")
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)  # each example waits for the disk
@given(DOCUMENTS, st.integers(1, 5))
def test_documents_are_written_byte_by_byte_as_megatron_core_does(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, drawn: list[list[list[int]]], chunk: int
) -> None:
    from megatron.core.datasets import indexed_dataset

    folder = tmp_path_factory.mktemp("written")
    choices = np.array(TOKENS[dtype], dtype=dtype)
    documents = [[choices[np.array(ids) % len(choices)] for ids in document] for document in drawn]
    write_documents(folder / "p", documents, dtype, chunk)
    builder = indexed_dataset.IndexedDatasetBuilder(str(folder / "q.bin"), dtype=np.dtype(dtype).type)
    for document in documents:
        builder.add_document(np.concatenate(document), [len(sequence) for sequence in document])
    builder.finalize(str(folder / "q.idx"))
    for end in ("bin", "idx"):
        assert (folder / f"p.{end}").read_bytes() == (folder / f"q.{end}").read_bytes()
    expected = [sequence.tolist() for document in documents for sequence in document]
    theirs = indexed_dataset.IndexedDataset(str(folder / "p"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected
    ours = IndexedDataset(folder / "q")
    assert [sequence.tolist() for sequence in ours] == expected
    assert ours.num_documents == len(documents)
    assert ours.tokens.dtype == dtype


def test_an_append_that_does_not_fit_the_writer_is_refused(tmp_path: Path) -> None:
    one = np.array([1], dtype=np.int32)
    with IndexedDatasetWriter(tmp_path / "p", dtype=np.uint16) as writer:
        with pytest.raises(ValueError, match="not what the writer was made for"):
            writer.append(np.array([1], dtype=np.uint8), one)
        with pytest.raises(ValueError, match="not what the writer was made for"):
            writer.append(np.array([1], dtype=np.uint16), one, np.array([True]))
    with (
        IndexedDatasetWriter(tmp_path / "p", documents=True) as writer,
        pytest.raises(ValueError, match="not what the writer was made for"),
    ):
        writer.append(np.array([1], dtype=np.uint8), one)
    assert names(tmp_path) == []


def test_the_work_folder_goes_with_the_writer_or_with_the_next_run(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p") as writer:
        folder = writer.work_folder()
        (folder / "some").write_bytes(b"x")
        assert folder.parent == tmp_path
        append(writer, SEQUENCES)
        writer.commit(METADATA)
    assert names(tmp_path) == ["p.bin", "p.idx", "p.json"]
    left = tmp_path / "q.work.0123abcd.tmp"
    left.mkdir()
    (left / "some").write_bytes(b"x")
    (tmp_path / "q.work.of-someone").mkdir()
    write(tmp_path / "q")
    assert names(tmp_path) == ["p.bin", "p.idx", "p.json", "q.bin", "q.idx", "q.json", "q.work.of-someone"]


def test_several_datasets_are_published_together_or_not_at_all(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p") as first, IndexedDatasetWriter(tmp_path / "q") as second:
        for writer in (first, second):
            append(writer, SEQUENCES)
            writer.complete(METADATA)
        (tmp_path / "q.idx").write_bytes(b"of another program")
        with pytest.raises(UserError, match=r"q\.idx' exists already"):
            publish([first, second])
        (tmp_path / "q.idx").unlink()
        publish([first, second])
    assert names(tmp_path) == [f"{prefix}.{end}" for prefix in "pq" for end in ("bin", "idx", "json")]


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p") as writer:
        append(writer, SEQUENCES)
        assert len(names(tmp_path)) == 3  # the lock and two temporary files
    assert names(tmp_path) == []


def test_existing_files_are_named_and_kept_unless_forced(tmp_path: Path) -> None:
    write(tmp_path / "p")
    with pytest.raises(UserError, match=r"p\.bin', '.*p\.idx', '.*p\.json' exists already: .*--force"):
        write(tmp_path / "p", [[1]])
    assert len(IndexedDataset(tmp_path / "p")) == 3
    write(tmp_path / "p", [[1]], force=True)
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "p")] == [[1]]
    (tmp_path / "q.idx").write_bytes(b"of another program")
    with pytest.raises(UserError, match=r"output '.*q\.idx' exists already"):
        write(tmp_path / "q")
    assert (tmp_path / "q.idx").read_bytes() == b"of another program"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p") as writer:
        append(writer, SEQUENCES)
        (tmp_path / "p.idx").write_bytes(b"of another program")
        with pytest.raises(UserError, match=r"p\.idx' exists already"):
            writer.commit(METADATA)
    assert names(tmp_path) == ["p.idx"]
    assert (tmp_path / "p.idx").read_bytes() == b"of another program"


@pytest.mark.parametrize("force", [False, True])
def test_a_second_writer_of_the_same_prefix_is_refused_and_the_first_unharmed(tmp_path: Path, force: bool) -> None:
    with IndexedDatasetWriter(tmp_path / "p", force=force) as writer:
        append(writer, SEQUENCES[:1])
        with pytest.raises(UserError, match=r"another run is writing '.*p' at this moment and holds '.*p\.lock'"):
            write(tmp_path / "p", force=force)
        write(tmp_path / "p2")
        append(writer, SEQUENCES[1:])
        writer.commit(METADATA)
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "p")] == SEQUENCES
    assert names(tmp_path) == ["p.bin", "p.idx", "p.json", "p2.bin", "p2.idx", "p2.json"]


def test_without_file_locks_two_writers_still_use_different_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with IndexedDatasetWriter(tmp_path / "p") as first:
        append(first, SEQUENCES[:1])
        with IndexedDatasetWriter(tmp_path / "p") as second:
            append(second, [[1]])
        append(first, SEQUENCES[1:])
        first.commit(METADATA)
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "p")] == SEQUENCES


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_step_it_leaves_a_whole_dataset_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    old, new = [[1, 2]], SEQUENCES
    calls = 0

    def step(real: Callable[..., object]) -> Callable[..., object]:
        def dies_at_its_turn(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return dies_at_its_turn

    for owner, name in [(os, "replace"), (os, "fsync"), (os, "open"), (Path, "unlink"), (Path, "open")]:
        monkeypatch.setattr(owner, name, step(getattr(owner, name)))
    outcomes = []
    for fatal in itertools.count(1):
        folder = tmp_path / str(fatal)
        folder.mkdir()
        calls = -1000
        if existing:
            write(folder / "p", old)
        calls = 0
        code = in_child(lambda folder=folder: write(folder / "p", new, force=True))
        calls = -1000
        try:
            found = [sequence.tolist() for sequence in IndexedDataset(folder / "p")]
        except UserError:
            found = None
        outcomes.append(found)
        assert found in ([old, new, None] if existing else [new, None])
        write(folder / "p", new, force=True)
        assert names(folder) == ["p.bin", "p.idx", "p.json"], "what the killed run left is not cleaned up"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcomes[-1] == new
    assert outcomes.count(None) >= 2
    assert len(outcomes) > 10


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def write_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(UserError, match=r"p\.bin: cannot be written: File too large; free some space"):
            write(tmp_path / "p", [[1] * 200_000])
        os._exit(17)

    assert in_child(write_too_much) == 17
    assert names(tmp_path) == []


def test_a_missing_folder_is_made_and_goes_with_a_run_that_fails(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "new" / "p") as writer:
        append(writer, SEQUENCES)
    assert names(tmp_path) == []
    write(tmp_path / "new" / "p")
    assert len(IndexedDataset(tmp_path / "new" / "p")) == 3


def test_folders_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder, message in [("none/such", "does not exist: create it"), ("file", "is not a folder: choose another")]:
        with pytest.raises(UserError, match=rf"output folder '.*{folder}' {message}"):
            write(tmp_path / folder / "p")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    code = (
        "import os, sys; from megatron_plm.data.indexed_writer import IndexedDatasetWriter as W\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "W(sys.argv[1]).__enter__()"
    )
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, closed / "p"], capture_output=True, text=True, check=False, timeout=60
    )
    assert f"UserError: {closed / 'p.bin'}: cannot be written: Permission denied; choose a folder" in done.stderr
    assert names(closed) == []
