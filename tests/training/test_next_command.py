"""The command that a finished run prints can be typed as it stands, whatever the model."""

import re
import shlex
from pathlib import Path

import pytest
from pretraining_runs import pretrain
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.convert.command import main as convert
from megatron_plm.errors import run_command

SMALL = [
    "--num-layers=1", "--hidden-size=16", "--num-attention-heads=2", "--ffn-hidden-size=32", "--seq-length=64",
    "--micro-batch-size=4", "--global-batch-size=8", "--train-iters=1", "--lr-warmup-iters=0", "--save=run",
]  # fmt: skip
FAMILIES = {
    "esm2": (["--preset=esm2-8m"], "huggingface"),
    "proteinlm": (["--preset=proteinlm-200m"], "proteinlm-tape"),
    "tape-iupac": (["--preset=tape-transformer"], "huggingface"),
    "amplify": (["--preset=amplify-120m"], "huggingface"),
}


@pytest.mark.parametrize("tokenizer", FAMILIES)
def test_a_family_has_a_format_to_go_to(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", pair_proteins(40, seed=1), tokenizer=tokenizer)
    flags, target = FAMILIES[tokenizer]
    assert pretrain(*flags, *SMALL, "--data-path=data") == 0
    (command,) = re.findall(r"next: python \S*tools/convert_checkpoint\.py (.*)", capsys.readouterr().out)
    assert shlex.split(command)[3] == target
    assert run_command(convert, shlex.split(command)) == 0


def test_a_model_of_next_residues_has_none_and_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", pair_proteins(40, seed=1))
    assert pretrain(*SMALL, "--objective=clm", "--no-token-dropout", "--data-path=data") == 0
    (command,) = re.findall(r"next: \S*launch/pretrain\.sh (.*)", capsys.readouterr().out)
    assert pretrain(*shlex.split(command)) == 0
