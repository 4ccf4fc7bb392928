"""A killed run goes on, and ends with the bytes that an uninterrupted one writes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from inference_sample import peer_checkpoint, random_sequences, run, write_fasta
from processes import environment, wait_for
from stopped_runs import SLOW, journal, killed

SEQUENCES = random_sequences([20 + 7 * (n % 11) for n in range(150)], seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    peer_checkpoint(folder / "model")
    write_fasta(folder / "in.fasta", SEQUENCES)
    return folder


def flags(folder: Path, output: Path) -> list[str]:
    base = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", output]
    return [*map(str, base), "--max-length", "200", "--batch-tokens", "200"]


POOLINGS = ["--pooling", "mean", "residues", "--layers", "1", "-1"]


@pytest.fixture(scope="module")
def work(folder, tmp_path_factory):
    """The folder of the work of a run that was killed twice."""
    output = tmp_path_factory.mktemp("work") / "out.npz"
    for records in (20, 60):
        killed(["embed", *flags(folder, output), *POOLINGS], output, records)
    return output.with_name("out.npz.partial")


@pytest.fixture
def stopped(work, tmp_path):
    """The output of such a run."""
    shutil.copytree(work, tmp_path / "out.npz.partial")
    return tmp_path / "out.npz"


@pytest.mark.parametrize("ending", ["npz", "h5", "parquet"])
def test_embeddings_go_on_after_kills_and_end_with_the_same_bytes(folder, work, tmp_path, ending, capsys):
    output, whole = tmp_path / f"out.{ending}", tmp_path / f"whole.{ending}"
    shutil.copytree(work, tmp_path / f"out.{ending}.partial")
    certain = journal(output)["records"]
    # What a kill leaves behind the last commit is no part of the result.
    with (tmp_path / f"out.{ending}.partial" / "mean_layer1.bin").open("ab") as file:
        file.write(b"\1" * 77)
    assert run("embed", *flags(folder, output), *POOLINGS) == 0
    assert f"going on behind {certain:,} proteins" in capsys.readouterr().out
    assert run("embed", *flags(folder, whole), *POOLINGS) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == [output.name, whole.name]


def test_perplexities_go_on_after_a_kill(folder, tmp_path):
    output, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    few = ["--input", str(write_fasta(tmp_path / "few.fasta", SEQUENCES[:22]))]
    killed(["score", "perplexity", *flags(folder, output), *few], output, 10)
    assert run("score", "perplexity", *flags(folder, output), *few) == 0
    assert run("score", "perplexity", *flags(folder, whole), *few) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_the_work_of_another_command_is_refused_and_replaced_by_force(folder, stopped, capsys):
    assert run("embed", *flags(folder, stopped), *POOLINGS, "--layers", "1") == 2
    told = capsys.readouterr().err
    assert "out.npz.partial holds the work of a run that was stopped, with layers [1, 3] in place of [1]" in told
    assert journal(stopped)["records"] >= 20
    assert run("embed", *flags(folder, stopped), *POOLINGS, "--layers", "1", "--force") == 0
    assert "going on" not in capsys.readouterr().out


def test_another_input_is_refused(folder, stopped, tmp_path, capsys):
    other = write_fasta(tmp_path / "other.fasta", [SEQUENCES[0][::-1], *SEQUENCES[1:]])
    shorter = write_fasta(tmp_path / "shorter.fasta", SEQUENCES[:5])
    for path in (other, shorter):
        assert run("embed", *flags(folder, stopped), *POOLINGS, "--input", path) == 2
        assert "on another input than this" in capsys.readouterr().err
    # What comes behind the part that was done may differ: a record that stopped the run was mended, say.
    longer = write_fasta(tmp_path / "longer.fasta", [*SEQUENCES, "MKV"])
    assert run("embed", *flags(folder, stopped), *POOLINGS, "--input", longer) == 0


def test_another_input_is_begun_anew_by_force(folder, stopped, tmp_path, capsys):
    other = write_fasta(tmp_path / "other.fasta", [SEQUENCES[0][::-1], *SEQUENCES[1:]])
    assert run("embed", *flags(folder, stopped), *POOLINGS, "--input", other, "--force") == 0
    told = capsys.readouterr().out
    assert "that was another input than this, so it is begun anew" in told
    assert f"embedded {len(SEQUENCES):,} proteins" in told
    assert run("embed", *flags(folder, tmp_path / "whole.npz"), *POOLINGS, "--input", other) == 0
    assert stopped.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not stopped.with_name("out.npz.partial").exists()


def test_other_weights_are_refused(folder, stopped, tmp_path, capsys):
    peer_checkpoint(tmp_path / "other", seed=5)
    assert run("embed", *flags(folder, stopped), *POOLINGS, "--checkpoint", tmp_path / "other") == 2
    assert "with weights " in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["journal", "column"])
def test_damaged_work_is_told(folder, stopped, damage, capsys):
    work = stopped.with_name("out.npz.partial")
    if damage == "journal":
        (work / "journal.json").write_text('{"records": 1')
    else:
        os.truncate(work / "mean_layer1.bin", 4)
    assert run("embed", *flags(folder, stopped), *POOLINGS) == 2
    assert "is damaged" in capsys.readouterr().err
    assert work.is_dir()


def test_a_second_run_of_the_same_output_is_refused(folder, tmp_path, capsys):
    output = tmp_path / "out.npz"
    process = subprocess.Popen([sys.executable, "-c", SLOW, "embed", *flags(folder, output)], env=environment())
    try:
        wait_for(lambda: journal(output)["records"] > 0, "work", process=process, seconds=200)
        assert run("embed", *flags(folder, output)) == 2
        assert "another run is writing" in capsys.readouterr().err
        process.wait(timeout=200)
    finally:
        process.kill()
        process.wait()
    assert output.exists()


def test_an_input_fault_before_any_work_leaves_nothing(folder, tmp_path):
    path = write_fasta(tmp_path / "bad.fasta", [*SEQUENCES, ""])
    assert run("embed", *flags(folder, tmp_path / "out.npz"), "--input", path) == 2
    assert os.listdir(tmp_path) == ["bad.fasta"]


def test_a_run_stopped_while_the_file_is_put_together_goes_on(folder, tmp_path, monkeypatch, capsys):
    output, whole = tmp_path / "out.npz", tmp_path / "whole.npz"

    def interrupted(*_arguments, **_flags):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_plm.inference.job.publish", interrupted)
        assert run("embed", *flags(folder, output)) == 130
    assert not output.exists()
    assert run("embed", *flags(folder, output)) == 0
    assert "embedded 0 proteins" in capsys.readouterr().out
    assert run("embed", *flags(folder, whole)) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["precious.txt", "mean.bin", "output"])
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
def test_a_folder_of_the_user_is_refused_and_left_as_it_is(folder, tmp_path, name, force, capsys):
    theirs = tmp_path / "out.npz.partial"
    theirs.mkdir()
    (theirs / name).write_text("x")
    assert run("embed", *flags(folder, tmp_path / "out.npz"), *force) == 2
    assert f"out.npz.partial is in the way: it holds {name}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out.npz.partial"]
    assert [(path.name, path.read_text()) for path in theirs.iterdir()] == [(name, "x")]


def test_a_file_of_the_user_outlives_the_work_beside_it(folder, stopped):
    theirs = stopped.with_name("out.npz.partial") / "precious.txt"
    theirs.write_text("x")
    assert run("embed", *flags(folder, stopped), *POOLINGS) == 0
    assert stopped.exists()
    assert os.listdir(theirs.parent) == ["precious.txt"]


def test_a_file_with_the_name_of_the_folder_is_in_the_way(folder, tmp_path, capsys):
    (tmp_path / "out.npz.partial").write_text("x")
    assert run("embed", *flags(folder, tmp_path / "out.npz")) == 2
    assert "out.npz.partial is in the way: it is no folder" in capsys.readouterr().err
    assert (tmp_path / "out.npz.partial").read_text() == "x"


def test_work_that_was_killed_before_anything_was_certain_is_begun_anew(folder, tmp_path):
    left = tmp_path / "out.npz.partial"
    left.mkdir()
    for name in ("lock", "residues.bin", "names.bin", "journal.json.tmp"):
        (left / name).write_text("x")
    assert run("embed", *flags(folder, tmp_path / "out.npz")) == 0
    assert os.listdir(tmp_path) == ["out.npz"]


def test_an_output_that_was_made_in_the_meantime_is_kept(folder, stopped, capsys):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "embed", *flags(folder, stopped), *POOLINGS],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        before = journal(stopped)["records"]
        wait_for(lambda: journal(stopped)["records"] > before, "work", process=process, seconds=200)
        stopped.write_text("theirs")
        told = process.communicate(timeout=200)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 2
    assert "out.npz was made by another run in the meantime" in told
    assert stopped.read_text() == "theirs"
    assert journal(stopped)["records"] == len(SEQUENCES)
    assert run("embed", *flags(folder, stopped), *POOLINGS, "--force") == 0
    assert "embedded 0 proteins" in capsys.readouterr().out
    assert sorted(os.listdir(stopped.parent)) == ["out.npz"]
