"""Schedules of pipelines that an older torch cannot run."""

import pytest
from pretraining_runs import pretrain

from megatron_plm.benchmark.parity import _runs_here
from megatron_plm.benchmark.parity_cases import CASES
from megatron_plm.config.options import ParallelOptions
from megatron_plm.parallel.pipeline import check_schedule


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1"])
def test_zbv_is_refused_before_data_is_read_where_torch_is_too_old(version, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.__version__", version)
    check_schedule(ParallelOptions(pipeline_model_parallel_size=2, pipeline_schedule="interleaved"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--pipeline-model-parallel-size=2", "--pipeline-schedule=zbv", "--micro-batch-size=1"]
    assert pretrain(*flags, f"--save={tmp_path / 'run'}", "--data-path=none/there") == 2
    assert f"--pipeline-schedule zbv needs torch 2.13, and this is {version}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0a0+git1234", "3.0.1"])
def test_newer_ones_run_it(version, monkeypatch):
    monkeypatch.setattr("torch.__version__", version)
    check_schedule(ParallelOptions(pipeline_model_parallel_size=2, pipeline_schedule="zbv"))


def test_the_parity_benchmark_leaves_out_what_torch_is_too_old_for(monkeypatch):
    cases, said = [case for case in CASES if case.name in ("PP2 zbv", "PP2 gpipe")], []
    assert [_runs_here(case, said.append) for case in cases] == [True, True]
    monkeypatch.setattr("torch.__version__", "2.11.0")
    assert [case.name for case in cases if _runs_here(case, said.append)] == ["PP2 gpipe"]
    assert said == [
        "PP2 zbv: left out, --pipeline-schedule zbv needs torch 2.13, and this is 2.11.0; install a newer one, or "
        "choose interleaved"
    ]
