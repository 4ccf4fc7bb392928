"""Where a run directory may be written, what --force may replace, and what a failure leaves there."""

from typing import Any

import pytest
from full_disk import full_disk

from megatron_plm.errors import run_command
from tape_finetune import train

CSV = ["--sequence_column", "sequence", "--label_column", "label", "--kind", "classification"]


@pytest.mark.parametrize("target", ["run", "force_save"])
def test_force_replaces_runs_and_empty_folders_and_nothing_else(target, peptide_dir, tmp_path, capsys):
    precious = tmp_path / "csv-onehot-a"
    (precious / "thesis").mkdir(parents=True)
    (tmp_path / "csv-onehot-link").symlink_to(tmp_path)

    def force(name: str) -> int:
        run = ["--output_dir", tmp_path, "--time_or_name", name]
        where = run if target == "run" else ["--force_save", tmp_path / f"csv-onehot-{name}"]
        arguments = ["onehot", "csv", "--data_dir", peptide_dir, *CSV, "--num_train_epochs", 1, "--force", *where]
        return run_command(train.main, [str(argument) for argument in arguments])

    for name in ("a", "link"):
        assert force(name) == 2
        assert f"{tmp_path / 'csv-onehot-'}{name}: holds no run.json" in capsys.readouterr().err
    assert (precious / "thesis").is_dir()
    (precious / "thesis").rmdir()
    assert force("a") == 0
    (precious / "mark").touch()
    assert force("a") == 0
    assert (precious / "run.json").is_file()
    assert not (precious / "mark").exists()


def test_a_place_that_cannot_be_written_is_found_before_training(peptide_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "_load_splits", lambda *_: pytest.fail("read the data first"))
    (tmp_path / "file").write_text("")
    arguments = ["onehot", "csv", "--data_dir", str(peptide_dir), *CSV]
    for where in (["--output_dir", tmp_path / "file" / "out"], ["--force_save", "."], ["--force_save", tmp_path]):
        assert run_command(train.main, [*arguments, *map(str, where)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {where[1]}")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(peptide_dir, tmp_path, capsys):
    arguments = ["onehot", "csv", "--data_dir", peptide_dir, *CSV, "--num_train_epochs", 1, "--output_dir", tmp_path]
    with full_disk():
        assert run_command(train.main, [str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert "File too large; free some space" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_training_is_not_told_as_one_of_the_output(peptide_dir, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("not the disk")

    monkeypatch.setattr(train, "_train_and_score", fail)
    arguments = ["onehot", "csv", "--data_dir", str(peptide_dir), *CSV, "--output_dir", str(tmp_path)]
    with pytest.raises(OSError, match="not the disk"):
        train.main(arguments)


def test_a_checkpoint_that_is_not_numbers_is_named(checkpoint, peptide_dir, tmp_path, monkeypatch, capsys):
    build = train.build_base

    def broken(*arguments: Any) -> Any:
        base = build(*arguments)
        next(base.parameters()).data.fill_(float("nan"))
        return base

    monkeypatch.setattr(train, "build_base", broken)
    arguments = ["transformer", "csv", "--data_dir", peptide_dir, *CSV, "--from_pretrained", checkpoint]
    assert run_command(train.main, [str(a) for a in [*arguments, "--force_save", tmp_path / "out"]]) == 2
    assert "--from_pretrained: the model's features are not numbers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
