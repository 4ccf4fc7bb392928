"""The page's score tables: the primary metric visible, the others a click away, every note said once."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import report_sample as sample
from page_parser import Page


def test_every_primary_score_is_a_row_of_the_visible_table(parsed: Page) -> None:
    expected = []
    for result in sample.realistic_results():
        metric = result["primary_metric"]
        for split, scores in result["splits"].items():
            cropped = f" ({scores['cropped']} cropped)" if scores["cropped"] else ""
            trained = f"{result['num_trained_parameters']:,}"
            examples = f"{scores['num_examples']:,}{cropped}"
            row = [
                result["label"],
                split,
                metric,
                _shown(scores, metric),
                examples,
                trained,
                f"{result['seconds']:.1f}",
            ]
            expected.append(row)
    rows = [row for row in parsed.cells() if len(row) == 7 and row[0] != "Model"]
    assert sorted(rows) == sorted(expected)


def test_every_other_score_stands_once_in_a_closed_table_with_a_column_a_model(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    closed = re.findall(r"<details>\s*<summary>Other metrics</summary>(.*?)</details>", text, re.DOTALL)
    tables = [[row for row in Page(part).cells() if row] for part in closed]
    peptides = [result for result in sample.realistic_results() if result["task"] == "peptides"]
    auroc = [_shown(result["splits"]["test"], "auroc") for result in peptides]
    contacts = sample.realistic_results()[0]
    long_range = [_shown(contacts["splits"]["test"], "precision_at_l5_long")]
    assert tables == [
        [["Split", "Metric", "pretrained", "random-initialised", "one-hot"], ["test", "auroc", *auroc]],
        [["Split", "Metric", "pretrained"], ["test", "precision_at_l5_long", *long_range]],
    ]
    assert all(text.count(value) == 1 for value in auroc + long_range)


def test_a_metric_that_one_model_lacks_is_a_dash_there(report: Callable[..., str]) -> None:
    accuracy = (0.8, 0.7, 0.9)
    less = sample.result(base_model="onehot", label="one-hot", splits={"test": sample.scores(523, accuracy=accuracy)})
    rows = Page(report([sample.start()], [sample.result(), less])).cells()
    assert ["test", "auroc", "0.931 [0.909, 0.951]", "–"] in rows


def _shown(scores: dict, metric: str) -> str:
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**scores["metrics"][metric])


def test_the_verdict_compares_the_intervals_on_the_test_split(parsed: Page) -> None:
    # [0.831, 0.891] meets [0.761, 0.832] and [0.793, 0.858]
    words = parsed.words()
    assert "On test, pretrained reaches accuracy 0.862 [0.831, 0.891]" in words
    assert "overlaps that of random-initialised and one-hot" in words
    assert "On test, pretrained reaches accuracy 0.480 [0.400, 0.560] (ranks nothing)." in words


def test_separate_intervals_are_told_from_overlapping_ones(report: Callable[..., str]) -> None:
    low = {"test": sample.scores(523, accuracy=(0.7, 0.65, 0.75))}
    page = report([sample.start()], [sample.result(), sample.result(base_model="onehot", label="1h", splits=low)])
    assert "The intervals don&#39;t overlap." in page
    assert "does not settle" not in page


def test_a_note_of_one_model_marks_its_rows_and_only_those(report: Callable[..., str]) -> None:
    noted = sample.result(base_model="random", label="random", note=sample.LONG_NOTE)
    page = report([sample.start()], [sample.result(), noted])
    rows = re.findall(r'<tr( class="noted")?>\s*<th scope="row">(.*?)</th>\s*<td>(?:valid|test)', page)
    assert len(rows) == 4  # two models, two splits
    assert all(bool(style) == ('<span class="badge">ranks nothing</span>' in name) for style, name in rows)
    assert sum(bool(style) for style, _ in rows) == 2
    assert page.count(sample.LONG_NOTE) == 1
    assert f"random: {sample.LONG_NOTE}." in page
    assert not re.search("<h3>.*badge", page)


def test_a_note_of_all_models_stands_once_at_the_title_and_once_below(report: Callable[..., str]) -> None:
    results = [sample.result(label=label, note=sample.LONG_NOTE) for label in ("a", "b")]
    page = report([sample.start()], results)
    assert page.count('class="badge"') == 1
    assert '<h3>peptides <span class="badge">ranks nothing</span></h3>' in page
    assert page.count(sample.LONG_NOTE) == 1
    assert f"All models: {sample.LONG_NOTE}." in page
    assert page.count('<tr class="noted"><td>') == 1  # auroc on test
    assert page.count('<tr class="noted">') == 5


def test_tasks_that_rank_nothing_come_after_those_that_rank(page: Path) -> None:
    titles = re.findall(r"<h3>([a-z_]+)", page.read_text(encoding="utf-8"))
    assert titles == ["peptides", "contact_prediction", "secondary_structure"]


def test_an_undefined_score_is_shown_as_undefined(report: Callable[..., str]) -> None:
    undefined = {"test": sample.scores(2, accuracy=(math.nan, math.nan, math.nan))}
    words = Page(report([sample.start()], [sample.result(splits=undefined)])).words()
    assert "On test, the accuracy of pretrained is undefined." in words
    assert "nan" not in words.lower().split()
