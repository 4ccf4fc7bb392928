"""The scaling benchmark trains in every layout, each process on the same number of rows."""

import argparse
import json

import pytest
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.benchmark import scaling
from megatron_plm.benchmark.command import main
from megatron_plm.errors import run_command


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("scaling") / "p", pair_proteins(200, seed=1))


def test_layouts_of_two_processes_are_measured(dataset, tmp_path, capsys):
    output = tmp_path / "scaling.json"
    flags = ["--quick", "--processes", "2", "--kinds", "fsdp", "tp", "--device", "cpu", "--output", str(output)]
    assert main(["scaling", "--data-path", str(dataset), *flags]) == 0
    layouts = json.loads(output.read_text())["layouts"]
    assert list(layouts) == ["one", "fsdp 2", "tp 2"]
    alone = layouts["one"]["tokens_per_second"][0]
    for figures in layouts.values():
        (speed,) = figures["tokens_per_second"]
        assert figures["efficiency"] == pytest.approx(speed / figures["processes"] / alone)
    printed = capsys.readouterr().out
    assert "weights shared out (FSDP2)" in printed
    assert "note: " not in printed or "2 processes share 1 cores" in printed


@pytest.mark.parametrize("kind", scaling.KINDS)
def test_the_rows_of_a_step_grow_with_the_processes(kind, dataset):
    options = argparse.Namespace(preset="tiny", rows=2, seq_length=128, data_path=str(dataset), seed=1)
    configs = [scaling._config(kind, n, options=options, device="cpu", bf16=False) for n in (1, 2, 4)]
    assert [config.training.global_batch_size for config in configs] == [2, 4, 8]
    held_by_all = [config.training.micro_batch_size for config in configs]
    assert held_by_all == ([2, 4, 8] if kind == "tp" else [2, 2, 2])


def test_what_is_no_layout_is_told_before_anything_is_measured(dataset, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "_run", lambda *_: pytest.fail("the measurement began"))
    flags = ["--preset", "tiny", "--kinds", "tp", "--processes", "3", "--device", "cpu"]
    assert run_command(main, ["scaling", "--data-path", str(dataset), *flags]) == 2
    assert "tensor" in capsys.readouterr().err
