"""The page's score tables: the primary metric visible, the others a click away, every note said once."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
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
                split if scores["num_examples"] >= 30 else f"{split} ranks nothing",
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
        [["Split", "Metric", "pretrained"], ["test ranks nothing", "precision_at_l5_long", *long_range]],
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
    assert (
        "overlaps that of random-initialised and one-hot: the intervals alone do not settle which is better." in words
    )


def test_a_split_of_too_few_examples_gets_a_badge_and_a_footnote_and_no_verdict(report: Callable[..., str]) -> None:
    def splits(value: float) -> dict:
        score = (value, value - 0.01, value + 0.01)
        return {name: sample.scores(n, accuracy=score) for name, n in (("valid", 300), ("few", 29), ("enough", 30))}

    results = [sample.result(splits=splits(0.9)), sample.result(base_model="onehot", label="1h", splits=splits(0.5))]
    page = Page(report([sample.start()], results))
    assert "On enough, pretrained reaches" in page.words()
    assert "On few" not in page.words()
    marked = [row[1] for row in page.cells() if len(row) == 7]
    assert marked == ["Split", "valid", "valid", "few ranks nothing", "few ranks nothing", "enough", "enough"]
    assert page.words().count("few (29 examples): with fewer than 30 examples, scores show that") == 1


def test_no_verdict_rests_on_validation_where_the_test_split_is_too_small(report: Callable[..., str]) -> None:
    splits = {name: sample.scores(n, accuracy=(0.9, 0.8, 0.95)) for name, n in (("valid", 300), ("test", 4))}
    assert "reaches accuracy" not in report([sample.start()], [sample.result(splits=splits)])


def test_the_best_epochs_split_has_its_footnote_and_only_where_it_is_scored(report: Callable[..., str]) -> None:
    only_test = {"test": sample.scores(523, accuracy=(0.9, 0.8, 0.95))}
    page = report([sample.start()], [sample.result(), sample.result("other", splits=only_test)])
    assert page.count("valid: the best epoch was chosen on this split") == 1


def _against_onehot(metric: str, mine: tuple[float, float, float], theirs: tuple[float, float, float]) -> list[dict]:
    ours, others = ({"test": sample.scores(523, **{metric: score})} for score in (mine, theirs))
    return [
        sample.result(primary_metric=metric, splits=ours),
        sample.result(base_model="onehot", label="1h", primary_metric=metric, splits=others),
    ]


_NAN = math.nan


@pytest.mark.parametrize(
    ("metric", "theirs", "expected"),
    [
        ("accuracy", (0.7, 0.65, 0.75), "It is ahead of 1h: the intervals don't overlap."),
        ("accuracy", (0.95, 0.93, 0.97), "It is behind 1h: the intervals don't overlap."),
        ("accuracy", (0.8, 0.7, 0.83), "overlaps that of 1h: the intervals alone do not settle which is better."),
        ("accuracy", (_NAN, _NAN, _NAN), "With 1h there is no comparison: an interval is undefined."),
        ("mse", (0.7, 0.65, 0.75), "It is behind 1h: the intervals don't overlap."),
        ("mse", (0.95, 0.93, 0.97), "It is ahead of 1h: the intervals don't overlap."),
    ],
)
def test_the_verdict_says_who_is_ahead_where_the_intervals_lie_apart(
    metric: str, theirs: tuple[float, float, float], expected: str, report: Callable[..., str]
) -> None:
    words = Page(report([sample.start()], _against_onehot(metric, (0.86, 0.83, 0.89), theirs))).words()
    assert expected in words
    assert sum(words.count(word) for word in ("ahead of", "behind 1h", "overlaps that", "no comparison")) == 1


def test_a_note_of_one_model_marks_its_rows_and_only_those(report: Callable[..., str]) -> None:
    noted = sample.result(base_model="random", label="random", note=sample.LONG_NOTE)
    page = report([sample.start()], [sample.result(), noted])
    rows = re.findall(r'<tr( class="noted")?>\s*<th scope="row">(.*?)</th>\s*<td>(?:valid|test)', page)
    assert len(rows) == 4  # two models, two splits
    assert all(bool(style) == ('<span class="badge">see note</span>' in name) for style, name in rows)
    assert sum(bool(style) for style, _ in rows) == 2
    assert page.count(sample.LONG_NOTE) == 1
    assert f"random: {sample.LONG_NOTE}." in page
    assert not re.search("<h3>.*badge", page)


def test_a_note_of_all_models_stands_once_at_the_title_and_once_below(report: Callable[..., str]) -> None:
    results = [sample.result(label=label, note=sample.LONG_NOTE) for label in ("a", "b")]
    page = report([sample.start()], results)
    assert page.count('class="badge"') == 1
    assert '<h3>peptides <span class="badge">see note</span></h3>' in page
    assert page.count(sample.LONG_NOTE) == 1
    assert f"All models: {sample.LONG_NOTE}." in page
    assert page.count('<tr class="noted"><td>') == 1  # auroc on test
    assert page.count('<tr class="noted">') == 5


def test_tasks_that_rank_nothing_come_after_those_that_rank(page: Path) -> None:
    titles = re.findall(r"<h3>([a-z_]+)", page.read_text(encoding="utf-8"))
    assert titles == ["peptides", "contact_prediction", "secondary_structure"]


@pytest.mark.parametrize("written", [None, math.nan])
def test_an_undefined_score_is_shown_as_undefined(written: float | None, report: Callable[..., str]) -> None:
    undefined = {"test": sample.scores(200, accuracy=(written, written, written))}
    words = Page(report([sample.start()], [sample.result(splits=undefined)])).words()
    assert "On test, the accuracy of pretrained is undefined." in words
    assert "nan" not in words.lower().split()
