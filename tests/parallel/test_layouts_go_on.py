"""Runs at one layout, saved and gone on with at another: the same losses, weights and validation as in one process."""

import functools
from pathlib import Path

import pytest
from layout_work import (
    BEGIN,
    GO_ON,
    IMPORTED,
    LAYOUTS,
    OTHER_MODELS,
    OTHER_VOCABULARY,
    RUN,
    other_vocabulary,
    planned,
    work,
)
from pretraining_runs import (
    checkpoint,
    column,
    in_processes,
    largest_relative_difference,
    pretrain,
    read_tensors,
    records,
)
from safetensors.torch import load_file
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.benchmark.parity_cases import MODELS
from megatron_plm.convert.command import main as converter
from megatron_plm.errors import run_command

# Only the order of additions differs; see test_two_processes.py.
LOSS, GRAD_NORM, WEIGHTS = 1e-5, 1e-4, 1e-4


@pytest.fixture(scope="module")
def alone(pair_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert pretrain(*pair_data.flags, *RUN, f"--save={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def imported(alone, tmp_path_factory) -> Path:
    """The one process's weights at step 5, out to Hugging Face's format and back."""
    folder = tmp_path_factory.mktemp("imported")
    convert("native", "huggingface", checkpoint(alone, 5), folder / "huggingface")
    convert("huggingface", "native", folder / "huggingface", folder / "native")
    return folder / "native"


@pytest.fixture(scope="module")
def folder(pair_data, alone, imported, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_dataset(folder / "iupac", pair_proteins(60, seed=3), tokenizer="tape-iupac")
    runs = planned(alone, imported, folder)
    in_processes(4, functools.partial(work, pair_data.flags, runs), folder, groups=len(runs), seconds=290)
    return folder


def convert(source: str, target: str, path: Path, output: Path) -> None:
    assert (
        run_command(converter, ["--from", source, "--to", target, "--input", str(path), "--output", str(output)]) == 0
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_saves_and_validates_as_one_process(folder, alone, name):
    for quantity, tolerance in (("loss", LOSS), ("grad_norm", GRAD_NORM)):
        ours, theirs = (column(run, "train", quantity) for run in (folder / name, alone))
        assert len(ours) == 10
        assert ours == pytest.approx(theirs, rel=tolerance)
    for quantity in ("tokens", "consumed_tokens", "fill", "lr", "cropped", "epochs"):
        assert column(folder / name, "train", quantity) == column(alone, "train", quantity)
    for ours, theirs in zip(records(folder / name, "valid"), records(alone, "valid"), strict=True):
        assert ours["num_labels"] == theirs["num_labels"]
        for quantity in ("loss", "perplexity", "accuracy", "unigram_perplexity"):
            assert ours[quantity] == pytest.approx(theirs[quantity], rel=1e-5)
    tensors, expected = (read_tensors(checkpoint(run)) for run in (folder / name, alone))
    for prefix in ("model.", "optimizer."):
        assert largest_relative_difference(tensors, expected, prefix) < WEIGHTS


@pytest.mark.parametrize("source", GO_ON)
@pytest.mark.parametrize("target", GO_ON)
def test_every_layout_goes_on_where_every_other_stopped(folder, alone, source, target):
    run = folder / f"{target}_from_{source}"
    assert column(run, "train", "step") == [6, 7, 8, 9, 10]
    assert column(run, "train", "loss") == pytest.approx(column(alone, "train", "loss")[5:], rel=LOSS)
    assert column(run, "train", "grad_norm") == pytest.approx(column(alone, "train", "grad_norm")[5:], rel=GRAD_NORM)


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_other_models_go_on_at_another_layout_too(folder, model, pair_data, tmp_path):
    assert pretrain(*pair_data.flags, *RUN, *MODELS[model].split(), f"--save={tmp_path}") == 0
    run = folder / f"{model}_on"
    for quantity, tolerance in (("loss", LOSS), ("grad_norm", GRAD_NORM)):
        expected = column(tmp_path, "train", quantity)[5:]
        assert column(run, "train", quantity) == pytest.approx(expected, rel=tolerance)
    assert column(run, "valid", "loss") == pytest.approx(column(tmp_path, "valid", "loss")[1:], rel=1e-5)
    tensors, expected = (read_tensors(checkpoint(path)) for path in (run, tmp_path))
    for prefix in ("model.", "optimizer."):
        assert largest_relative_difference(tensors, expected, prefix) < WEIGHTS


def test_four_stages_with_a_layout_of_their_own_go_on_from_one_process(folder, alone):
    run = folder / "pp4_from_one"
    assert column(run, "train", "loss") == pytest.approx(column(alone, "train", "loss")[5:], rel=LOSS)
    tensors, expected = (read_tensors(checkpoint(path)) for path in (run, alone))
    assert largest_relative_difference(tensors, expected, "model.") < WEIGHTS
    said = (folder / "output_0.txt").read_text()
    assert "layout: pp 4, dp 1\npipeline 1f1b: blocks of the stages 0, 2, 3, 0; 4 micro-batches, bubble 43%\n" in said
    assert " loss " not in (folder / "output_1.txt").read_text()


def test_one_process_goes_on_where_every_layout_stopped(folder, alone, pair_data, tmp_path):
    for name in LAYOUTS:
        load = f"--load={checkpoint(folder / name, 5)}"
        assert pretrain(*pair_data.flags, *RUN, load, f"--save={tmp_path / name}") == 0
        losses = column(tmp_path / name, "train", "loss")
        assert losses == pytest.approx(column(alone, "train", "loss")[5:], rel=LOSS)


@pytest.mark.parametrize("name", ["tp_pp", "pp_zbv", "hsdp"])
def test_what_a_layout_exports_is_what_one_process_exports(folder, alone, name, tmp_path):
    for run in (folder / name, alone):
        convert("native", "huggingface", run, tmp_path / run.name)
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in (name, alone.name))
    assert largest_relative_difference(ours, theirs, "") < WEIGHTS
    configurations = [(tmp_path / run / "config.json").read_bytes() for run in (name, alone.name)]
    assert configurations[0] == configurations[1]


@pytest.mark.parametrize("name", IMPORTED)
def test_an_imported_checkpoint_begins_a_layouts_run_as_it_begins_one_process(folder, alone, imported, name, pair_data):
    run = folder / "one_imported"
    if not run.exists():
        begun = pretrain(*pair_data.flags, *RUN, *BEGIN, f"--pretrained-checkpoint={imported}", f"--save={run}")
        assert begun == 0
    losses = column(run, "train", "loss")
    assert column(folder / f"{name}_imported", "train", "loss") == pytest.approx(losses, rel=LOSS)
    assert losses[0] < column(alone, "train", "loss")[0] - 0.1, "it had learnt something"


def test_rows_of_another_vocabulary_go_by_token_at_every_layout(folder, alone, pair_data, tmp_path):
    assert pretrain(*pair_data.flags, *RUN, *other_vocabulary(folder, alone), f"--save={tmp_path}") == 0
    for name in OTHER_VOCABULARY:
        run = folder / f"{name}_other_vocabulary"
        assert column(run, "train", "loss") == pytest.approx(column(tmp_path, "train", "loss"), rel=LOSS)
        tensors, expected = (read_tensors(checkpoint(path)) for path in (run, tmp_path))
        assert largest_relative_difference(tensors, expected, "model.") < WEIGHTS


def test_a_checkpoint_of_another_shape_is_refused_once(folder):
    said = [(folder / f"output_{rank}.txt").read_text() for rank in range(4)]
    assert sum(text.count("--num-layers was 5 there and is 6 here") for text in said) == 1
