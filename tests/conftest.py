"""Fixtures that several rooms' tests share."""

import functools
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from sample_proteins import pair_proteins, write_dataset

# Sums over threads come out in another order with another number of them: runs that are compared bit by bit, here and
# in child processes, all have one. (pytest reads this file before anything imports torch.)
os.environ["OMP_NUM_THREADS"] = "1"

# torch logs each call of its checkpoints for debugging, which would bury what a failing test has to say.
logging.disable(logging.DEBUG)

# The same examples in every run, and none fails for being slow: what takes its time is the machine.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


class PairData(NamedTuple):
    """A training and a validation dataset, and the flags of a run of a second or two on them."""

    train: Path
    valid: Path

    @property
    def flags(self) -> list[str]:
        return [
            "--num-layers=2", "--hidden-size=32", "--num-attention-heads=2", "--seq-length=64", "--packing-window=64",
            "--micro-batch-size=4", "--global-batch-size=8", "--lr=3e-3", "--min-lr=1e-3", "--lr-warmup-iters=4",
            "--train-iters=20", "--log-interval=1", "--eval-interval=10", "--eval-iters=4", "--save-interval=10",
            f"--data-path={self.train}", f"--valid-data-path={self.valid}",
        ]  # fmt: skip


@pytest.fixture(scope="session")
def pair_data(tmp_path_factory) -> PairData:
    folder = tmp_path_factory.mktemp("pairs")
    return PairData(
        write_dataset(folder / "train", pair_proteins(400, seed=1)),
        write_dataset(folder / "valid", pair_proteins(60, seed=2)),
    )


DROPOUT = ("--hidden-dropout=0.2", "--attention-dropout=0.2")


@pytest.fixture(scope="session")
def one_process(pair_data, tmp_path_factory) -> Path:
    """A folder of runs in one process, by name; each is 20 steps with checkpoints at 10 and 20."""
    from pretraining_runs import run_each

    folder = tmp_path_factory.mktemp("one_process")
    codes = run_each(
        {
            "plain": pair_data.flags,
            "accumulate_2": [*pair_data.flags, "--micro-batch-size=2"],
            "accumulate_1": [*pair_data.flags, "--micro-batch-size=1"],
            "recompute": [*pair_data.flags, "--recompute-granularity=full"],
            "bf16": [*pair_data.flags, "--bf16"],
            "dropout": [*pair_data.flags, *DROPOUT],
            "dropout_recompute": [*pair_data.flags, *DROPOUT, "--recompute-granularity=full"],
        },
        folder,
    )
    assert set(codes.values()) == {0}
    return folder


class TwoProcesses(NamedTuple):
    """The runs of two processes by name, as in `one_process`, and what each process measured."""

    folder: Path
    probes: list[dict[str, Any]]


@pytest.fixture(scope="session")
def two_processes(pair_data, one_process, tmp_path_factory) -> TwoProcesses:
    """Runs in two processes that share a model by FSDP2, started once for all tests (two_process_work.py)."""
    import torch
    from pretraining_runs import in_processes
    from two_process_work import GRADIENTS, work

    folder = tmp_path_factory.mktemp("two_processes")
    in_processes(2, functools.partial(work, pair_data.flags, one_process), folder, groups=12 + len(GRADIENTS))
    probes = [torch.load(folder / f"probe_{rank}.pt", weights_only=True) for rank in range(2)]
    return TwoProcesses(folder, probes)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name tests by no gzip data, which tell the time: processes that share the tests must find the same names."""
    return argname if isinstance(val, bytes) and val.startswith(b"\x1f\x8b") else None
