"""Every file under launch/configs resolves, runs, and means what it meant when its golden dump was made.

A golden dump, tests/config/golden/NAME.toml, is the resolved configuration. After a change that is meant:

    PYTHONPATH=.:tests python tests/config/test_launch_configs.py

writes them anew; the diff then shows what the change does to every shipped run. A file made for a number of GPUs has it
in its name.
"""

import re
from pathlib import Path

import pytest
from pretraining_runs import checkpoint, column, pretrain

from megatron_plm.config.load import load_config, to_toml
from megatron_plm.config.problems import problems

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "launch" / "configs").glob("*.toml"))
GOLDEN = Path(__file__).with_name("golden")


def resolved(path: Path) -> str:
    return to_toml(load_config(["--config", str(path)])[0])


def test_the_shipped_configurations_are_the_golden_ones():
    assert CONFIGS
    assert {path.name for path in CONFIGS} == {path.name for path in GOLDEN.glob("*.toml")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_resolves_to_its_golden_dump(path):
    assert resolved(path) == (GOLDEN / path.name).read_text(encoding="utf-8"), "see this file's docstring"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_can_run_on_the_processes_it_is_made_for(path):
    made_for = re.search(r"-(\d+)gpu$", path.stem)
    assert problems(load_config(["--config", str(path)])[0], world_size=int(made_for[1]) if made_for else 1) == []


def test_there_are_configurations_for_a_node_and_for_clusters():
    assert {int(number) for path in CONFIGS for number in re.findall(r"-(\d+)gpu$", path.stem)} == {8, 64, 512}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_runs_when_made_small(path, pair_data, tmp_path):
    small = [
        "--num-layers=1", "--hidden-size=32", "--num-attention-heads=2", "--seq-length=64", "--micro-batch-size=1",
        "--global-batch-size=1", "--train-iters=2", "--lr-warmup-iters=1", "--log-interval=1", "--eval-iters=1",
        "--tensor-model-parallel-size=1", "--no-sequence-parallel", "--data-parallel-replicate-size=1",
    ]  # fmt: skip
    data = [f"--data-path={pair_data.train}", f"--valid-data-path={pair_data.valid}"]
    assert pretrain("--config", path, *small, *data, f"--save={tmp_path}") == 0
    assert column(tmp_path, "train", "step") == [1, 2]
    assert column(tmp_path, "valid", "step") == [2]
    assert checkpoint(tmp_path).resolve() == checkpoint(tmp_path, 2)


def regenerate() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*.toml"):
        stale.unlink()
    for path in CONFIGS:
        (GOLDEN / path.name).write_text(resolved(path), encoding="utf-8")


if __name__ == "__main__":
    regenerate()
