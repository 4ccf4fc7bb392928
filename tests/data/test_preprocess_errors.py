"""The command `preprocess_data` on bad input, when interrupted, and when run twice at once."""

import errno
import functools
import gzip
import os
import signal
import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest
from preprocess_command import TEXT, command, environment, outputs, run
from processes import wait_for

from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.errors import USER_ERROR_EXIT_CODE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "in.fasta' does not exist"),
        (b"", "in.fasta' is empty"),
        (b"\n \n", "in.fasta', no FASTA record: expected a line that begins with '>'"),
        (
            b"\x7fELF\x02\x01\0\0" * 50,
            "in.fasta', line 1: expected '>' at the start of the first FASTA record, found byte 0x7F",
        ),
        (b"id,sequence\n", "in.fasta', line 1: expected '>' at the start of the first FASTA record, found 'i'"),
        (b">P1\nMK\n>P2\n>P3\nMK\n", "in.fasta', line 3: record 'P2' has no sequence"),
        (b">P1\nMK\xc3\x89\n", "in.fasta', line 2: byte 0xC3 in the sequence of record 'P1'"),
        (gzip.compress(TEXT)[:-9], "in.fasta' is truncated: its gzip data stop in mid-stream after"),
    ],
    ids=["missing", "empty", "blank", "binary", "csv", "no sequence", "not ASCII", "truncated"],
)
@pytest.mark.parametrize("force", [False, True])
def test_bad_input_is_one_sentence_exit_code_2_and_leaves_things_as_they_were(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str, force: bool
) -> None:
    if force:
        assert run(folder) == 0
        before = {name: (folder / "out" / name).read_bytes() for name in outputs(folder)}
    (folder / "in.fasta").unlink()
    if content is not None:
        (folder / "in.fasta").write_bytes(content)
    capsys.readouterr()
    assert run(folder, *(["--force"] if force else [])) == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err
    assert message in error
    assert [line for line in error.splitlines() if not line.startswith("note: ")] == [error.splitlines()[-1]]
    assert error.splitlines()[-1].startswith("error: ")
    assert outputs(folder) == (list(before) if force else [])
    if force:
        assert {name: (folder / "out" / name).read_bytes() for name in before} == before


def test_strict_stops_at_the_first_unknown_letter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--strict") == USER_ERROR_EXIT_CODE
    assert capsys.readouterr().err == (
        f"error: input file '{folder / 'in.fasta'}', line 6: unknown letter 'J' at position 4 of record 'P2'\n"
    )
    assert outputs(folder) == []


def test_a_bad_second_file_is_found_before_the_first_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_plm.data.preprocess.preprocess", None)
    assert run(folder, "--input", folder / "in.fasta", folder / "none.fasta") == USER_ERROR_EXIT_CODE
    assert "none.fasta' does not exist" in capsys.readouterr().err


def test_a_name_that_hides_the_content_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "in.fasta").write_bytes(gzip.compress(TEXT))
    assert run(folder) == 0
    assert f"note: '{folder / 'in.fasta'}': by its name plain text, by its content gzip" in capsys.readouterr().err
    assert len(IndexedDataset(folder / "out" / "p")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers must be 1 or more, not 0"),
        (["--tokenizer", "esm"], "unknown tokenizer 'esm': expected one of esm2, tape-iupac"),
        (["--tokeniser", "esm2"], "unknown flag --tokeniser; did you mean '--tokenizer'?"),
        (["--output-prefix", "{}/out"], "out' is a folder: expected FOLDER/NAME"),
        (["--output-prefix", "{}/new/"], "new/' is a folder: expected FOLDER/NAME"),
        (["--output-prefix", "{}/none/such/p"], "none/such' does not exist: create it (`mkdir -p "),
        (["--output-prefix", "{}/in.fasta/p"], "in.fasta' is not a folder"),
    ],
)
def test_bad_flags_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(folder, *(argument.format(folder) for argument in arguments)) == USER_ERROR_EXIT_CODE
    assert message in capsys.readouterr().err
    assert outputs(folder) == []


def test_an_existing_dataset_is_replaced_only_with_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    (folder / "in.fasta").write_bytes(b">one\nM\n")
    assert run(folder) == USER_ERROR_EXIT_CODE
    assert "p.bin', " in capsys.readouterr().err
    assert len(IndexedDataset(folder / "out" / "p")) == 3
    assert run(folder, "--force") == 0
    assert len(IndexedDataset(folder / "out" / "p")) == 1


def open_pipe(path: Path, reader: subprocess.Popen) -> BinaryIO:
    """Open a named pipe to write once `reader` reads it; a plain open would wait for ever if that has died."""

    def opened() -> BinaryIO | None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody has it open to read
                raise
            return None
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "wb")

    return wait_for(opened, "a reader of the pipe", process=reader)


def wait_for_work(folder: Path, process: subprocess.Popen) -> None:
    """Wait until the command writes aside."""
    wait_for(lambda: list((folder / "out").glob("p.bin.*.tmp")), "a temporary file", process=process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_dataset_and_the_next_one_cleans_up(folder: Path, number: int) -> None:
    os.mkfifo(folder / "pipe")
    arguments = command("--input", folder / "pipe", "--output-prefix", folder / "out" / "p")
    # Where the tests themselves run in the background of a shell, children begin with SIGINT ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    with process, open_pipe(folder / "pipe", process) as pipe:
        pipe.write(TEXT)
        pipe.flush()
        wait_for_work(folder, process)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert (process.returncode, error) == (130, "interrupted\n")
        assert outputs(folder) == []
    assert not set(outputs(folder)) & {"p.bin", "p.idx", "p.json"}
    assert run(folder) == 0
    assert outputs(folder) == ["p.bin", "p.idx", "p.json"]


def test_a_second_run_of_the_same_prefix_is_refused_and_the_first_finishes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(folder / "pipe")
    arguments = command("--input", folder / "pipe", "--output-prefix", folder / "out" / "p", "--force")
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL) as process:
        with open_pipe(folder / "pipe", process) as pipe:
            pipe.write(b">first\n")  # its format is told before anything is written
            pipe.flush()
            wait_for_work(folder, process)
            assert run(folder, "--force") == USER_ERROR_EXIT_CODE
            assert "another run is writing" in capsys.readouterr().err
            pipe.write(b"MKV\n")
        assert process.wait(timeout=30) == 0
    assert IndexedDataset(folder / "out" / "p").lengths.tolist() == [3]


def test_the_tool_is_the_command(folder: Path) -> None:
    done = subprocess.run(
        command("--input", folder / "in.fasta", "--output-prefix", folder / "none" / "such" / "p"),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == USER_ERROR_EXIT_CODE
    assert done.stderr.startswith("error: output folder")
