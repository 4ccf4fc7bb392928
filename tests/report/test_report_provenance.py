"""The commands on the page: from sequences to scores, each as it recorded itself."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import report_sample as sample

from megatron_plm.errors import UserError
from megatron_plm.report.command import main
from megatron_plm.report.provenance import experiment
from megatron_plm.report.records import read_run
from megatron_plm.report.results import group_by_task, read_result


def _config(train: str, valid: str) -> str:
    return f"{sample.CONFIG}\n[data]\ndata_path = {json.dumps(train)}\nvalid_data_path = {json.dumps(valid)}\n"


def _converted(directory: Path, command: str, source: str) -> Path:
    directory.mkdir(parents=True)
    record = {"command": command, "from": "native", "to": "proteinlm-tape", "input": source}
    (directory / "conversion.json").write_text(json.dumps(record), encoding="utf-8")
    return directory


def _dataset(prefix: Path, **content: str) -> str:
    prefix.with_name(f"{prefix.name}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(prefix)


def _lines(run: Path, *results: dict) -> list[tuple[str, str]]:
    read = [read_result(directory) for directory in sample.write_results(run.parent / "results", results)]
    return [(command.purpose, command.line) for command in experiment(read_run(run), group_by_task(read))]


def test_the_page_leads_from_sequences_to_scores(tmp_path: Path) -> None:
    train, valid = _dataset(tmp_path / "t.v1", command="make t"), _dataset(tmp_path / "v", command="make v")
    run = sample.write_run(tmp_path / "run", [sample.start("pretrain"), sample.start("resume")], _config(train, valid))
    first = _converted(tmp_path / "first", "convert & once", str(run))
    second = _converted(tmp_path / "second", "convert twice", str(first))
    results = [
        sample.result(from_pretrained=str(second), command="tune"),
        sample.result("other", from_pretrained=str(first), command="tune other"),
        sample.result(base_model="onehot", label="1h", command="tune 1h"),
    ]
    output = tmp_path / "report.html"
    main(sample.arguments(run, sample.write_results(tmp_path / "results", results), output))
    page = html.unescape(output.read_text(encoding="utf-8"))
    shown = re.findall(r"<li><p>(.*?)</p><pre><code>(.*?)</code></pre>", page)
    assert [line for _, line in shown] == [
        *("make t", "make v", "pretrain", "resume", "convert & once", "convert twice", "tune", "tune 1h", "tune other"),
    ]
    assert shown[0][0] == "Preprocessing of the training data"
    assert shown[4][0] == "Conversion to proteinlm-tape"


def test_what_left_no_record_is_left_out(tmp_path: Path) -> None:
    by_library = _dataset(tmp_path / "library")
    run = sample.write_run(tmp_path / "run", [sample.start("pretrain")], _config(by_library, str(tmp_path / "gone")))
    lines = _lines(run, sample.result(from_pretrained=str(run), command="tune"))
    assert [line for _, line in lines] == ["pretrain", "tune"]


def test_one_dataset_for_both_splits_is_one_command(tmp_path: Path) -> None:
    prefix = _dataset(tmp_path / "p", command="make p")
    run = sample.write_run(tmp_path / "run", [sample.start("pretrain")], _config(prefix, prefix))
    assert _lines(run)[0] == ("Preprocessing of the training data and validation data", "make p")
    assert len(_lines(run)) == 2


def test_conversions_in_a_circle_end(tmp_path: Path) -> None:
    run = sample.write_run(tmp_path / "run", [sample.start("pretrain")])
    _converted(tmp_path / "a", "convert a", str(tmp_path / "b"))
    _converted(tmp_path / "b", "convert b", str(tmp_path / "a"))
    lines = _lines(run, sample.result(from_pretrained=str(tmp_path / "a"), command="tune"))
    assert [line for _, line in lines] == ["pretrain", "convert b", "convert a", "tune"]


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{"), lambda path: path.write_text("[]")])
def test_a_record_that_cannot_be_read_is_an_error_that_names_it(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    run = sample.write_run(tmp_path / "run", [sample.start("pretrain")])
    spoil(_converted(tmp_path / "a", "convert a", "x") / "conversion.json")
    with pytest.raises(UserError, match=r"conversion\.json"):
        _lines(run, sample.result(from_pretrained=str(tmp_path / "a")))
