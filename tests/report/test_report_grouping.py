"""Grouping results: one table for each task and set of data, whatever the folders and files are called."""

from pathlib import Path
from typing import Any

import pytest
import report_sample as sample

from megatron_plm.errors import UserError
from megatron_plm.report.results import Score, group_by_task, read_result
from megatron_plm.report.verdicts import compare


def _read_all(parent: Path, *results: dict) -> list[Any]:
    return [read_result(directory) for directory in sample.write_results(parent, results)]


def test_results_are_grouped_by_task_with_the_pretrained_model_first(tmp_path: Path) -> None:
    onehot, random = sample.result(base_model="onehot", label="1h"), sample.result(base_model="random", label="r")
    tasks = group_by_task(_read_all(tmp_path, onehot, random, sample.result("other"), sample.result()))
    names = [(task.name, [result.label for result in task.results]) for task in tasks]
    assert names == [("peptides", ["pretrained", "r", "1h"]), ("other", ["pretrained"])]


def _titles(results: list[Any]) -> list[tuple[str, int]]:
    return [(task.title, len(task.results)) for task in group_by_task(results)]


def _read_from(parent: Path, data_dir: str | None, *results: dict) -> list[Any]:
    return [read_result(directory) for directory in sample.write_results(parent, results, data_dir)]


def _on(file: str, sha256: str, task: str = "csv", split: str = "test", **changes: Any) -> dict:
    scores = sample.scores(9, accuracy=(0.5, 0.4, 0.6)) | {"file": file, "sha256": sha256}
    return sample.result(task, splits={split: scores}, **changes)


def test_only_the_csv_task_needs_its_data_in_the_title(tmp_path: Path) -> None:
    onehot = _on("test.csv", "a" * 64, base_model="onehot", label="1h")
    results = [_on("test.csv", "a" * 64), onehot, _on("x_test.jsonl", "b" * 64, "secondary_structure")]
    assert _titles(_read_from(tmp_path, "my/peptides", *results)) == [
        ("csv: my/peptides", 2),
        ("secondary_structure", 1),
    ]


def test_two_sets_of_data_are_two_groups_though_the_files_have_the_same_names(tmp_path: Path) -> None:
    for task in ("csv", "stability"):
        first = _read_from(tmp_path / task / "1", "one", _on("test.csv", "a" * 64, task))
        second = _read_from(tmp_path / task / "2", "two", _on("test.csv", "b" * 64, task))
        assert _titles(first + second) == [(f"{task}: one", 1), (f"{task}: two", 1)]


def test_one_set_of_data_is_one_group_however_its_folder_was_typed(tmp_path: Path) -> None:
    first = _read_from(tmp_path / "1", "one", _on("test.csv", "a" * 64))
    second = _read_from(tmp_path / "2", "./one/", _on("test.csv", "a" * 64, seed=2))
    assert _titles(first + second) == [("csv: one", 2)]


def test_data_of_one_folder_are_told_apart_by_file_name_then_by_content(tmp_path: Path) -> None:
    by_name = _read_from(tmp_path / "1", "d", _on("a.csv", "a" * 64), _on("b.csv", "b" * 64))
    assert _titles(by_name) == [("csv: d (a.csv)", 1), ("csv: d (b.csv)", 1)]
    by_content = _read_from(tmp_path / "2", "d", _on("a.csv", "a" * 64), _on("a.csv", "b" * 64))
    assert _titles(by_content) == [("csv: d (sha256 aaaaaaaa)", 1), ("csv: d (sha256 bbbbbbbb)", 1)]


def test_results_that_share_no_split_are_one_group_only_in_one_folder(tmp_path: Path) -> None:
    test, other = _on("t.csv", "a" * 64), _on("o.csv", "b" * 64, split="other", label="x")
    assert _titles(_read_from(tmp_path / "1", "d", test, other)) == [("csv: d", 2)]
    apart = _read_from(tmp_path / "2", "d", test) + _read_from(tmp_path / "3", "e", other)
    assert _titles(apart) == [("csv: d", 1), ("csv: e", 1)]


def test_data_given_as_files_are_named_by_them(tmp_path: Path) -> None:
    (nowhere,) = sample.write_results(tmp_path / "1", [_on("mine.csv", "a" * 64)])
    assert _titles([read_result(nowhere)]) == [("csv: mine.csv", 1)]
    (nowhere / "run.json").write_text('{"data_dir": null}', encoding="utf-8")
    assert _titles([read_result(nowhere)]) == [("csv: mine.csv", 1)]
    (nowhere / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json: the key 'data_dir' is missing"):
        read_result(nowhere)


def test_tasks_without_a_test_split_that_ranks_come_last(tmp_path: Path) -> None:
    def splits(**sizes: int) -> dict:
        return {name: sample.scores(size, accuracy=(0.5, 0.4, 0.6)) for name, size in sizes.items()}

    results = [
        sample.result("a", splits=splits(valid=300, test=29)),
        sample.result("b", splits=splits(test=29, other=30)),
        sample.result("c", splits=splits(valid=29)),
        sample.result("d", note="x"),
    ]
    assert [task.name for task in group_by_task(_read_all(tmp_path, *results))] == ["b", "d", "a", "c"]


def test_equal_labels_are_told_apart_by_seed(tmp_path: Path) -> None:
    (task,) = group_by_task(_read_all(tmp_path, sample.result(), sample.result(seed=2)))
    assert [result.label for result in task.results] == ["pretrained, seed 1", "pretrained, seed 2"]


def test_equal_labels_and_seeds_are_told_apart_by_directory(tmp_path: Path) -> None:
    (task,) = group_by_task(_read_all(tmp_path, sample.result(), sample.result(), sample.result(seed=2)))
    labels = [result.label for result in task.results]
    directories = [result.directory for result in task.results]
    assert labels == [f"pretrained, seed 1, {name}" for name in directories[:2]] + ["pretrained, seed 2"]
    assert len(set(labels)) == 3


def test_the_same_directory_twice_is_an_error(tmp_path: Path) -> None:
    (one,) = _read_all(tmp_path, sample.result())
    with pytest.raises(UserError, match=r"2 results of task 'peptides' are 'pretrained, seed 1, .*'; name each once"):
        group_by_task([one, one])


@pytest.mark.parametrize(
    ("other", "expected"),
    [((0.1, 0.2), True), ((0.2, 0.3), True), ((0.0, 1.0), True), ((0.21, 0.3), False), ((0.0, 0.09), False)],
)
def test_intervals_overlap_exactly_where_they_share_a_point(other: tuple[float, float], expected: bool) -> None:
    mine, theirs = Score(0.15, 0.1, 0.2), Score(0.5, *other)
    assert (compare(mine, theirs, "accuracy") == "overlap") is expected
    assert (compare(theirs, mine, "accuracy") == "overlap") is expected
