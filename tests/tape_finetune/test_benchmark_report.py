"""tape_report: the arithmetic of its tables against statistics by hand, what it refuses, and what its page shows."""

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_sample import refused, report, result, run_file, save

from tape_finetune.reporting.published import HEADLINES, PUBLISHED

REPOSITORY = Path(__file__).resolve().parents[2]


VALUES = {1: 0.61, 2: 0.66, 7: 0.70}


@pytest.fixture
def three_seeds(tmp_path: Path) -> list[Path]:
    return [
        result(tmp_path / "r", f"seed{seed}", {"valid": value + 0.1, "test": value}, seed=seed)
        for seed, value in VALUES.items()
    ]


def test_seeds_become_mean_and_sample_deviation(tmp_path: Path, three_seeds: list[Path]) -> None:
    (task,) = report(tmp_path, three_seeds)["tasks"]
    (model,) = task["models"]
    score = model["scores"]["test"]["spearmanr"]
    values = list(VALUES.values())
    assert score["values"] == values
    assert score["mean"] == pytest.approx(np.mean(values))
    assert score["sd"] == pytest.approx(np.std(values, ddof=1))
    assert score["interval"] is None
    assert model["seconds"] == pytest.approx(np.mean([2.0 * seed for seed in VALUES]))
    cell = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (3)"
    assert cell in (tmp_path / "report" / "report.md").read_text()
    assert cell in (tmp_path / "report" / "report.html").read_text()


def test_one_seed_keeps_its_interval_and_is_called_out(tmp_path: Path) -> None:
    content = report(tmp_path, [result(tmp_path / "r", "one", {"test": 0.5})])
    score = content["tasks"][0]["models"][0]["scores"]["test"]["spearmanr"]
    assert (score["mean"], score["sd"], score["interval"]) == (0.5, None, pytest.approx([0.4, 0.6]))
    assert any("One seed only" in line and "Ours on fluorescence" in line for line in content["warnings"])
    assert "0.500 [0.400, 0.600]" in (tmp_path / "report" / "report.html").read_text()


def test_an_undefined_score_is_undefined_and_no_number(tmp_path: Path) -> None:
    runs = [result(tmp_path / "r", f"s{seed}", {"test": value}, seed=seed) for seed, value in ((1, None), (2, 0.4))]
    score = report(tmp_path, runs)["tasks"][0]["models"][0]["scores"]["test"]["spearmanr"]
    assert (score["mean"], score["sd"], score["values"]) == (None, None, [None, 0.4])
    assert "undefined ± undefined (2)" in (tmp_path / "report" / "report.md").read_text()


def test_runs_on_other_data_are_never_averaged_together(tmp_path: Path, three_seeds: list[Path]) -> None:
    other = result(tmp_path / "r", "other", {"test": 0.1}, seed=9, data="b")
    content = report(tmp_path, [*three_seeds, other])
    first, second = content["tasks"]
    assert first["models"][0]["scores"]["test"]["spearmanr"]["values"] == list(VALUES.values())
    assert second["models"][0]["scores"]["test"]["spearmanr"]["values"] == [0.1]
    assert first["title"] != second["title"]
    assert first["splits"]["test"]["sha256"] != second["splits"]["test"]["sha256"]
    assert any("2 sets of data" in line and "not averaged" in line for line in content["warnings"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert first["splits"]["test"]["sha256"] in text
    assert second["splits"]["test"]["sha256"] in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "have the same seed 1"),
        ({"num_trained_parameters": 6}, "train different models"),
        ({"base_model": "random"}, "train different models"),
        ({"primary_metric": "mse"}, "are judged by spearmanr and mse"),
    ],
)
def test_runs_that_are_no_seeds_of_one_model_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = result(tmp_path / "r", "first", {"test": 0.5})
    second = result(tmp_path / "r", "second", {"test": 0.6}, **({"seed": 2} | changes))
    error = refused(tmp_path, [first, second], capsys)
    assert message in error
    assert "--label" in error
    assert not (tmp_path / "report").exists()


def test_kinds_of_one_task_are_tasks_of_their_own(tmp_path: Path) -> None:
    kinds = {}
    for kind in ("membrane", "location"):
        kinds[kind] = result(tmp_path / "r", kind, {"test": 0.5}, task="localization", metric="accuracy")
        run_file(kinds[kind], "localization", kind=kind)
    eight = result(tmp_path / "r", "ss8", {"cb513": 0.5}, task="secondary_structure", metric="accuracy")
    run_file(eight, "secondary_structure", classes=list("GHIBESTC"))
    content = report(tmp_path, [*kinds.values(), eight])
    names = {task["task"]: task["headline"]["has_published_values"] for task in content["tasks"]}
    expected = {"localization (membrane)", "localization (location)", "secondary_structure (8 classes)"}
    assert names == dict.fromkeys(expected, False), "none of them has published values"


def test_published_values_stand_beside_and_are_marked(tmp_path: Path, three_seeds: list[Path]) -> None:
    content = report(tmp_path, three_seeds)
    assert content["tasks"][0]["headline"] == {"split": "test", "metric": "spearmanr", "has_published_values": True}
    rows = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if "published" in line]
    assert "| *ProteinLM 200M (published, original splits)* | *0.68* |" in rows
    assert "original splits" in content["published"]["note"]


def test_another_split_has_no_published_values_beside_it(tmp_path: Path) -> None:
    run = result(tmp_path / "r", "one", {"new364": 0.5}, task="secondary_structure", metric="accuracy")
    content = report(tmp_path, [run])
    assert not content["tasks"][0]["headline"]["has_published_values"]
    assert "published, original" not in (tmp_path / "report" / "report.md").read_text()


def test_the_published_table_is_that_of_the_docs() -> None:
    text = (REPOSITORY / "docs/benchmarks.md").read_text(encoding="utf-8")
    rows = {
        cells[0].replace("**", ""): cells[1:]
        for line in text.splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 6
    }
    for row in PUBLISHED:
        assert [f"{value:.2f}" for value in row.values.values()] == rows[row.model], row.model
        assert list(row.values) == list(HEADLINES)


NUMBERS = [({"value": 0.1 * n}, {"value": 0.1 * n + 0.05}) for n in range(100)]
CLASSES = [
    ({"label": "ab"[n % 2]}, {"label": "ab"[n % 3 == 0], "probabilities": {"a": 0.5, "b": 0.5}}) for n in range(100)
]
SEVERAL = [({"labels": ["a"]}, {"labels": ["a", "b"], "probabilities": {"a": 0.9, "b": 0.8}})] * 100
RESIDUES = [({"labels": "HE-"}, {"labels": "HHC", "probabilities": [[0.5, 0.3, 0.2]] * 3})] * 100
CONTACTS = [({"contacts": [[1, 9], [2, 10]]}, {"contacts": [[1, 9, 0.9], [3, 12, 0.5]]})] * 100
MANY = [({"label": str(n)}, {"label": str(n), "probabilities": {str(n): 1.0}}) for n in range(100)]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (NUMBERS, "100 proteins, Spearman's correlation 0.500"),
        # Of 50 a: 17 are divisible by 6, so called b; of 50 b, 17 are odd multiples of 3.
        (CLASSES, "of a, 66 % right; of b, 34 % right"),
        (SEVERAL, "a 1.000; b 0.000"),
        (RESIDUES, "of H, 100 % right; of E, 0 % right"),
        (CONTACTS, "protein 100 has 50 % right"),
        (MANY, "100 proteins of 100 classes, 100 % right; predicted most often: 0 (1)"),
    ],
    ids=["numbers", "classes", "several classes", "residues", "contacts", "many classes"],
)
def test_saved_predictions_are_drawn(
    tmp_path: Path, pairs: list[tuple[dict[str, Any], dict[str, Any]]], words: str
) -> None:
    run = result(tmp_path / "r", "one", {"test": 0.5})
    save(run, "test", pairs)
    report(tmp_path, [run])
    text = (tmp_path / "report" / "report.md").read_text()
    plots = list((tmp_path / "report" / "plots").iterdir())
    assert len(plots) == 2
    assert all(f"plots/{path.name}" in text for path in plots)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)
    assert words in text


def test_without_predictions_the_report_says_how_to_save_some(tmp_path: Path, three_seeds: list[Path]) -> None:
    report(tmp_path, three_seeds)
    text = (tmp_path / "report" / "report.html").read_text()
    assert f"transformer fluorescence {three_seeds[0]} --split test --save_predictions" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"truth": {}, "prediction": {}}\n'), "has 1 proteins, but 100 were scored"),
        (b"no gzip", "no file of predictions"),
        (gzip.compress(b"[1]\n"), "no file of predictions"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = result(tmp_path / "r", "one", {"test": 0.5})
    (run / "predictions_test.jsonl.gz").write_bytes(content)
    assert message in refused(tmp_path, [run], capsys)
    assert not (tmp_path / "report").exists()


class Page(HTMLParser):
    """What a page loads, its headings and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset")]


def test_the_page_holds_all_it_shows_and_text_stays_text(tmp_path: Path) -> None:
    run = result(tmp_path / "r", "one", {"test": 0.5}, label="<script>x</script> |*_")
    save(run, "test", NUMBERS)
    report(tmp_path, [run], "--title", "a <b> & c")
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "a &lt;b&gt; &amp; c" in text
    assert not re.findall(r"https?://", re.sub(r"<code>.*?</code>", "", text, flags=re.S))
    assert r"\<script\>x\</script\> \|\*\_" in (tmp_path / "report" / "report.md").read_text()


def test_an_existing_folder_is_replaced_only_if_forced_and_a_report(
    tmp_path: Path, three_seeds: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report(tmp_path, three_seeds)
    assert "exists already" in refused(tmp_path, three_seeds, capsys)
    report(tmp_path, three_seeds[:1], "--force")
    (tmp_path / "report" / "report.json").unlink()
    assert "is no report that --force may replace" in refused(tmp_path, three_seeds, capsys, "--force")
    assert (tmp_path / "report" / "report.md").exists()


def test_what_is_no_run_directory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "results.json does not exist" in refused(tmp_path, [tmp_path], capsys)
