"""`embed` takes a directory of any format without being told which, and gives the numbers of the native one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from convert_sample import CARRIED, convert, native_checkpoint
from pretraining_runs import pretrain
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.convert.pretrained import FORMATS, detect_format
from megatron_plm.errors import run_command
from megatron_plm.inference.embed import main as embed

PROTEINS = {"a": "MKTAYIAKQRQISFVKSH", "b": "W", "c": "ACDEFGHIKLMNPQRSTVWY" * 2}
PAIRS = {name: options for options, names in reversed(CARRIED) for name in names if name != "native"}


@pytest.fixture
def vectors(tmp_path: Path) -> Callable[[Path], np.ndarray]:
    (tmp_path / "in.fasta").write_text("".join(f">{name}\n{letters}\n" for name, letters in PROTEINS.items()))

    def vectors_of(checkpoint: Path) -> np.ndarray:
        output = checkpoint.with_suffix(".npz")
        argv = ["--checkpoint", checkpoint, "--input", tmp_path / "in.fasta", "--output", output, "--layers", 0, 1, 2]
        assert run_command(embed, [*map(str, argv), "--pooling", "mean", "residues"]) == 0
        with np.load(output) as file:
            return np.concatenate([file[f"{kind}_layer{n}"] for kind in ("mean", "residues") for n in range(3)])

    return vectors_of


def test_every_format_is_looked_at() -> None:
    assert {"native", *PAIRS} == FORMATS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_a_directory_of_this_format_gives_the_numbers_of_the_native_one(
    name: str, tmp_path: Path, vectors: Callable[[Path], np.ndarray]
) -> None:
    native_checkpoint(tmp_path / "native", PAIRS[name])
    assert convert("native", name, tmp_path / "native", tmp_path / "other") == 0
    assert detect_format(tmp_path / "other") == name
    expected = vectors(tmp_path / "native")
    assert np.ptp(expected) > 0.1
    np.testing.assert_array_equal(vectors(tmp_path / "other"), expected)  # float32 all the way: the same bits


def test_a_run_gives_the_numbers_of_the_checkpoint_that_it_is_converted_to(
    tmp_path: Path, vectors: Callable[[Path], np.ndarray]
) -> None:
    write_dataset(tmp_path / "data", pair_proteins(40, seed=1))
    shape = ["--num-layers=2", "--hidden-size=16", "--num-attention-heads=2", "--seq-length=64"]
    sizes = ["--micro-batch-size=4", "--global-batch-size=4", "--train-iters=1", "--lr-warmup-iters=0"]
    assert pretrain(*shape, *sizes, f"--data-path={tmp_path / 'data'}", f"--save={tmp_path / 'run'}") == 0
    assert convert("native", "huggingface", tmp_path / "run", tmp_path / "other") == 0
    expected = vectors(tmp_path / "other")
    latest = tmp_path / "run" / "checkpoints" / "latest"
    for checkpoint in (tmp_path / "run", latest.resolve()):
        np.testing.assert_array_equal(vectors(checkpoint), expected)
