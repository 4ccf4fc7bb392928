"""The checkpoint benchmark saves and loads the same tensors on both sides."""

import json

import pytest
import torch
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.benchmark import checkpoint
from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.device import preset_config, quick_values
from megatron_plm.errors import run_command
from megatron_plm.parallel.mesh import World
from megatron_plm.training.loop import train_step
from megatron_plm.training.state import build_run, open_datasets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("checkpoint") / "p", pair_proteins(200, seed=1))


def test_the_command_tells_times_sizes_and_the_stall(dataset, tmp_path, capsys):
    output = tmp_path / "checkpoint.json"
    flags = ["--quick", "--device", "cpu", "--directory", str(tmp_path), "--output", str(output)]
    assert main(["checkpoint", "--data-path", str(dataset), *flags]) == 0
    result = json.loads(output.read_text())
    figures = result["presets"]["tiny"]
    held = 3 * 4 * figures["num_parameters"]  # a weight and two moments, in fp32
    assert held < figures["torch_bytes"] < figures["bytes"] + 50_000 < 1.5 * held + 150_000
    assert all(
        len(figures[side]) == 2 and min(figures[side]) > 0
        for side in ("save", "stall", "torch_save", "load", "torch_load")
    )
    (stall,) = result["checks"].values()
    assert stall["value"] == pytest.approx(sum(figures["stall"]) / 2 / figures["step"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]
    assert "--async-save, all it costs" in capsys.readouterr().out


def test_what_the_peer_saves_is_all_that_ours_restores(dataset, tmp_path):
    config = preset_config(
        "tiny", data_path=(str(dataset),), num_workers=0, micro_batch_size=1, global_batch_size=1, seq_length=128
    )
    run = build_run(config, World(0, 1, torch.device("cpu"), None), open_datasets(config), fill=quick_values)
    train_step(run, next(run.train_loader.steps(run.progress.cursor)))
    tensors = checkpoint.plain_tensors(run)
    assert len(tensors) == 4 * len(run.model.originals)  # weight, two moments, and the count of steps
    checkpoint._save_plain(tensors, tmp_path / "plain.pt")
    checkpoint.save_checkpoint(run, tmp_path)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for load in (
        lambda: checkpoint._load_plain(tensors, tmp_path / "plain.pt"),
        lambda: checkpoint.load_checkpoint(run, tmp_path),
    ):
        for tensor in tensors.values():
            tensor.fill_(7.0)
        load()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_a_longer_stall_than_a_step_is_a_miss():
    def verdicts(stall):
        return checkpoint.missed({"checks": checkpoint._checks({"x": {"stall": [stall], "step": 2.0}}, 8)})

    assert verdicts(2.1) == ["x"]
    assert verdicts(1.9) == []


def test_a_folder_that_is_not_there_is_told_in_a_sentence(dataset, tmp_path, capsys):
    flags = ["checkpoint", "--data-path", str(dataset), "--quick", "--directory", str(tmp_path / "absent")]
    assert run_command(main, flags) == 2
    assert "--directory" in capsys.readouterr().err
