"""Flags of the selection, damaged tables of clusters, full disks and kills: one sentence, and nothing half-written."""

import gzip
import io
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from preprocess_command import outputs, run
from test_selection import proteins, write_fasta

from megatron_plm.data import external_sort
from megatron_plm.data.external_sort import ExternalSort
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.indexed_writer import IndexedDatasetWriter
from megatron_plm.data.store import Column
from megatron_plm.errors import USER_ERROR_EXIT_CODE

TABLE = "C1\tP1\nC1\tP2\n"
EVERYTHING = [
    "--dedup",
    "--shuffle",
    "--clusters",
    "{}/clusters.tsv",
    "--split",
    "train=0.7,valid=0.3",
    "--min-length",
    "9",
]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-length", "0"], "--min-length must be 1 or more, not 0"),
        (["--max-length", "-3"], "--max-length must be 1 or more, not -3"),
        (["--min-length", "9", "--max-length", "8"], "--min-length 9 is above --max-length 8: nothing would be left"),
        (["--max-length", "many"], "argument --max-length: invalid int value: 'many'"),
        (["--split", "train=0.9,valid=0.2"], "add up to 1.1, not to 1"),
        (["--split", "train=0.9,dev=0.1"], "unknown split 'dev'; expected train, valid, test"),
        (["--seed", "3"], "--seed is that of --shuffle: give --shuffle too"),
        (["--shuffle", "--seed", "-1"], "--seed must be 0 to"),
        (["--cluster", "x"], "unknown flag --cluster; did you mean '--clusters'?"),
        (["--clusters", "{}/none.tsv"], "none.tsv' does not exist"),
        (["--min-length", "21"], "nothing is left of 3 sequences: 3 are shorter than --min-length and 0 longer than"),
        (["--split", "train=0.999999,test=0.000001"], "none of 3 sequences falls into test: give it a larger fraction"),
    ],
)
def test_bad_flags_are_told_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(folder, *(flag.format(folder) for flag in flags)) == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert outputs(folder) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "clusters.tsv' is empty"),
        (b"\n\n", "clusters.tsv' lists no clusters; expected lines of representative, tab, member"),
        (b"C1\tP1\nP2\n", "clusters.tsv', line 2: expected two columns, representative and member, with a tab between "
         "them, found 'P2'"),
        (b"C1\tP1\n\tP2\n", "clusters.tsv', line 2: expected two columns"),
        (b"C1\tP1\nC1\t\n", "clusters.tsv', line 2: expected two columns"),
        (b"C1\tP1\nC1\tP2\t0.9\n", "clusters.tsv', line 2: expected two columns"),
        (b"C1,P1\nC1,P2\n", "clusters.tsv', line 1: expected two columns"),
        (b"C1\tP1\n\nC2\tP2\nC1\tP2\n", "'P2' is in two clusters, 'C2' (line 3) and 'C1' (line 4)"),
        (b"C1\tQ1\nC1\tQ2\n", "none of the 2 members in"),
        (gzip.compress(TABLE.encode() * 9)[:-9], "clusters.tsv' is truncated: its gzip data stop"),
    ],
)  # fmt: skip
def test_a_bad_table_of_clusters_is_told_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], table: bytes, message: str
) -> None:
    (folder / "clusters.tsv").write_bytes(table)
    assert run(folder, "--clusters", folder / "clusters.tsv") == USER_ERROR_EXIT_CODE
    assert message in capsys.readouterr().err
    assert outputs(folder) == []


def test_a_table_without_line_breaks_or_on_standard_input_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "clusters.tsv").write_bytes(b"x" * 10_000_000)
    assert run(folder, "--clusters", folder / "clusters.tsv") == USER_ERROR_EXIT_CODE
    assert "line 1: more than 4,194,304 bytes without a line break" in capsys.readouterr().err
    assert run(folder, "--clusters", "-") == USER_ERROR_EXIT_CODE
    assert "--clusters -: a table may have to be read twice" in capsys.readouterr().err
    assert outputs(folder) == []


def test_a_table_is_read_block_by_block_to_the_same_effect(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"C{i // 3}\tP{i}" for i in range(400)]
    for lines_end, bad in [("\n", ""), ("\r\n", ""), ("\n", "lonely")]:
        monkeypatch.setattr("megatron_plm.data.formats.BLOCK_SIZE", 7 if bad else 1 << 20)
        (folder / "clusters.tsv").write_text(lines_end.join([*lines, *([bad] if bad else [])]))
        code = run(folder, "--clusters", folder / "clusters.tsv", "--force")
        assert code == (USER_ERROR_EXIT_CODE if bad else 0)
        if bad:
            assert "clusters.tsv', line 401: expected two columns" in capsys.readouterr().err
    metadata = IndexedDataset(folder / "out" / "p").metadata["selection"]["clusters"]
    # P1 (of sp|P1|A) and P2 are in one cluster, P3 is in the next.
    assert metadata["num_clusters"] == 2
    assert (metadata["num_members"], metadata["num_members_missing"]) == (400, 397)


def sample(folder: Path) -> None:
    """An input whose processing takes some time, and a table of its clusters."""
    records = proteins(1500)
    write_fasta(folder / "in.fasta", records * 2)
    (folder / "clusters.tsv").write_text("".join(f"C{i % 900}\tP{i}\n" for i in range(1500)))


def in_child(folder: Path, flags: list[str], *, file_size: int | None = None, fatal_step: int = -1) -> int:
    """Start the command in a forked process, which writes its messages and how many steps it took to files.

    It kills itself before step `fatal_step` of those that open, write, sync, rename or remove. Returns its process id.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        external_sort.MEMORY = 200_000
        steps = itertools.count()
        for owner, name in STEPS:
            setattr(owner, name, stepping(getattr(owner, name), steps, fatal_step))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, limits[1]))
        code = run(folder, *flags)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        num_steps = next(steps)
        (folder / "messages").write_text(sys.stderr.getvalue())
        (folder / "steps").write_text(str(num_steps))
    finally:
        os._exit(code)


STEPS = [
    *((os, name) for name in ("replace", "fsync", "open")),
    *((Path, name) for name in ("open", "unlink", "mkdir")),
    (IndexedDatasetWriter, "append"),
    (ExternalSort, "_write"),
    (Column, "append"),
    (Column, "take"),
]


def stepping(real: Callable[..., object], steps: Iterator[int], fatal_step: int) -> Callable[..., object]:
    def step(*args: object, **kwargs: object) -> object:
        if next(steps) == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return step


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CASES = {
    "split": EVERYTHING[4:6],
    "dedup": ["--dedup"],
    "shuffle": ["--shuffle"],
    "clusters": EVERYTHING[2:4],
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_killed_at_any_step_it_leaves_whole_datasets_or_none_and_the_next_run_cleans_up(
    folder: Path, flags: list[str]
) -> None:
    sample(folder)
    flags = [*(flag.format(folder) for flag in flags), "--force"]
    assert exit_code(in_child(folder, flags)) == 0
    whole = {name: (folder / "out" / name).read_bytes() for name in outputs(folder)}
    num_steps = int((folder / "steps").read_text())
    last = num_steps - 12  # about where the files get their names
    source = random.Random(1)
    for step in [*(source.randrange(last) for _ in range(3)), source.randrange(last, num_steps)]:
        for path in (folder / "out").iterdir():
            path.unlink()
        assert exit_code(in_child(folder, flags, fatal_step=step)) == -signal.SIGKILL
        for name in set(outputs(folder)) & set(whole):
            if name.endswith(".idx"):  # without it a dataset doesn't open
                for end in ("idx", "bin"):
                    file = name.replace("idx", end)
                    assert (folder / "out" / file).read_bytes() == whole[file]
        assert exit_code(in_child(folder, flags)) == 0
        assert {name: (folder / "out" / name).read_bytes() for name in outputs(folder)} == whole


@pytest.mark.parametrize("file_size", [1000, 10_000, 30_000])
@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_files_that_may_not_grow_are_told_and_leave_nothing(folder: Path, flags: list[str], file_size: int) -> None:
    sample(folder)
    flags = [flag.format(folder) for flag in flags]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    assert exit_code(in_child(folder, flags, file_size=file_size)) == USER_ERROR_EXIT_CODE
    message = (folder / "messages").read_text()
    assert message.startswith("error: ")
    assert ": cannot be written: File too large; free some space or choose another disk\n" in message
    assert message.count("\n") == 1
    assert outputs(folder) == []


@pytest.mark.parametrize("kilobytes", [64, 200, 300])
def test_a_full_disk_is_told_and_leaves_nothing(folder: Path, kilobytes: int) -> None:
    sample(folder)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder / "out"], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        flags = [flag.format(folder) for flag in EVERYTHING]
        assert exit_code(in_child(folder, flags)) == USER_ERROR_EXIT_CODE
        message = (folder / "messages").read_text()
        assert ": cannot be written: No space left on device; free some space or choose another disk\n" in message
        assert outputs(folder) == []
    finally:
        subprocess.run(["umount", folder / "out"], check=True)


def test_two_runs_of_the_same_splits_are_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(folder)
    flags = ["--split", "train=0.5,valid=0.5"]
    with IndexedDatasetWriter(folder / "out" / "p_valid"):
        assert run(folder, *flags) == USER_ERROR_EXIT_CODE
        assert "another run is writing" in capsys.readouterr().err
    assert outputs(folder) == []
    assert run(folder, *flags) == 0
    assert run(folder, *flags) == USER_ERROR_EXIT_CODE
    assert "p_train.bin', " in capsys.readouterr().err
