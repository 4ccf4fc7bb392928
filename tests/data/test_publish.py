"""Several splits get their names together: a failure leaves none, a kill no old one beside a new one."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_selection import TOKENIZER, proteins, write_fasta

from megatron_plm.config.options import Config, DataOptions
from megatron_plm.data import indexed_writer
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.indexed_writer import publish
from megatron_plm.data.pipeline import preprocess
from megatron_plm.data.rearrange import Selection
from megatron_plm.data.splits import parse_splits
from megatron_plm.errors import UserError
from megatron_plm.training.state import open_datasets

SPLITS = parse_splits("train=0.6,valid=0.3,test=0.1")
STEPS = [(os, "replace"), (Path, "unlink"), (indexed_writer, "sync")]


def make(folder: Path, *, seed: int, splits: str | None = None, fold_case: bool = True) -> None:
    chosen = Selection(splits=parse_splits(splits) if splits else SPLITS)
    source = write_fasta(folder / f"{seed}.fasta", proteins(60, seed=seed))
    preprocess([source], folder / "p", TOKENIZER, selection=chosen, force=True, fold_case=fold_case)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("p_*")}


def failing_step(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None], number: int) -> Iterator[int]:
    """While files are published, call `fail` before their renaming, removing or syncing for the number-th time."""
    steps = itertools.count()

    def stepping(real: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            if next(steps) == number:
                fail()
            return real(*args, **kwargs)

        return step

    def stepwise(*args: object) -> None:
        with monkeypatch.context() as patch:
            for owner, name in STEPS:
                patch.setattr(owner, name, stepping(getattr(owner, name)))
            publish(*args)

    monkeypatch.setattr("megatron_plm.data.pipeline.publish", stepwise)
    return steps


def interrupt() -> None:
    raise KeyboardInterrupt


def refuse() -> None:
    raise OSError(13, "Permission denied")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("fail", [interrupt, refuse])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_between_any_two_renames_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, fail: Callable[[], None]
) -> None:
    for number in itertools.count():
        if existing:
            make(tmp_path, seed=1)
        with monkeypatch.context() as patch:
            steps = failing_step(patch, fail, number)
            try:
                make(tmp_path, seed=2)
                break
            except (KeyboardInterrupt, UserError):  # an OSError that is not told would go through
                pass
        assert next(steps) > number
        if existing and number == 0:  # nothing was changed
            assert len(contents(tmp_path)) == 9
        else:
            assert contents(tmp_path) == {}
    assert number > 9
    assert len(contents(tmp_path)) == 9


@pytest.mark.parametrize("existing", [False, True])
def test_killed_between_any_two_renames_no_old_split_opens_and_the_next_run_makes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    make(tmp_path, seed=1)
    old = contents(tmp_path)
    make(tmp_path, seed=2)
    new = contents(tmp_path)
    assert not set(old.values()) & set(new.values())
    for number in itertools.count():
        for name in new:
            (tmp_path / name).unlink()
        if existing:
            make(tmp_path, seed=1)
        child = os.fork()
        if child == 0:
            failing_step(monkeypatch, kill, number)
            make(tmp_path, seed=2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        opened = {name for name in SPLITS.names if opens(tmp_path / f"p_{name}")}
        found = {name: file for name, file in contents(tmp_path).items() if name in new}
        if any(found.get(f"p_{name}.bin") == new[f"p_{name}.bin"] for name in SPLITS.names):
            assert all(found[f"p_{name}.{end}"] == new[f"p_{name}.{end}"] for name in opened for end in ("bin", "idx"))
            described = {name for name in found if name.endswith(".json")}
            assert not described or len(opened) == 3, "a description comes when all datasets are there"
        make(tmp_path, seed=2)
        assert contents(tmp_path) == new, "the next run removes what was left"
    assert number > 9


def opens(prefix: Path) -> bool:
    try:
        return len(IndexedDataset(prefix)) > 0
    except UserError:
        return False


def check(train: Path, valid: Path) -> None:
    open_datasets(Config(data=DataOptions(data_path=(str(train),), valid_data_path=(str(valid),))))


def test_splits_of_different_runs_are_refused_together(tmp_path: Path) -> None:
    make(tmp_path, seed=1)
    check(tmp_path / "p_train", tmp_path / "p_valid")
    make(tmp_path, seed=1, splits="train=0.9,test=0.1")  # the old p_valid stays
    with pytest.raises(UserError, match=r"p_train' and '.*p_valid' are splits of different runs"):
        check(tmp_path / "p_train", tmp_path / "p_valid")
    check(tmp_path / "p_train", tmp_path / "p_test")
    make(tmp_path, seed=1)
    make(tmp_path, seed=1, splits="train=0.9,test=0.1", fold_case=False)  # the same proteins may fall elsewhere
    with pytest.raises(UserError, match=r"p_train' and '.*p_valid' are splits of different runs"):
        check(tmp_path / "p_train", tmp_path / "p_valid")
    make(tmp_path, seed=2, splits="train=0.9,test=0.1")
    make(tmp_path, seed=2)
    (tmp_path / "other").mkdir()
    make(tmp_path / "other", seed=3)
    check(tmp_path / "p_train", tmp_path / "other" / "p_valid")
    for end in ("bin", "idx", "json"):
        (tmp_path / "other" / f"p_valid.{end}").rename(tmp_path / f"p_valid.{end}")
    with pytest.raises(UserError, match="make all splits again, by one command with --split and --force"):
        check(tmp_path / "p_train", tmp_path / "p_valid")
