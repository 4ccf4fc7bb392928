"""One run at a time writes in a folder, and none over another's checkpoints."""

import os
import shutil

from pretraining_runs import checkpoint, column, pretrain, read_tensors, same_bits

from megatron_plm.files import exclusive


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
