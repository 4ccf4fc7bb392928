"""Scores of variants and contact maps go on after a kill, too; and what a stop leaves is neither taken nor kept."""

import os
import shutil
import signal

import numpy as np
import pytest
from full_disk import full_disk
from inference_sample import peer_checkpoint, random_sequences, run, write_fasta
from stopped_runs import journal, killed

from megatron_plm.data import external_sort
from megatron_plm.data.dedup import DuplicateFinder

SEQUENCES = random_sequences([30 + n for n in range(12)], seed=3)
(WILD_TYPE,) = random_sequences([60], seed=4)
ALL = [f"{letter}{number}W" for number, letter in enumerate(WILD_TYPE[:50], start=1) if letter != "W"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    peer_checkpoint(folder / "model")
    write_fasta(folder / "in.fasta", SEQUENCES)
    write_table(folder / "v.csv", ALL)
    return folder


def write_table(path, variants):
    path.write_text("mutant\n" + "".join(f"{variant}\n" for variant in variants))
    return path


def variants(folder, output, *flags):
    base = ["--checkpoint", folder / "model", "--variants", folder / "v.csv", "--sequence", WILD_TYPE]
    rows = ["--max-length", 62, "--batch-tokens", 130]  # two positions a row
    return ["score", "variants", *map(str, [*base, *rows, "--output", output, *flags])]


def contacts(folder, output, *flags):
    base = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", output]
    return ["score", "contacts", *map(str, [*base, *flags])]


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def stopped_variants(folder, tmp_path_factory):
    """The work of a run that was killed."""
    output = tmp_path_factory.mktemp("work") / "out"
    killed(variants(folder, output), output, 8)
    return output.with_name("out.partial")


@pytest.mark.parametrize("others", [[], ["WT", ALL[-1], *ALL]], ids=["same", "other variants of the same positions"])
def test_variants_go_on_after_a_kill_and_end_with_the_same_bytes(folder, stopped_variants, tmp_path, others, capsys):
    output, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(stopped_variants, tmp_path / "out.partial")
    certain = journal(output)["records"]
    flags = ["--variants", write_table(tmp_path / "v.csv", others)] if others else []
    assert 8 <= certain < len(ALL)
    assert run(*variants(folder, output, *flags)) == 0
    assert f"going on behind {certain} positions" in capsys.readouterr().out
    assert run(*variants(folder, whole, *flags)) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert {"out", "whole"} <= set(os.listdir(tmp_path)) <= {"out", "whole", "v.csv"}


def test_the_work_of_other_variants_is_refused_and_replaced_by_force(folder, stopped_variants, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(stopped_variants, tmp_path / "out.partial")
    few = write_table(tmp_path / "few.csv", ALL[:3])
    for flags, what in [
        (["--variants", few], "positions"),
        (["--sequence", WILD_TYPE[:-1] + "X"], "wild_type"),
        (["--strategy", "wt-marginals"], "values"),
    ]:
        assert run(*variants(folder, output, *flags)) == 2
        assert f"holds the work of a run that was stopped, with {what} " in capsys.readouterr().err
    assert run(*variants(folder, output, "--variants", few, "--force")) == 0
    assert "going on" not in capsys.readouterr().out
    assert output.read_text().count("\n") == 4


def test_contact_maps_go_on_after_a_kill_and_end_with_the_same_bytes(folder, tmp_path, capsys):
    output, whole = tmp_path / "out", tmp_path / "whole"
    killed(contacts(folder, output), output, 3)
    certain = journal(output)["records"]
    files = tmp_path / "out.partial" / "files"
    assert certain < len(SEQUENCES)
    (files / f"{certain + 1:05d}_p{certain}.npz").write_bytes(b"half")  # what a kill leaves behind the last commit
    (files / "00099_gone.png").write_bytes(b"of a protein that the input has no more")
    assert run(*contacts(folder, output)) == 0
    assert f"going on behind {certain} proteins" in capsys.readouterr().out
    assert run(*contacts(folder, whole)) == 0
    assert content(output) == content(whole)
    assert len(content(output)) == 2 * len(SEQUENCES)
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.fixture(scope="module")
def stopped_maps(folder, tmp_path_factory):
    """The work of a run that Ctrl-C stopped, and what the run said."""
    output = tmp_path_factory.mktemp("work") / "out"
    return output.with_name("out.partial"), killed(contacts(folder, output), output, 3, signal.SIGINT)


def test_an_interrupted_run_says_how_it_goes_on(stopped_maps):
    work, told = stopped_maps
    last = told.splitlines()[-2:]  # on a busy machine lines of progress stand before
    assert last == [f"the work is kept in {work}; the same command goes on with it", "interrupted"]
    assert sorted(os.listdir(work)) == ["files", "journal.json", "lengths.bin", "name_sizes.bin", "names.bin"]


def test_a_map_that_is_missing_is_told(folder, stopped_maps, tmp_path, capsys):
    shutil.copytree(stopped_maps[0], tmp_path / "out.partial")
    (tmp_path / "out.partial" / "files" / "00002_p1.npz").unlink()
    assert run(*contacts(folder, tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert "00002_p1.npz: is missing, which a stopped run had written; remove what is left of it with `rm -r" in told
    assert not (tmp_path / "out").exists()


def test_a_kill_right_behind_the_publishing_is_begun_anew_by_force(folder, stopped_maps, tmp_path, capsys):
    assert run(*contacts(folder, tmp_path / "out")) == 0
    expected = content(tmp_path / "out")
    shutil.copytree(stopped_maps[0], tmp_path / "out.partial")
    shutil.rmtree(tmp_path / "out.partial" / "files")  # they are the output by now
    capsys.readouterr()
    assert run(*contacts(folder, tmp_path / "out", "--force")) == 0
    assert "going on" not in capsys.readouterr().out
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize("command", [variants, contacts])
def test_an_output_that_was_made_in_the_meantime_is_kept(folder, tmp_path, monkeypatch, command, capsys):
    output = tmp_path / "out"
    name = {variants: "variant_scores", contacts: "job"}[command]
    module = __import__(f"megatron_plm.inference.{name}", fromlist=["publish"])
    plain = module.publish

    def late(*arguments, **flags):
        output.write_text("theirs")
        plain(*arguments, **flags)

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", late)
        assert run(*command(folder, output)) == 2
    assert "out was made by another run in the meantime" in capsys.readouterr().err
    assert output.read_text() == "theirs"
    output.unlink()
    assert run(*command(folder, output)) == 0
    assert "going on behind " in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("command", [variants, contacts])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(folder, tmp_path, command, capsys):
    output = tmp_path / "out"
    with full_disk(1_000):
        assert run(*command(folder, output)) == 2
    told = capsys.readouterr().err
    assert f"{output}: cannot be written: File too large; free some space" in told
    assert told.count("\n") == 1
    assert not output.exists()
    assert run(*command(folder, output)) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_what_sorting_names_left_behind_a_kill_is_not_counted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(external_sort, "MEMORY", 64)
    base = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", tmp_path / "out.npz"]

    work = tmp_path / "out.npz.partial"

    def killed_while_counting(_columns, _folder):
        finder = DuplicateFinder(work)
        finder.add(np.arange(2 * 400, dtype=np.uint64).reshape(400, 2) << np.uint64(54))
        shutil.copytree(work, tmp_path / "as it was")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_plm.inference.job.num_repeated_names", killed_while_counting)
        assert run("embed", *base) == 130
    assert not any(name.startswith("hashes-") for name in os.listdir(work))  # of a run that could still tidy up
    shutil.rmtree(work)
    (tmp_path / "as it was").rename(work)
    assert any(name.startswith("hashes-") for name in os.listdir(work))
    capsys.readouterr()
    assert run("embed", *base) == 0
    told = capsys.readouterr().out
    assert "embedded 0 proteins" in told
    assert "repeated names" not in told
    assert os.listdir(tmp_path) == ["out.npz"]
