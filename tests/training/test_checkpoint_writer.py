"""`--async-save`: the same checkpoints as without it, written while training goes on."""

import errno
import os
import signal
import threading

import pytest
import torch
from pretraining_runs import checkpoint, column, pretrain, read_tensors, records, same_bits

from megatron_plm.checkpoint_format import find_checkpoint
from megatron_plm.training import checkpoint_writer, loop

SECONDS = 60.0  # after which a thread that should have come is given up


@pytest.fixture
def at_step(monkeypatch):
    """Calls functions just before the step of their number (from 1), in the training's own thread."""
    acts = {}
    train_step = loop.train_step

    def step(run, batches):
        acts.get(run.progress.step + 1, lambda: None)()
        return train_step(run, batches)

    monkeypatch.setattr(loop, "train_step", step)
    return acts


@pytest.fixture
def writing(monkeypatch):
    """Calls `writing.before` in the thread that writes, before each checkpoint."""
    save = checkpoint_writer.save

    class Writing:
        @staticmethod
        def before():
            pass

    only_one = threading.Lock()

    def watched(*args, **kwargs):
        assert only_one.acquire(blocking=False)
        try:
            Writing.before()
            return save(*args, **kwargs)
        finally:
            only_one.release()

    monkeypatch.setattr(checkpoint_writer, "save", watched)
    return Writing


def writer_ends():
    """Wait for the thread that writes."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(SECONDS)


def test_the_steps_meanwhile_are_not_in_the_checkpoint(one_process, pair_data, tmp_path, at_step, writing):
    """The first checkpoint, after step 10, is held back until step 15 is due: saved at once, that would never be."""
    due = threading.Event()
    held_back = []
    writing.before = lambda: held_back.append(due.wait(SECONDS))
    at_step[15] = due.set
    assert pretrain(*pair_data.flags, "--async-save", f"--save={tmp_path}") == 0
    assert held_back == [True, True]
    for step in (10, 20):
        saved, expected = (read_tensors(checkpoint(run, step)) for run in (tmp_path, one_process / "plain"))
        assert same_bits(saved, expected)
        described = [(checkpoint(run, step) / "state.json").read_text() for run in (tmp_path, one_process / "plain")]
        assert described[0] == described[1]
    assert column(tmp_path, "train", "loss") == column(one_process / "plain", "train", "loss")


def test_one_checkpoint_waits_for_the_one_before(pair_data, tmp_path, writing, monkeypatch, capsys):
    """The first is held back until the second is due; the memory of the copies is the same."""
    waiting = threading.Event()
    finish = checkpoint_writer.CheckpointWriter.finish

    def finishes(writer):
        if writer._thread is not None:
            waiting.set()
        finish(writer)

    writing.before = lambda: waiting.wait(SECONDS)
    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "finish", finishes)
    assert pretrain(*pair_data.flags, "--async-save", "--save-interval=5", f"--save={tmp_path}") == 0
    steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert steps == ["step_00000010", "step_00000015", "step_00000020"]  # the last three
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("saved")]
    assert told == [f"saved {checkpoint(tmp_path, step)}" for step in (5, 10, 15, 20)]


def test_a_checkpoint_that_cannot_be_written_ends_the_training_at_its_next_step(
    pair_data, tmp_path, at_step, writing, capsys
):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writing.before = full
    at_step[11] = writer_ends
    at_step[12] = lambda: pytest.fail("training went on")
    assert pretrain(*pair_data.flags, "--async-save", f"--save={tmp_path}") == 1
    assert "step_00000010: the checkpoint cannot be written (No space left on device)" in capsys.readouterr().err
    assert (tmp_path / "status").read_text() == "failed\n"


def test_a_signal_while_a_checkpoint_is_written_leaves_both(pair_data, tmp_path, at_step, writing):
    signalled = threading.Event()
    writing.before = lambda: signalled.wait(SECONDS)

    def stop():
        signal.raise_signal(signal.SIGTERM)
        signalled.set()

    at_step[12] = stop
    assert pretrain(*pair_data.flags, "--async-save", f"--save={tmp_path}") == 75
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000010", "step_00000012"]
    assert find_checkpoint(tmp_path) == checkpoint(tmp_path, 12)
    assert (tmp_path / "status").read_text() == "interrupted\n"


def test_a_training_that_diverges_keeps_the_checkpoint_that_was_being_written(pair_data, tmp_path, at_step, writing):
    diverging = threading.Event()
    writing.before = lambda: diverging.wait(SECONDS)

    def diverged():
        diverging.set()
        loop.check_finite(14, float("nan"), 0.0)

    at_step[14] = diverged
    assert pretrain(*pair_data.flags, "--async-save", f"--save={tmp_path}") == 1
    assert find_checkpoint(tmp_path) == checkpoint(tmp_path, 10)
    assert records(tmp_path, "end")[-1]["status"] == "failed"


def test_the_first_of_two_errors_is_told(pair_data, tmp_path, at_step, writing, capsys):
    """The training diverges while a checkpoint that will fail is being written."""
    diverging = threading.Event()

    def full():
        diverging.wait(SECONDS)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def diverged():
        diverging.set()
        loop.check_finite(14, float("nan"), 0.0)

    writing.before, at_step[14] = full, diverged
    assert pretrain(*pair_data.flags, "--async-save", f"--save={tmp_path}") == 1
    told = capsys.readouterr().err
    assert "step 14: the loss is nan" in told
    assert "No space left" not in told


def test_an_error_of_another_kind_leaves_the_checkpoint_too(pair_data, tmp_path, at_step, writing):
    ending = threading.Event()
    writing.before = lambda: ending.wait(SECONDS)

    def ends():
        ending.set()
        raise torch.OutOfMemoryError("out of memory")

    at_step[14] = ends
    with pytest.raises(torch.OutOfMemoryError):
        pretrain(*pair_data.flags, "--async-save", f"--save={tmp_path}")
    assert find_checkpoint(tmp_path) == checkpoint(tmp_path, 10)
