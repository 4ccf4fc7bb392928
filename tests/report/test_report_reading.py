"""Reading runs and results: what a resume does to the curves, and what each kind of broken input gets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_sample as sample

from megatron_plm.errors import UserError
from megatron_plm.report.records import read_run
from megatron_plm.report.results import read_result


def test_a_resumed_run_keeps_the_last_record_of_each_step(tmp_path: Path) -> None:
    records = [
        sample.start(),
        *[sample.train(step, loss=3.0) for step in (1, 2, 3, 4)],
        sample.valid(4, perplexity=18.5),
        sample.start("resume"),
        *[sample.train(step, loss=2.0, elapsed_seconds=step - 2.0) for step in (3, 4, 5)],
        sample.valid(4, perplexity=17.5),
        sample.end(5, seconds=3.5),
    ]
    run = read_run(sample.write_run(tmp_path / "run", records))
    assert [(record.step, record.loss) for record in run.train] == [(1, 3), (2, 3), (3, 2), (4, 2), (5, 2)]
    assert [(record.step, record.perplexity) for record in run.valid] == [(4, 17.5)]
    assert [start.command for start in run.starts] == [records[0]["command"], "resume"]
    assert run.num_repeated_steps == 2
    # 1.5 s a step in the first start, which recorded no end, then the second start's own clock
    assert run.seconds == pytest.approx(4 * 1.5 + 3.5)


def test_a_resume_drops_the_steps_of_the_continuation_that_was_given_up(tmp_path: Path) -> None:
    records = [sample.start(), *[sample.train(step, loss=3.0) for step in range(1, 9)], sample.valid(8)]
    records += [sample.start(), sample.train(3, loss=2.0)]
    run = read_run(sample.write_run(tmp_path / "run", records))
    assert [(record.step, record.loss) for record in run.train] == [(1, 3), (2, 3), (3, 2)]
    assert run.valid == ()
    assert run.num_repeated_steps == 6
    assert run.end is None


def test_a_start_that_says_its_step_drops_all_that_lies_beyond(tmp_path: Path) -> None:
    records = [sample.start(step=0), *[sample.train(step) for step in range(10, 200, 10)], sample.valid(150)]
    records += [sample.start(step=100), sample.train(150, loss=2.0), sample.train(200, loss=2.0)]
    run = read_run(sample.write_run(tmp_path / "run", records))
    assert [record.step for record in run.train] == [*range(10, 101, 10), 150, 200]
    assert run.valid == ()
    assert run.num_repeated_steps == 9


def test_a_new_run_in_the_folder_of_one_that_saved_nothing_begins_at_nothing(tmp_path: Path) -> None:
    records = [sample.start(step=0), sample.train(10), sample.train(20), sample.valid(20), sample.start(step=0)]
    run = read_run(sample.write_run(tmp_path / "run", records))
    assert (run.train, run.valid, run.num_repeated_steps) == ((), (), 2)


def test_the_end_of_an_earlier_start_is_not_the_end_of_the_run(tmp_path: Path) -> None:
    records = [sample.start(), sample.train(1), sample.end(1, "interrupted"), sample.start(), sample.train(2)]
    assert read_run(sample.write_run(tmp_path / "run", records)).end is None


def test_the_page_tells_of_a_resume(report: Callable[..., str]) -> None:
    page = report([sample.start(), sample.train(1), sample.train(2), sample.start("again"), sample.train(2)])
    assert "The run was started 2 times" in page
    assert "not shown (1)" in page
    assert "Pretraining, resumed" in page


def test_the_page_tells_of_tokens_read_before_the_run(report: Callable[..., str]) -> None:
    page = report([sample.start(), sample.train(101, consumed_tokens=1_008_150), sample.train(102)])
    assert "went on from a checkpoint of another run: 1 million tokens" in page
    assert "another run" not in report([sample.start(), sample.train(1), sample.train(2)])


@pytest.mark.parametrize("cut", ['{"kind": "train", "st', "{", '{"kind": "train", "step": 3, "loss": 2.'])
def test_a_cut_off_last_line_is_left_out_and_said(tmp_path: Path, cut: str) -> None:
    directory = sample.write_run(tmp_path / "run", [sample.start(), sample.train(1), sample.train(2)])
    whole = read_run(directory)
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(cut)
    run = read_run(directory)
    assert run.truncated
    assert not whole.truncated
    assert run.train == whole.train


def test_a_complete_last_line_without_newline_counts(tmp_path: Path) -> None:
    directory = sample.write_run(tmp_path / "run", [sample.start(), sample.train(1)])
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(sample.train(2)))
    run = read_run(directory)
    assert [record.step for record in run.train] == [1, 2]
    assert not run.truncated


def test_a_character_cut_in_half_by_a_kill_is_a_cut_off_line(tmp_path: Path) -> None:
    directory = sample.write_run(tmp_path / "run", [sample.start(), sample.train(1)])
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "start", "command": "é'.encode()[:-1])
    assert read_run(directory).truncated


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"kind": "train", "st', "not valid JSON (Unterminated string starting at, column 19); repair or remove"),
        ("[" * 100_000, "not valid JSON (a number of too many digits, or brackets nested too deeply); repair"),
        ("1" * 5000, "not valid JSON (a number of too many digits, or brackets nested too deeply); repair"),
        ("[1, 2]", 'the key "kind"'),
        ('{"step": 3}', 'the key "kind"'),
        ('{"kind": "trian"}', "did you mean 'train'"),
        ('{"kind": ["train"]}', "unknown kind"),
        ('{"kind": "end", "step": 1, "status": "finished"}', "'elapsed_seconds' is missing"),
        ('{"kind": "end", "step": 1.5, "status": "finished", "elapsed_seconds": 1}', "key 'step': expected a whole"),
        ('{"kind": "end", "step": true, "status": "finished", "elapsed_seconds": 1}', "key 'step': expected a whole"),
        ('{"kind": "end", "step": 1, "status": null, "elapsed_seconds": 1}', "key 'status': expected a text"),
        (json.dumps(sample.valid(1, unigram_perplexity=0)), "unigram_perplexity is 0"),
        (json.dumps(sample.valid(1, unigram_perplexity=float("nan"))), "unigram_perplexity is nan"),
    ],
)
def test_any_other_broken_line_is_an_error_with_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    directory = sample.write_run(tmp_path / "run", [sample.start(), sample.train(1)])
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n{json.dumps(sample.train(2))}\n")
    with pytest.raises(UserError) as caught:
        read_run(directory)
    assert expected in str(caught.value)
    assert f"{directory / 'metrics.jsonl'}, line 3" in str(caught.value)


@pytest.mark.parametrize("key", [key for key in sample.start() if key != "kind"])
def test_every_key_of_a_start_record_is_required(tmp_path: Path, key: str) -> None:
    record = sample.start()
    del record[key]
    with pytest.raises(UserError, match=rf"line 1: the key '{key}' is missing"):
        read_run(sample.write_run(tmp_path / "run", [record]))


def test_a_record_before_the_first_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: a record stands before the first start"):
        read_run(sample.write_run(tmp_path / "run", [sample.train(1), sample.start()]))


def _without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _with(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_without("config.toml"), "config.toml does not exist"),
        (_without("metrics.jsonl"), "metrics.jsonl does not exist"),
        (_with("config.toml", b"a = = 1"), "not valid TOML"),
        (_with("config.toml", b"\xff\xfe"), "not UTF-8"),
        (_with("metrics.jsonl", b""), "no start record"),
        (_with("metrics.jsonl", b"\xff\n"), "line 1: not valid JSON (not UTF-8 text)"),
    ],
)
def test_an_incomplete_run_directory_is_an_error_that_names_the_file(
    tmp_path: Path, spoil: Callable[[Path], object], expected: str
) -> None:
    directory = sample.write_run(tmp_path / "run", [sample.start()])
    spoil(directory)
    with pytest.raises(UserError) as caught:
        read_run(directory)
    assert expected in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_missing_run_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pretraining .*absent is not a directory"):
        read_run(tmp_path / "absent")


def test_a_missing_results_json_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json does not exist; give --results"):
        read_result(tmp_path)


_BAD_SCORE = sample.scores(4, accuracy=(0.5, 0.6, 0.4))
_TEXT_SCORE = sample.scores(4) | {"metrics": {"accuracy": {"value": "high", "low": 0.4, "high": 0.6}}}
_NO_HIGH = sample.scores(4) | {"metrics": {"accuracy": {"value": 0.5, "low": 0.4}}}
_NO_FILE = {key: value for key, value in sample.scores(4, accuracy=(0.5, 0.4, 0.6)).items() if key != "file"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"splits": {}}, "'splits' is empty"),
        ({"splits": []}, "key 'splits': expected an object, found []"),
        ({"splits": {"test": sample.scores(4, auroc=(0.5, 0.4, 0.6))}}, "lacks its primary metric 'accuracy'"),
        ({"splits": {"test": _BAD_SCORE}}, "low above high"),
        ({"splits": {"test": _NO_HIGH}}, "key 'test', key 'metrics', key 'accuracy': the key 'high' is missing"),
        ({"splits": {"test": _NO_FILE}}, "key 'test': the key 'file' is missing"),
        ({"splits": {"test": _NO_FILE | {"file": "\x1b[2J"}}}, "control characters"),
        ({"label": "a\nb"}, "control characters"),
        ({"label": "\x1b[31mred"}, "control characters"),
        ({"label": " "}, "is empty"),
        ({"note": "\x1b[2J"}, "control characters"),
        ({"seed": "1"}, "key 'seed': expected a whole number, found \"1\""),
        ({"note": 3}, "key 'note': expected a text, found 3"),
        ({"splits": {"test": _TEXT_SCORE}}, "key 'value': expected a number or null, found \"high\""),
    ],
)
def test_a_wrong_results_json_is_an_error_that_names_the_key(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    (directory,) = sample.write_results(tmp_path, [sample.result(**changes)])
    with pytest.raises(UserError) as caught:
        read_result(directory)
    assert expected in str(caught.value)
    assert str(directory / "results.json") in str(caught.value)


def test_json_that_does_not_parse_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{\n"task": "x",\n}', encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.json, line 3: not valid JSON"):
        read_result(tmp_path)
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"results\.json: not valid JSON \(a number of too many digits, or brackets"):
        read_result(tmp_path)


_UNUSED = ("num_parameters", "epochs")


def test_what_the_report_does_not_show_may_be_missing(tmp_path: Path) -> None:
    content = {key: value for key, value in sample.result().items() if key not in _UNUSED}
    (directory,) = sample.write_results(tmp_path, [content])
    assert read_result(directory).label == "pretrained"
    record = sample.train(1)
    del record["grad_norm"]
    assert len(read_run(sample.write_run(tmp_path / "run", [sample.start(), record])).train) == 1


@pytest.mark.parametrize("key", [key for key in sample.result() if key not in _UNUSED])
def test_every_key_of_a_result_that_is_shown_is_required(tmp_path: Path, key: str) -> None:
    content = sample.result()
    del content[key]
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=rf"results\.json: the key '{key}' is missing"):
        read_result(tmp_path)
