"""`--profile` writes what it promises, of the steps that it names, and changes nothing."""

import functools
import re

import pytest
import torch
from pretraining_runs import checkpoint, column, in_processes, pretrain, read_tensors, run_each, same_bits

from megatron_plm.config.load import config_from_values, load_config
from megatron_plm.training.profiler import traced_steps
from megatron_plm.training.trace_events import read_trace
from megatron_plm.training.trace_summary import COMMUNICATION, summarize

SHORT = ("--train-iters=7", "--eval-interval=7", "--save-interval=7", "--lr-warmup-iters=2")


@pytest.fixture(scope="module")
def runs(pair_data, tmp_path_factory):
    """A run, and the same with steps 4 and 5 traced."""
    folder = tmp_path_factory.mktemp("profiles")
    trace = ("--profile", "--profile-step-start=3", "--profile-step-end=5")
    plain = [*pair_data.flags, *SHORT]
    codes = run_each({"plain": plain, "traced": [*plain, *trace]}, folder)
    assert set(codes.values()) == {0}
    return folder


def test_tracing_changes_no_bit_of_the_run(runs):
    assert column(runs / "traced", "train", "loss") == column(runs / "plain", "train", "loss")
    assert same_bits(*(read_tensors(checkpoint(runs / name)) for name in ("plain", "traced")))


def test_the_trace_holds_the_steps_that_were_named_and_adds_up(runs):
    folder = runs / "traced" / "profile" / "step_00000004"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0.md", "rank_0.trace.json.gz"]
    trace = read_trace(folder / "rank_0.trace.json.gz")
    summary = summarize(trace)
    assert len(summary.steps) == 2
    calls = [event for event in trace.host if event.name == "aten::_fused_adamw_"]
    assert len(calls) % 2 == 0
    assert calls, "AdamW once a step and group"
    whole = sum(summary.classes.values()) + summary.idle
    assert whole == pytest.approx(summary.window, rel=1e-3)
    # What the loop does between two steps is in no phase of either.
    assert sum(summary.phases.values()) == pytest.approx(sum(summary.steps), rel=1e-3)
    assert sum(summary.steps) <= summary.window
    for name in ("matrix products", "attention", "norms and elementwise", "optimizer"):
        assert summary.classes[name] > 0, name
    for name in ("forward", "backward", "optimizer"):
        assert summary.phases[name] > 0, name
    assert summary.communication == 0


def test_the_page_says_what_the_trace_holds(runs):
    page = (runs / "traced" / "profile" / "step_00000004" / "rank_0.md").read_text()
    assert page.startswith("# Profile of steps 4 to 5\n")
    shares = [float(share) for share in re.findall(r"\| ([\d.]+) % \|", page.split("| phase |")[0])]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "No communication." in page
    assert "`aten::_fused_adamw_`" in page or "pointwise" in page


def test_a_later_start_does_not_trace_again(runs):
    config, _ = load_config(["--config", str(runs / "traced" / "config.toml")])
    plain, _ = load_config(["--config", str(runs / "plain" / "config.toml")])
    assert config.training.profile is False
    assert traced_steps(config, 0) == range(0)
    assert config.training.train_iters == plain.training.train_iters


def traced_by_two(flags, folder):
    argv = [*flags, "--profile", "--profile-ranks=all"]
    run_each({"plain": flags, "traced": argv}, folder)


def test_each_of_two_processes_writes_its_own_and_sees_its_messages(pair_data, tmp_path):
    flags = [*pair_data.flags, *SHORT, "--train-iters=4", "--save-interval=4"]
    in_processes(2, functools.partial(traced_by_two, flags), tmp_path, groups=2)
    folder = tmp_path / "traced" / "profile" / "step_00000003"
    names = [f"rank_{rank}.{kind}" for rank in (0, 1) for kind in ("md", "trace.json.gz")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for rank in (0, 1):
        summary = summarize(read_trace(folder / f"rank_{rank}.trace.json.gz"))
        assert 0 < summary.exposed <= summary.communication < summary.window
        assert summary.classes[COMMUNICATION] > 0
    assert same_bits(*(read_tensors(checkpoint(tmp_path / name)) for name in ("plain", "traced")))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--profile"], "give --save too"),
        (["--profile-step-start=3"], "--profile-step-start: nothing is traced without --profile"),
        (["--record-memory-history"], "--record-memory-history: nothing is traced without --profile"),
        (["--profile", "--save=x", "--profile-step-start=4", "--profile-step-end=4"], "--profile-step-end 4 must be"),
        (["--profile", "--save=x", "--profile-step-start=9"], "--profile: steps 9 to 7 are to be traced"),
        (["--profile", "--save=x", "--profile-step-start=0"], "--profile-step-start must be above 0"),
        (["--profile", "--save=x", "--profile-ranks=1"], "--profile-ranks 1: expected numbers below 1"),
        (["--profile", "--save=x", "--profile-ranks=first"], "--profile-ranks first: expected numbers"),
        (["--profile", "--save=x", "--train-iters=1"], "--profile: steps 1 to 1 are to be traced"),
        pytest.param(
            ["--profile", "--save=x", "--record-memory-history"], "this run is on the CPU; leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_refused_in_a_sentence(pair_data, refused, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*pair_data.flags, *SHORT, *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("done", "iters", "given", "expected"),
    [
        (0, 1000, {}, (10, 12)),
        (500, 1000, {}, (510, 512)),
        (0, 6, {}, (4, 6)),
        (0, 2, {}, (1, 2)),
        (0, 1000, {"profile_step_start": 40}, (40, 42)),
        (0, 1000, {"profile_step_end": 5}, (4, 5)),
        (0, 1000, {"profile_step_end": 60}, (10, 60)),
    ],
)
def test_the_steps_that_are_traced_unless_named(done, iters, given, expected):
    config = config_from_values({"train_iters": iters, "profile": True, **given})
    steps = traced_steps(config, done)
    assert (steps.start, steps.stop) == expected


@pytest.mark.gpu
def test_a_snapshot_of_a_gpus_memory_is_written(pair_data, tmp_path):
    argv = [*pair_data.flags, *SHORT, "--profile", "--record-memory-history", f"--save={tmp_path / 'run'}"]
    assert pretrain(*argv) == 0
    (snapshot,) = tmp_path.glob("run/profile/*/rank_0.memory.pickle")
    assert snapshot.stat().st_size > 0
