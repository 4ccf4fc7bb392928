"""One run at a time writes in a folder, and none over another's checkpoints."""

import contextlib
import itertools
import os
import shutil

import numpy as np
import torch
from pretraining_runs import checkpoint, column, pretrain, read_tensors, records, same_bits
from sample_proteins import write_dataset

from megatron_plm.config.load import load_config
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.files import exclusive
from megatron_plm.parallel.mesh import World
from megatron_plm.tokenizers import get_tokenizer
from megatron_plm.training import run_directory
from megatron_plm.training.state import build_run, open_datasets


def test_one_command_starts_a_run_and_goes_on_with_it(pair_data, one_process, tmp_path, capsys):
    """As a cluster's script has it, which is submitted again after a stop: also one before the first checkpoint."""
    again = [*pair_data.flags, f"--load={tmp_path}", f"--save={tmp_path}"]
    assert pretrain(*again, "--train-iters=10", "--save-interval=10") == 0
    assert f"no checkpoint in {tmp_path} yet" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints")  # as if killed before it was saved
    assert pretrain(*again) == 0
    assert column(tmp_path, "train", "step") == [*range(1, 11), *range(1, 21)]
    assert same_bits(read_tensors(checkpoint(tmp_path)), read_tensors(checkpoint(one_process / "plain")))


def test_a_run_that_saved_no_checkpoint_may_be_started_again(pair_data, stopped):
    shutil.rmtree(stopped / "checkpoints")
    assert pretrain(*pair_data.flags, "--train-iters=1", f"--save={stopped}") == 0
    assert checkpoint(stopped).resolve() == checkpoint(stopped, 1)


def test_two_runs_at_once_do_not_write_in_one_folder(pair_data, tmp_path, refused):
    with exclusive(tmp_path / "lock"):
        assert "another run is writing there" in refused(*pair_data.flags, f"--save={tmp_path}")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_holds_a_run_is_not_written_over(stopped, pair_data, refused):
    before = (stopped / "metrics.jsonl").read_bytes()
    said = refused(*pair_data.flags, f"--save={stopped}")
    assert f"--save {stopped}: holds a run already; go on with it by --load {stopped}" in said
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_two_runs_are_not_mixed_and_newer_checkpoints_not_overwritten(stopped, one_process, pair_data, refused):
    elsewhere = f"--load={one_process / 'plain'}"
    assert "is not its latest checkpoint" in refused(*pair_data.flags, f"--save={stopped}", elsewhere)
    older = f"--load={checkpoint(one_process / 'plain', 10)}"
    assert "is not its latest checkpoint" in refused(*pair_data.flags, f"--save={one_process / 'plain'}", older)


def test_a_run_directory_below_a_file_is_refused(pair_data, tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} cannot be written to" in refused(
        *pair_data.flags, f"--save={tmp_path / 'file' / 'run'}"
    )


def test_only_the_newest_checkpoints_are_kept(pair_data, tmp_path):
    flags = [*pair_data.flags, "--save-interval=1", "--keep-last=2", f"--save={tmp_path}"]
    assert pretrain(*flags, "--train-iters=5") == 0
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000004", "step_00000005"]
    assert pretrain(*flags, "--train-iters=6", f"--load={tmp_path}") == 0
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000005", "step_00000006"]
    assert checkpoint(tmp_path).resolve() == checkpoint(tmp_path, 6)


def test_a_finished_run_has_nothing_left_to_do(one_process, pair_data, tmp_path, refused, capsys):
    finished = tmp_path / "finished"
    shutil.copytree(one_process / "plain", finished, symlinks=True)
    assert pretrain(*pair_data.flags, f"--load={finished}", f"--save={finished}") == 0
    assert f"wrote {finished}\n" in capsys.readouterr().out
    assert column(finished, "train", "step") == list(range(1, 21))
    said = refused(*pair_data.flags, f"--load={finished}", f"--save={tmp_path / 'new'}")
    assert f"--load {checkpoint(finished).resolve()}: it is at step 20 already" in said
    assert "raise --train-iters above its 20" in said


def test_where_the_newest_step_was_deleted_the_run_goes_on_from_the_one_before(one_process, pair_data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(one_process / "plain", run, symlinks=True)
    shutil.rmtree(checkpoint(run, 20))
    assert not checkpoint(run).exists()
    assert pretrain(*pair_data.flags, f"--load={run}", f"--save={run}") == 0
    assert same_bits(read_tensors(checkpoint(run)), read_tensors(checkpoint(one_process / "plain")))
    assert column(run, "train", "step") == [*range(1, 21), *range(11, 21)]


def test_checkpoints_without_their_link_are_still_a_run(stopped, pair_data, refused):
    """As after a kill between the first checkpoint and its link."""
    (stopped / "checkpoints" / "latest").unlink()
    assert "holds a run already" in refused(*pair_data.flags, f"--save={stopped}")
    assert "holds a run already" in refused(*pair_data.flags, f"--save={stopped}", "--load=")


def test_a_link_that_a_copy_made_a_folder_is_refused_by_name(stopped, pair_data, refused):
    latest = stopped / "checkpoints" / "latest"
    latest.unlink()
    shutil.copytree(checkpoint(stopped, 10), latest)
    flags = [*pair_data.flags, f"--save={stopped}", f"--load={stopped}"]
    assert "is not its latest checkpoint" in refused(*flags[:-1], f"--load={checkpoint(stopped, 10)}")
    assert f"{latest}: is a folder and should be a link" in refused(*flags)
    shutil.rmtree(latest)
    assert pretrain(*flags) == 0


def test_a_run_that_is_refused_leaves_no_folder(one_process, pair_data, tmp_path, refused):
    save = f"--save={tmp_path / 'new' / 'run'}"
    assert "--hidden-size was 32" in refused(
        *pair_data.flags, "--hidden-size=64", save, f"--load={one_process / 'plain'}"
    )
    assert os.listdir(tmp_path) == []


def test_the_directory_is_checked_again_once_it_is_held(stopped, pair_data, tmp_path, refused, monkeypatch):
    """Another run may save its first checkpoint between the check and the lock."""
    late = tmp_path / "late"

    @contextlib.contextmanager
    def slow(lock):
        shutil.copytree(stopped / "checkpoints", late / "checkpoints", symlinks=True)
        with exclusive(lock) as locked:
            yield locked

    monkeypatch.setattr(run_directory, "exclusive", slow)
    assert "holds a run already" in refused(*pair_data.flags, f"--save={late}")
    assert sorted(os.listdir(late)) == ["checkpoints"]


def test_the_saved_configuration_starts_the_same_run_anew(stopped, one_process, pair_data, tmp_path):
    assert pretrain(*pair_data.flags, f"--load={stopped}", f"--save={stopped}") == 0
    for config in (stopped / "config.toml", checkpoint(stopped) / "config.toml"):
        assert "\nload = " not in config.read_text()
    assert pretrain("--config", stopped / "config.toml", f"--save={tmp_path / 'new'}", "--train-iters=2") == 0
    losses = column(one_process / "plain", "train", "loss")
    assert column(tmp_path / "new", "train", "loss")[0] == losses[0]


def test_each_start_says_where_it_begins_and_how_it_computes(stopped, pair_data):
    assert pretrain(*pair_data.flags, f"--load={stopped}", f"--save={stopped}") == 0
    first, second = records(stopped, "start")
    assert (first["step"], second["step"]) == (0, 10)
    assert first["kernels"].startswith("attention: all proteins at once on the CPU, in float32 (")
    assert "; linear maps: " in first["kernels"]
    assert first["command"].startswith("launch/pretrain.sh --num-layers=2")


def test_proteins_longer_than_a_row_are_counted(pair_data, tmp_path):
    """All rows of an epoch, of which rows of 48 tokens cannot hold every protein; and what a run writes of it."""
    longer = int((IndexedDataset(pair_data.train).lengths + 2 > 48).sum())
    assert 0 < longer < len(IndexedDataset(pair_data.train))
    flags = [*pair_data.flags, "--seq-length=48", "--train-iters=3", f"--save={tmp_path}"]
    config, _ = load_config(flags)
    loader = build_run(config, World(0, 1, torch.device("cpu"), None), open_datasets(config)).train_loader

    def cropped(step):
        return sum(batch.num_cropped for batch in step.micro_batches)

    assert sum(map(cropped, loader.first_epoch(10**6))) == longer
    assert pretrain(*flags) == 0
    assert column(tmp_path, "train", "cropped") == [*map(cropped, itertools.islice(loader.steps(loader.start()), 3))]


def test_data_without_a_letter_to_predict_ends_the_run(pair_data, tmp_path, capsys):
    unknown = [np.full(30, get_tokenizer("esm2").unk_id, dtype=np.uint8)] * 40
    prefix = write_dataset(tmp_path / "unknown", unknown)
    assert pretrain(*pair_data.flags, f"--data-path={prefix}", f"--save={tmp_path / 'run'}") == 1
    assert f"--data-path {prefix}: a whole batch holds no letter that the tokenizer knows" in capsys.readouterr().err
