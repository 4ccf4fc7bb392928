"""Going on with a run: bitwise, from any option's value or not at all, and never from damage."""

import errno
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from harmful_pickle import Calls
from pretraining_runs import checkpoint, column, pretrain, read_tensors, records, same_bits
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.checkpoint_format import find_checkpoint
from megatron_plm.training import checkpoint_writer
from megatron_plm.training import pretrain as pretrain_module


@pytest.mark.parametrize("name", ["plain", "bf16", "recompute", "dropout"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, one_process, pair_data, tmp_path):
    flags = {
        "plain": [],
        "bf16": ["--bf16"],
        "recompute": ["--recompute-granularity=full"],
        "dropout": ["--hidden-dropout=0.2", "--attention-dropout=0.2"],
    }[name]
    whole = one_process / name
    assert pretrain(*pair_data.flags, *flags, f"--load={checkpoint(whole, 10)}", f"--save={tmp_path}") == 0
    assert same_bits(read_tensors(checkpoint(tmp_path)), read_tensors(checkpoint(whole)))
    for quantity in ("step", "loss", "grad_norm", "lr", "consumed_tokens"):
        assert column(tmp_path, "train", quantity) == column(whole, "train", quantity)[10:]
    assert records(tmp_path, "valid")[-1] == records(whole, "valid")[-1]
    states = [json.loads((checkpoint(run) / "state.json").read_text()) for run in (tmp_path, whole)]
    assert states[0] == states[1]


def test_options_that_change_no_value_may_change_on_the_way(one_process, pair_data, tmp_path):
    """Saved with recomputation, gone on without; a width that was the default, and a deviation no longer drawn from."""
    load = f"--load={checkpoint(one_process / 'recompute', 10)}"
    same = ["--ffn-hidden-size=128", "--init-method-std=0.5"]
    assert pretrain(*pair_data.flags, *same, load, f"--save={tmp_path}") == 0
    assert same_bits(read_tensors(checkpoint(tmp_path)), read_tensors(checkpoint(one_process / "plain")))


def test_a_run_goes_on_in_its_own_directory(stopped, one_process, pair_data, capsys):
    assert pretrain(*pair_data.flags, f"--load={stopped}", f"--save={stopped}") == 0
    assert f"going on from {checkpoint(stopped, 10)} at step 10" in capsys.readouterr().out
    assert same_bits(read_tensors(checkpoint(stopped)), read_tensors(checkpoint(one_process / "plain")))
    assert column(stopped, "train", "step") == list(range(1, 21))
    assert len(records(stopped, "start")) == 2
    assert (stopped / "status").read_text() == "finished\n"


def test_the_options_of_the_new_start_hold(stopped, pair_data, tmp_path, monkeypatch):
    seen = []
    train = pretrain_module.train
    monkeypatch.setattr(pretrain_module, "train", lambda run, *rest: (seen.append(run), train(run, *rest))[1])
    flags = ["--weight-decay=0.5", "--adam-beta1=0.8", "--adam-beta2=0.9", "--adam-eps=1e-6"]
    assert pretrain(*pair_data.flags, *flags, f"--load={stopped}", f"--save={tmp_path / 'new'}") == 0
    groups = seen[0].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6) for group in groups)


def test_a_new_run_begins_with_pretrained_weights(one_process, pair_data, tmp_path, capsys):
    """Other data, another seed and another row length than the run that made them; then it goes on by --load."""
    pretrained = f"--pretrained-checkpoint={one_process / 'plain'}"
    flags = [*pair_data.flags, f"--data-path={pair_data.valid}", "--seed=5", "--seq-length=128"]
    assert pretrain(*flags, pretrained, "--train-iters=4", "--save-interval=2", f"--save={tmp_path}") == 0
    path = checkpoint(one_process / "plain").resolve()
    assert f"beginning with the weights of {path}\n" in capsys.readouterr().out
    assert column(tmp_path, "train", "step") == [1, 2, 3, 4]
    assert column(tmp_path, "train", "loss")[0] < column(one_process / "plain", "train", "loss")[0] - 0.3
    config = ["--config", tmp_path / "config.toml"]
    assert pretrain(*config, f"--load={tmp_path}", f"--save={tmp_path}", "--train-iters=5") == 0
    assert column(tmp_path, "train", "step") == [1, 2, 3, 4, 5]


def test_pretrained_weights_of_another_model_are_refused(one_process, pair_data, refused):
    flag = f"--pretrained-checkpoint={one_process / 'plain'}"
    assert "--num-layers was 2 there and is 3 here" in refused(*pair_data.flags, "--num-layers=3", flag)


def test_another_dataset_is_refused_and_pretrained_checkpoint_is_the_way_out(one_process, pair_data, refused):
    said = refused(
        *pair_data.flags, f"--data-path={pair_data.valid}", f"--load={checkpoint(one_process / 'plain', 10)}"
    )
    assert f"--data-path {pair_data.valid} is not the dataset of that run" in said
    assert "--pretrained-checkpoint" in said


@pytest.mark.parametrize(
    ("flag", "was"),
    [
        ("--num-layers=3", "2"),
        ("--hidden-size=64", "32"),
        ("--num-attention-heads=4", "2"),
        ("--ffn-hidden-size=64", "128"),
        ("--layernorm-epsilon=1e-6", "1e-05"),
        ("--no-token-dropout", "True"),
        ("--seq-length=128", "64"),
        ("--packing-window=32", "64"),
        ("--mask-prob=0.2", "0.15"),
        ("--seed=7", "1234"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused_by_the_option(flag, was, one_process, pair_data, refused):
    path = checkpoint(one_process / "plain", 20)
    said = refused(*pair_data.flags, flag, f"--load={one_process / 'plain'}")
    name = flag.partition("=")[0].replace("--no-", "--")
    assert f"--load {path}: {name} was {was} there" in said
    assert f"--config {path / 'config.toml'}" in said


def test_a_checkpoints_own_configuration_is_a_way_out(one_process):
    path = checkpoint(one_process / "plain", 10)
    assert pretrain("--config", path / "config.toml", f"--load={path}", "--save", "", "--train-iters=11") == 0


@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path"])
def test_a_dataset_of_another_tokenizer_is_refused(flag, pair_data, tmp_path, refused):
    prefix = write_dataset(tmp_path / "tape", pair_proteins(5, seed=1), tokenizer="tape-iupac")
    said = refused(*pair_data.flags, f"{flag}={prefix}")
    assert f"{flag} {prefix}" in said
    assert all(words in said for words in ["'tape-iupac'", "'esm2'", "--tokenizer esm2"])


def test_a_dataset_that_does_not_say_its_tokenizer_is_refused(pair_data, tmp_path, refused):
    prefix = write_dataset(tmp_path / "foreign", pair_proteins(5, seed=1))
    (tmp_path / "foreign.json").unlink()
    assert f"{prefix}.json is missing" in refused(*pair_data.flags, f"--data-path={prefix}")


def test_training_without_data_is_refused(refused):
    assert "--data-path is missing" in refused("--preset=tiny")


def test_a_checkpoint_of_another_tokenizer_is_refused(one_process, pair_data, tmp_path, refused):
    prefix = write_dataset(tmp_path / "tape", pair_proteins(40, seed=1), tokenizer="tape-iupac")
    flags = [*pair_data.flags, "--tokenizer=tape-iupac", f"--data-path={prefix}", f"--valid-data-path={prefix}"]
    said = refused(*flags, f"--load={one_process / 'plain'}")
    assert all(words in said for words in ["--load", "checkpoint's tokenizer is 'esm2'", "'tape-iupac'"])


def rewrite(path, **changes):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: rewrite(c / "state.json", has_optimizer=False), "holds weights only"),
        (lambda c: rewrite(c / "state.json", version=99), "not a native checkpoint"),
        (lambda c: rewrite(c / "state.json", tokenizer_sha256="0" * 64), "had another token list"),
        (lambda c: (c / "state.json").write_text("{"), "state.json"),
        (lambda c: (c / "state.json").unlink(), "no complete checkpoint"),
        (lambda c: (c / "config.toml").unlink(), "config.toml"),
        (lambda c: (c / "config.toml").write_text("[model]\nlayers = 2\n"), "config.toml: unknown key 'layers'"),
        (lambda c: (c / ".metadata").unlink(), "damaged or incomplete"),
        (lambda c: (c / ".metadata").write_bytes(b"junk"), "damaged or incomplete"),
        (lambda c: os.truncate(c / "__0_0.distcp", 1000), "damaged or incomplete"),
        (lambda c: (c / "__0_0.distcp").unlink(), "damaged or incomplete"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, said, stopped, pair_data, refused):
    damage(checkpoint(stopped, 10))
    assert said in refused(*pair_data.flags, f"--load={stopped}")


def test_a_path_without_a_checkpoint_is_refused(pair_data, tmp_path, refused):
    assert f"{tmp_path}: no complete checkpoint" in refused(*pair_data.flags, f"--load={tmp_path}")


def test_loading_runs_nothing_that_the_metadata_says(stopped, pair_data, tmp_path, refused):
    (checkpoint(stopped, 10) / ".metadata").write_bytes(pickle.dumps(Calls(Path.touch, tmp_path / "trapped")))
    assert "damaged or incomplete" in refused(*pair_data.flags, f"--load={stopped}")
    assert not (tmp_path / "trapped").exists()


def test_loading_runs_nothing_that_an_entry_says(pair_data, tmp_path, refused, monkeypatch):
    save = checkpoint_writer.save

    def poisoned(state, **how):
        state["optimizer"]["state"]["head.bias"]["step"] = Calls(Path.touch, tmp_path / "trapped")
        return save(state, **how)

    monkeypatch.setattr(checkpoint_writer, "save", poisoned)
    assert pretrain(*pair_data.flags, "--train-iters=1", f"--save={tmp_path / 'run'}") == 0
    assert "damaged or incomplete" in refused(*pair_data.flags, f"--load={tmp_path / 'run'}")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("how", ["--async-save", "--no-async-save"])
def test_a_disk_that_is_full_ends_the_run_and_keeps_the_last_checkpoint(how, stopped, pair_data, monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_writer, "save", full)
    assert pretrain(*pair_data.flags, how, f"--load={stopped}", f"--save={stopped}") == 1
    error = capsys.readouterr().err
    assert re.search(r"step_00000020: the checkpoint cannot be written \(No space left on device\)", error)
    assert (stopped / "status").read_text() == "failed\n"
    assert records(stopped, "end")[-1]["status"] == "failed"
    assert find_checkpoint(stopped) == checkpoint(stopped, 10)


def test_what_a_killed_run_left_is_deleted_by_the_next(stopped, pair_data):
    folder = stopped / "checkpoints"
    for name in (".step_00000013.tmp", ".step_00000005.old", ".step_00000020.77.old"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_text("half")
    (folder / ".latest.77.tmp").symlink_to("step_00000010")
    (folder / ".notes").write_text("the user's own")
    assert pretrain(*pair_data.flags, f"--load={stopped}", f"--save={stopped}") == 0
    assert sorted(os.listdir(folder)) == [".notes", "latest", "step_00000010", "step_00000020"]


def test_saved_tensors_are_finite_and_complete(one_process):
    saved = read_tensors(checkpoint(one_process / "plain"))
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    names = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    trained = names - {"encoder.rotary.inverse_frequencies"}
    moments = {name for name in saved if name.startswith("optimizer.state.")}
    assert moments == {f"optimizer.state.{n}.{part}" for n in trained for part in ("step", "exp_avg", "exp_avg_sq")}
