"""Reading and writing native checkpoints without the trainer."""

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_sample import TINY, native_checkpoint, random_weights
from harmful_pickle import Calls
from pretraining_runs import same_bits
from torch.distributed.checkpoint.state_dict import get_state_dict

from megatron_plm.checkpoint_format import CheckpointState, find_checkpoint, read_description, write_description
from megatron_plm.config.options import Config
from megatron_plm.convert.native import read_native, write_native
from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.errors import UserError


def test_a_checkpoint_with_optimizer_gives_its_weights_alone(tmp_path: Path) -> None:
    weights = random_weights()
    model = weights.build()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    saved, moments = get_state_dict(model, optimizer)
    step = tmp_path / "checkpoints" / "step_00000001"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": saved, "optimizer": moments}, checkpoint_id=step, no_dist=True)
    tokenizer = weights.tokenizer
    state = CheckpointState(tokenizer.name, tokenizer.sha256, step=1, has_optimizer=True)
    write_description(step, Config(model=weights.options), state)
    (tmp_path / "checkpoints" / "latest").symlink_to(step.name)

    for path in (step, tmp_path):  # the checkpoint, or the run it is the latest of
        assert same_bits(read_native(path).tensors, model.state_dict())
    loaded = load_pretrained(tmp_path)
    assert (loaded.options, loaded.tokenizer) == (weights.options, tokenizer)
    assert same_bits(dict(loaded.model.state_dict()), model.state_dict())


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    weights = native_checkpoint(tmp_path / "native")
    back = read_native(tmp_path / "native")
    assert same_bits(back.tensors, weights.tensors)
    assert (back.options, back.tokenizer, back.notes) == (weights.options, weights.tokenizer, ())


def test_a_written_checkpoint_says_that_it_holds_weights_only(tmp_path: Path) -> None:
    native_checkpoint(tmp_path / "native")
    config, state = read_description(find_checkpoint(tmp_path / "native"))
    assert config.model == TINY
    assert (state.step, state.consumed_tokens, state.has_optimizer) == (0, 0, False)


def test_code_in_the_metadata_does_not_run(tmp_path: Path) -> None:
    native_checkpoint(tmp_path / "native")
    marker = tmp_path / "it ran"
    (tmp_path / "native" / ".metadata").write_bytes(pickle.dumps(Calls(Path.touch, marker)))
    with pytest.raises(UserError, match=r"names pathlib\.Path"):
        read_native(tmp_path / "native")
    assert not marker.exists()


def test_a_tensor_stored_as_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    weights = random_weights()
    marker = tmp_path / "it ran"
    tensors = {**weights.tensors, "head.bias": Calls(Path.touch, marker)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": tensors}, checkpoint_id=tmp_path / "native", no_dist=True)
    state = CheckpointState(weights.tokenizer.name, weights.tokenizer.sha256)
    write_description(tmp_path / "native", Config(model=weights.options), state)
    with pytest.raises(UserError, match=r"1 tensor is missing \(head\.bias\)"):
        read_native(tmp_path / "native")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (".metadata", None, "damaged or incomplete \\(No such file"),
        (".metadata", 200, "damaged or incomplete"),
        (".metadata", 0, "damaged or incomplete"),
        ("__0_0.distcp", None, "damaged or incomplete"),
        ("__0_0.distcp", 1000, "damaged or incomplete"),
        ("config.toml", None, "config.toml"),
        ("config.toml", 30, "config.toml"),
        ("state.json", 10, "state.json"),
    ],
)
def test_a_missing_or_shortened_file_is_a_sentence(file: str, change: int | None, message: str, tmp_path: Path) -> None:
    native_checkpoint(tmp_path / "native")
    path = tmp_path / "native" / file
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(content[:change])
    with pytest.raises(UserError, match=message) as raised:
        read_native(tmp_path / "native")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden_size = 24", "hidden_size = 48", r"blocks\.0\.attention\.out\.bias has shape \[24\], but .* \[48\]"),
        ("num_layers = 2", "num_layers = 3", r"12 tensors are missing \(encoder\.blocks\.2"),
        ("num_layers = 2", "num_layers = 1", r"12 tensors are unknown \(encoder\.blocks\.1"),
    ],
)
def test_a_configuration_of_another_model_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    native_checkpoint(tmp_path / "native")
    config = tmp_path / "native" / "config.toml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        read_native(tmp_path / "native")


def test_another_token_list_of_the_same_name_is_refused(tmp_path: Path) -> None:
    native_checkpoint(tmp_path / "native")
    path = tmp_path / "native" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_sha256": "0" * 64}))
    with pytest.raises(UserError, match="another token list"):
        read_native(tmp_path / "native")


def test_a_disk_that_refuses_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"exists|directory"):
        write_native(random_weights(), tmp_path / "file", "float32")
