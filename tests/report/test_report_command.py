"""The command: what it prints and writes, and that it leaves nothing half-written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import report_sample as sample

from megatron_plm import files
from megatron_plm.errors import run_command
from megatron_plm.report.command import main
from megatron_plm.report.theme import render
from megatron_plm.report.wording import duration, large_count

ROOT = Path(__file__).resolve().parents[2]


def _flags(run: Path, output: Path, *results: Path) -> list[str]:
    flags = ["--pretraining", str(run), "--output", str(output)]
    return [*flags, "--results", *map(str, results)] if results else flags


def test_the_tool_prints_the_score_table_and_the_path(
    run_directory: Path, result_directories: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "tools/report.py", *_flags(run_directory, output, *result_directories)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert re.match(r"validation perplexity 16\.6\d, 7\.\d % below the unigram baseline 17\.97 \(step 200\)", lines[0])
    # the task that ranks first, whatever the order of the flags; a short note needs no footnote
    assert [line for line in lines if line and not line.startswith(" ")][1:-2] == [
        "peptides, accuracy",
        "contact_prediction, precision_at_l5 (see note)",
        "secondary_structure, accuracy",
    ]
    assert [line for line in lines if "All models" in line] == [f"  All models: {sample.LONG_NOTE}."]
    small = [line.strip().split(":")[0] for line in lines if "with fewer than 30" in line]
    assert small == ["test (4 examples)", "valid (3 examples), test (4 examples)"]
    assert sum("valid: the best epoch was chosen on this split" in line for line in lines) == 2
    rows = [re.split(r"  +", line.strip()) for line in lines if re.search(r"  \d\.\d+ \[", line)]
    primary = [
        [
            result["label"],
            split if scores["num_examples"] >= 30 else f"{split} (ranks nothing)",
            "{value:.3f} [{low:.3f}, {high:.3f}]".format(**scores["metrics"][result["primary_metric"]]),
            f"{scores['num_examples']:,}",
            f"{result['num_trained_parameters']:,}",
            f"{result['seconds']:.1f}",
        ]
        for result in sample.realistic_results()
        for split, scores in result["splits"].items()
    ]
    assert sorted(rows) == sorted(primary)
    assert max(len(line) for line in lines[:-2]) <= 110
    assert lines[-2] == f"wrote {output} and 9 plots beside it (report-*.png)"
    assert lines[-1] == f"next: python -m webbrowser {output.as_uri()}"


def test_a_terminal_gets_a_rich_table_with_brackets_intact(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    run = sample.write_run(tmp_path / "run", [sample.start()])
    results = sample.write_results(tmp_path / "results", [sample.result(label="[bold]mine")])
    main(_flags(run, tmp_path / "report.html", *results))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "0.862 [0.831, 0.891]" in printed
    assert "[bold]mine" in printed
    assert "value [low, high]" in printed
    assert "──" in printed


@pytest.mark.parametrize("terminal", [False, True])
def test_different_notes_stand_beside_the_models_and_once_below(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "110")
    other = "trained for three times as many epochs as the others"
    notes = {
        "small": sample.LONG_NOTE,
        "small too": sample.LONG_NOTE,
        "long": other,
        "short": "a mistake",
        "plain": None,
    }
    results = [sample.result(label=label, note=note) for label, note in notes.items()]
    run = sample.write_run(tmp_path / "run", [sample.start()])
    main(_flags(run, tmp_path / "report.html", *sample.write_results(tmp_path / "results", results)))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert re.search("^peptides, accuracy$", printed, re.MULTILINE)
    names = re.findall(r"^ *(\S.*?)  +(?:valid|test) ", printed, re.MULTILINE)
    each = ["small (see note)", "small too (see note)", "long (see note)", "short (a mistake)", "plain"]
    assert names == each * 2
    assert re.findall(r"^ *(\S.*): (?:fine-tuned|trained) ", printed, re.MULTILINE) == ["small, small too", "long"]
    assert printed.count(other) == 1
    assert printed.count("a mistake") == 2


def test_the_folder_holds_the_page_and_one_png_a_plot_and_nothing_else(page: Path) -> None:
    plots = {"loss", "perplexity", "accuracy", "learning-rate", "throughput", "fill"}
    plots |= {"scores-peptides", "scores-secondary-structure", "scores-contact-prediction"}
    expected = {"report.html"} | {f"report-{name}.png" for name in plots}
    assert {path.name for path in page.parent.iterdir()} == expected


def test_the_same_input_gives_the_same_page(page: Path, run_directory: Path, result_directories: list[Path]) -> None:
    before = page.read_bytes()
    main(_flags(run_directory, page, *result_directories))
    assert page.read_bytes() == before


def test_tasks_whose_names_differ_in_signs_only_get_files_of_their_own(tmp_path: Path) -> None:
    results = sample.write_results(tmp_path / "r", [sample.result(name) for name in ("a b", "a/b", "../../b", "…")])
    run = sample.write_run(tmp_path / "run", [sample.start()])
    main(_flags(run, tmp_path / "out" / "x.html", *results))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["x-scores-a-b-2.png", "x-scores-a-b.png", "x-scores-b.png", "x-scores-task.png", "x.html"]


@pytest.mark.parametrize("name", ["report", "report.pdf", "folder.html"])
def test_an_output_that_is_no_html_file_is_refused(
    name: str, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    assert run_command(main, _flags(run_directory, tmp_path / name)) == 2
    assert f"--output {tmp_path / name}: expected" in capsys.readouterr().err


def test_an_output_below_a_file_is_refused(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run_command(main, _flags(run_directory, tmp_path / "file" / "report.html")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output: cannot make the folder")
    assert error.count("\n") == 1


@pytest.mark.parametrize("failing_write", [1, 2, 3])
def test_a_failed_write_leaves_the_old_report_whole_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_write: int
) -> None:
    run, output = _old_report(tmp_path)
    before = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    write, calls = Path.write_bytes, 0

    def full_disk(path: Path, content: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == failing_write:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert run_command(main, [*_flags(run, output), "--title", "new"]) == 2
    assert calls == failing_write
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == before


def test_a_failed_rename_of_a_plot_leaves_the_old_page_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = _old_report(tmp_path)
    names, page = {path.name for path in output.parent.iterdir()}, output.read_bytes()
    replace, targets = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        targets.append(target)
        if len(targets) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", second_fails)
    assert run_command(main, [*_flags(run, output), "--title", "new"]) == 2
    assert output not in targets
    assert output.read_bytes() == page
    assert {path.name for path in output.parent.iterdir()} == names


def _old_report(folder: Path) -> tuple[Path, Path]:
    """Write a run and a report of two plots, so three files, and return run and page."""
    run, output = sample.write_run(folder / "run", [sample.start(), sample.valid(1)]), folder / "out" / "report.html"
    main([*_flags(run, output), "--title", "old"])
    assert len(list(output.parent.iterdir())) == 3
    return run, output


def test_missing_drawing_packages_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run_command(main, _flags(tmp_path / "absent", tmp_path / "report.html")) == 2
    assert "pip install 'megatron-plm[report]'" in capsys.readouterr().err


def test_reading_the_flags_imports_no_drawing_package() -> None:
    code = "import sys, megatron_plm.report.command; print(sorted({'matplotlib', 'jinja2', 'rich'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_drawing_changes_no_setting_of_matplotlib() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render("x", "title", "alt", (3, 2), lambda figure, theme: figure.text(0.5, 0.5, r"$\frac{", color=theme.text))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.1234, "0.123 s"),
        (42, "42 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (18_120, "5 h 2 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_read_in_two_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(912, "912"), (45_300, "45,300"), (7_512_673, "7.51 million"), (10**12, "1 trillion")]
)
def test_large_counts_read_in_words(count: int, expected: str) -> None:
    assert large_count(count) == expected
