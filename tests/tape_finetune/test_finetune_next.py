"""What is printed as the next command can be typed where the reader stands."""

import re
import shlex
from pathlib import Path

import pytest

from tape_finetune import evaluate, train
from tape_finetune.reporting import command as report

CSV = ["--sequence_column", "sequence", "--label_column", "label", "--kind", "classification"]


def test_each_command_leads_to_the_next_from_any_folder(
    peptide_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "my work"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    flags = ["--data_dir", str(peptide_dir), *CSV, "--num_train_epochs", "1", "--exp_name", "a"]
    assert train.main(["onehot", "csv", *flags]) == 0
    for file, main in (("tape_eval.py", evaluate.main), ("report.py", report.main)):
        (command,) = re.findall(r"^next: python (.*)$", capsys.readouterr().out, flags=re.MULTILINE)
        program, *words = shlex.split(command)
        assert Path(program).is_file()
        assert Path(program).name == file
        assert main(words) == 0
    # The report names a command too, for plots of predictions that weren't saved.
    (hint,) = re.findall(r"This saves some: python (.*)", Path("report/report.md").read_text())
    program, *words = shlex.split(hint)
    assert Path(program).is_file()
    assert evaluate.main(words) == 0
