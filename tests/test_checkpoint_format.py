"""The description beside a checkpoint's tensors, and finding the checkpoint that a path means."""

import json

import pytest

from megatron_plm.checkpoint_format import (
    CheckpointState,
    checkpoint_tokenizer,
    find_checkpoint,
    is_native,
    read_description,
    write_description,
)
from megatron_plm.config.load import load_config
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

CONFIG, _ = load_config(["--preset=tiny", "--save=runs/ä b", "--lr=0.01"])
STATE = CheckpointState(
    tokenizer="esm2",
    tokenizer_sha256=get_tokenizer("esm2").sha256,
    step=12,
    consumed_tokens=10**13,
    cursor={"epoch": 1, "window": 2, "row": 3},
    has_optimizer=True,
)


@pytest.fixture
def run(tmp_path):
    """A run directory with one described checkpoint."""
    step = tmp_path / "run" / "checkpoints" / "step_00000012"
    step.mkdir(parents=True)
    write_description(step, CONFIG, STATE)
    (step.parent / "latest").symlink_to(step.name)
    return tmp_path / "run"


def test_what_was_described_is_read_again(run):
    assert read_description(run / "checkpoints" / "latest") == (CONFIG, STATE)
    assert checkpoint_tokenizer(run, STATE) is get_tokenizer("esm2")


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/latest", "checkpoints/step_00000012"])
def test_a_run_its_checkpoints_and_a_step_all_mean_the_checkpoint(run, place):
    assert is_native(run / place)
    assert find_checkpoint(run / place) == (run / "checkpoints" / "step_00000012").resolve()


def test_a_checkpoint_that_is_not_complete_counts_for_nothing(run):
    (run / "checkpoints" / "step_00000012" / "state.json").unlink()
    for place in (run, run / "checkpoints", run / "nowhere"):
        assert not is_native(place)
        with pytest.raises(UserError, match=f"{place}: no complete checkpoint; give a run directory"):
            find_checkpoint(place)


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        '"text"',
        "{}",
        json.dumps({"format": "other", "version": 1}),
        json.dumps({"format": "megatron-plm-checkpoint", "version": 2}),
        json.dumps({"format": "megatron-plm-checkpoint", "version": 1}),
        json.dumps(
            {"format": "megatron-plm-checkpoint", "version": 1, "tokenizer": "x", "tokenizer_sha256": "y", "z": 1}
        ),
    ],
)
def test_a_state_that_is_something_else_is_refused(run, document):
    (run / "checkpoints" / "step_00000012" / "state.json").write_text(document)
    with pytest.raises(UserError, match="step_00000012: not a native checkpoint"):
        read_description(find_checkpoint(run))


def test_another_token_list_of_the_same_name_is_refused(run):
    with pytest.raises(UserError, match="another token list"):
        checkpoint_tokenizer(run, CheckpointState(tokenizer="esm2", tokenizer_sha256="0" * 64))
