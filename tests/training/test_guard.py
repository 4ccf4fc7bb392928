"""What ends a run early: signals save it, numbers that are no longer finite don't."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from pretraining_runs import checkpoint, column, pretrain, read_tensors, records, same_bits
from processes import environment

from megatron_plm.errors import UserError
from megatron_plm.training import loop
from megatron_plm.training.guard import check_finite


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_bitwise(number, one_process, pair_data, tmp_path, monkeypatch, capsys):
    train_step = loop.train_step

    def signalled(run, step):
        if run.progress.step == 6:
            os.kill(os.getpid(), number)
        return train_step(run, step)

    monkeypatch.setattr(loop, "train_step", signalled)
    signal.signal(number, lambda *_: None)  # if the run doesn't take it, the tests live on to say so
    flags = [*pair_data.flags, f"--save={tmp_path}"]
    assert pretrain(*flags) == 75
    assert (tmp_path / "status").read_text() == "interrupted\n"
    assert (records(tmp_path, "end")[-1]["status"], records(tmp_path, "end")[-1]["step"]) == ("interrupted", 7)
    assert checkpoint(tmp_path).resolve() == checkpoint(tmp_path, 7)
    assert records(tmp_path, "valid") == [], "there may be no time for it"
    (command,) = re.findall(r"next: \S*launch/pretrain.sh (.*)", capsys.readouterr().out)
    monkeypatch.setattr(loop, "train_step", train_step)
    assert pretrain(*shlex.split(command)) == 0
    assert same_bits(read_tensors(checkpoint(tmp_path)), read_tensors(checkpoint(one_process / "plain")))
    assert column(tmp_path, "train", "loss") == column(one_process / "plain", "train", "loss")


def test_a_signal_during_the_last_step_comes_too_late(one_process, pair_data, tmp_path, monkeypatch):
    train_step = loop.train_step

    def signalled(run, step):
        if run.progress.step == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, step)

    monkeypatch.setattr(loop, "train_step", signalled)
    assert pretrain(*pair_data.flags, f"--save={tmp_path}") == 0
    assert (tmp_path / "status").read_text() == "finished\n"
    assert records(tmp_path, "valid") == records(one_process / "plain", "valid")


def signals(*, apart: float) -> int:
    """Send this process's like two signals `apart` seconds after one another; returns how it ended."""
    code = f"""
import signal, time
from megatron_plm.training.guard import StopRequest
stop = StopRequest()
assert not stop.requested
signal.raise_signal(signal.SIGTERM)
assert stop.requested
clock = time.monotonic
time.monotonic = lambda: clock() + {apart}
signal.raise_signal(signal.SIGUSR1)
assert stop.requested
"""
    return subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=False).returncode


def test_the_same_signal_by_two_ways_stops_once_and_an_impatient_one_at_once():
    assert signals(apart=1.0) == 0
    assert signals(apart=10.0) == -signal.SIGUSR1


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_or_gradient_that_is_not_finite_names_its_step_and_the_way_out(loss):
    for values in ((loss, 1.0), (1.0, loss)):
        with pytest.raises(UserError, match=r"step 12: the loss is .*lower --lr.*--load"):
            check_finite(12, *values)
    check_finite(12, 1.0, 0.0)


def test_a_run_that_diverges_fails_and_saves_nothing_of_it(pair_data, tmp_path, capsys):
    flags = [
        "--lr=1e38",
        "--min-lr=0",
        "--lr-warmup-iters=0",
        "--clip-grad=0",
        "--log-interval=100",
        "--save-interval=5",
    ]
    assert pretrain(*pair_data.flags, *flags, f"--save={tmp_path}") == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: step 5: the loss is nan")
    assert output.err.count("\n") == 1
    assert (tmp_path / "status").read_text() == "failed\n"
    assert records(tmp_path, "end")[-1]["status"] == "failed"
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number_never_reaches_a_checkpoint(where, pair_data, tmp_path, monkeypatch):
    """Wherever in the interval it comes up: checkpoints are written only after a look at the numbers."""
    summed_cross_entropy, calls = loop.summed_cross_entropy, []

    def poisoned(logits, labels):
        calls.append(logits.requires_grad)
        loss = summed_cross_entropy(logits, labels)
        if sum(calls) <= 2 * 6:  # two micro-batches a step; step 7 is hit
            return loss
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(loop, "summed_cross_entropy", poisoned)
    flags = ["--log-interval=100", "--eval-interval=100", "--save-interval=5"]
    assert pretrain(*pair_data.flags, *flags, f"--save={tmp_path}") == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000005"]
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(checkpoint(tmp_path)).values())
