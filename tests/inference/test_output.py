"""What --force may replace: outputs, and nothing that the same command reads."""

import os

import pytest
from inference_sample import peer_checkpoint, random_sequences, run, write_fasta

(SEQUENCE,) = random_sequences([12])


@pytest.fixture
def folder(tmp_path):
    peer_checkpoint(tmp_path / "model")
    for name in ("in.fasta", "wt.fasta"):
        write_fasta(tmp_path / name, [SEQUENCE])
    (tmp_path / "v.csv").write_text(f"mutant\n{SEQUENCE[0]}1W\n")
    (tmp_path / "linked").symlink_to("model")
    (tmp_path / "hub").mkdir()
    for name in os.listdir(tmp_path / "model"):
        (tmp_path / "hub" / name).symlink_to(f"../model/{name}")
    return tmp_path


EMBED = ["embed", "--output-format", "npz", "--input", "in.fasta", "--checkpoint"]
PERPLEXITY = ["score", "perplexity", "--input", "in.fasta", "--checkpoint"]
VARIANTS = ["score", "variants", "--variants", "v.csv", "--wild-type", "wt.fasta", "--checkpoint"]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "output", "expected"),
    [
        ([*EMBED, "model"], "in.fasta", "is --input in.fasta"),
        ([*EMBED, "model", "--input", "v.csv", "*.fasta"], "in.fasta", "is --input *.fasta"),
        ([*EMBED, "model/config.json"], "model/config.json", "is --checkpoint model/config.json"),
        ([*EMBED, "model"], "model/model.safetensors", "lies in --checkpoint model"),
        ([*EMBED, "linked"], "model/model.safetensors", "lies in --checkpoint linked"),
        ([*EMBED, "hub"], "hub/model.safetensors", "lies in --checkpoint hub"),
        ([*PERPLEXITY, "model"], "in.fasta", "is --input in.fasta"),
        ([*PERPLEXITY, "model"], "model/config.json", "lies in --checkpoint model"),
        ([*VARIANTS, "model"], "v.csv", "is --variants v.csv"),
        ([*VARIANTS, "model"], "wt.fasta", "is --wild-type wt.fasta"),
        ([*VARIANTS, "model"], "model/config.json", "lies in --checkpoint model"),
    ],
)
def test_force_does_not_replace_what_is_read(folder, monkeypatch, command, output, expected, capsys):
    monkeypatch.chdir(folder)
    before = content(folder)
    assert run(*command, "--output", output, "--force") == 2
    assert f"--output {output}: {expected}, which is read, so --force does not replace it" in capsys.readouterr().err
    assert content(folder) == before


@pytest.mark.parametrize("command", [EMBED, PERPLEXITY, VARIANTS], ids=["embed", "perplexity", "variants"])
def test_force_replaces_another_file_and_nothing_does_without_it(folder, monkeypatch, command, capsys):
    monkeypatch.chdir(folder)
    (folder / "model.out").write_text("old")
    assert run(*command, "model", "--output", "model.out") == 2
    assert "model.out exists already" in capsys.readouterr().err
    assert (folder / "model.out").read_text() == "old"
    assert run(*command, "model", "--output", "model.out", "--force") == 0
    assert (folder / "model.out").read_bytes()[:3] != b"old"
