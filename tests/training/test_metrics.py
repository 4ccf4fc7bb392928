"""metrics.jsonl after a kill, throughput that counts training only, and where lines go."""

import io
import os
import sys
import time

import pytest
from pretraining_runs import pretrain, records

from megatron_plm.training import loop, metrics
from megatron_plm.training.checkpoint_writer import CheckpointWriter


@pytest.mark.parametrize("left", ['{"kind": "train", "st', '{"kind": "train"}', "\x00\x00"])
def test_half_a_last_line_is_cut_off_before_going_on(left, pair_data, tmp_path):
    flags = [*pair_data.flags, f"--save={tmp_path}"]
    assert pretrain(*flags, "--train-iters=2") == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(before + left)
    assert pretrain(*flags, "--train-iters=3", f"--load={tmp_path}") == 0
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before + '{"kind": "start"')
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3]


def test_a_file_of_half_a_line_becomes_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "sta')
    metrics._open_to_append(tmp_path / "metrics.jsonl").close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


STEP, EVALUATION, CHECKPOINT = 0.01, 0.2, 0.1  # seconds that each takes at least


@pytest.fixture
def slow(monkeypatch):
    def slowed(name, seconds):
        function = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *argv: (time.sleep(seconds), function(*argv))[1])

    slowed("train_step", STEP)
    slowed("evaluate", EVALUATION)
    save = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", lambda writer: (time.sleep(CHECKPOINT), save(writer))[1])


def test_lines_read_a_step_late_say_the_same(pair_data, tmp_path, monkeypatch):
    flags = [*pair_data.flags, "--train-iters=9", "--log-interval=2", "--eval-interval=5", "--save-interval=8"]
    assert pretrain(*flags, f"--save={tmp_path / 'at_once'}") == 0
    monkeypatch.setattr(metrics, "_reads_late", lambda _: True)
    assert pretrain(*flags, f"--save={tmp_path / 'late'}") == 0
    runs = [records(tmp_path / name, kind) for name in ("at_once", "late") for kind in ("train", "valid")]
    for record in [record for lines in runs for record in lines]:
        for name in ("tokens_per_second", "elapsed_seconds"):
            record.pop(name, None)
    assert runs[0] == runs[2]
    assert runs[1] == runs[3]
    assert [record["step"] for record in runs[2]] == [2, 4, 5, 6, 8, 9]


def test_a_loss_read_a_step_late_still_stops_the_run_before_it_is_saved(pair_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "_reads_late", lambda _: True)
    flags = [*pair_data.flags, "--lr=1e30", "--clip-grad=0", "--lr-warmup-iters=0", "--save-interval=10"]
    assert pretrain(*flags, "--train-iters=20", f"--save={tmp_path}") == 1
    assert "the loss is nan" in capsys.readouterr().err
    assert not list(tmp_path.glob("checkpoints/step_*"))
    assert (tmp_path / "status").read_text() == "failed\n"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("log", "evaluation", "save"), [(4, 3, 9), (100, 5, 4), (1, 4, 6)])
def test_throughput_counts_all_of_training_and_nothing_else(log, evaluation, save, pair_data, tmp_path):
    flags = [f"--log-interval={log}", f"--eval-interval={evaluation}", f"--save-interval={save}", "--train-iters=12"]
    assert pretrain(*pair_data.flags, *flags, f"--save={tmp_path}") == 0
    last, total = 0, 0.0
    for record in records(tmp_path, "train"):
        seconds = record["tokens"] / record["tokens_per_second"]
        assert seconds > STEP * (record["step"] - last)
        last, total = record["step"], total + seconds
    (end,) = records(tmp_path, "end")
    pauses = EVALUATION * len(records(tmp_path, "valid")) + CHECKPOINT * -(-12 // save)
    assert last == 12
    assert total < end["elapsed_seconds"] - pauses


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_progress_bar_with_the_lines_above_it(pair_data, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    assert pretrain(*pair_data.flags, "--train-iters=4", f"--save={tmp_path}") == 0
    shown = terminal.getvalue()
    assert "training" in shown
    assert "4/4" in shown
    assert "validation loss" in shown


def test_a_log_file_gets_every_line_even_when_errors_go_to_a_terminal(pair_data, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert pretrain(*pair_data.flags, "--train-iters=3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ") and "/" in line] == ["1/3", "2/3", "3/3"]


def test_tensorboard_holds_the_curves(one_process):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(os.fspath(one_process / "plain" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {record["step"]: record["loss"] for record in records(one_process / "plain", "train")}
    assert losses == pytest.approx(expected)
    assert {event.step for event in events.Scalars("valid/perplexity")} == {10, 20}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.9, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_durations_read_as_clocks(seconds, text):
    assert metrics._duration(seconds) == text
