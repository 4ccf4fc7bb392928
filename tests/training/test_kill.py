"""kill -9 at every moment of saving: `latest` names a whole checkpoint, and the next run tidies up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretraining_runs import checkpoint, column, read_tensors, same_bits
from processes import REPOSITORY, environment


@pytest.fixture(scope="module")
def killed(pair_data, tmp_path_factory):
    """What kill_scenarios.py found, and the folder it worked in."""
    folder = tmp_path_factory.mktemp("killed")
    program = Path(__file__).with_name("kill_scenarios.py")
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, program, folder, *pair_data.flags],
        env=environment(PYTHONPATH=path, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()), folder


@pytest.mark.parametrize("scenario", ["second", "again"])
def test_at_every_access_to_the_disk_the_latest_checkpoint_is_whole(killed, scenario):
    *deaths, survivor = killed[0][scenario]
    assert len(deaths) > 15
    assert all(entry["killed"] for entry in deaths)
    assert not survivor["killed"]
    for entry in [*deaths, survivor]:
        assert entry["intact"], entry
    latest = [entry["latest"] for entry in [*deaths, survivor]]
    assert latest == sorted(latest), "it moves once, from the old to the new"
    assert set(latest) == {1, 2}


@pytest.mark.parametrize("scenario", ["second", "again"])
def test_the_next_run_leaves_nothing_behind(killed, scenario):
    entries = killed[0][scenario]
    assert any(name.startswith(".") for entry in entries for name in entry["left"]), "or there was nothing to tidy"
    for entry in entries:
        assert entry["after"] == ["latest", "step_00000002"]
        assert entry["after_latest"] == 2


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(killed, one_process):
    found, folder = killed
    *trials, last = found["random"]
    assert all(trial["killed"] for trial in trials)
    assert len({trial["latest"] for trial in trials}) > 4, "the kills are spread over the run"
    for trial in trials:
        assert trial["logged"] - trial["latest"] in (0, 1), (
            "at most the step whose checkpoint was being written is lost"
        )
    assert (last["killed"], last["latest"]) == (False, 20)
    assert last["left"] == ["latest", *(f"step_{step:08d}" for step in (18, 19, 20))]
    assert same_bits(read_tensors(checkpoint(folder / "random")), read_tensors(checkpoint(one_process / "plain")))
    assert set(column(folder / "random", "train", "step")) == set(range(1, 21))
