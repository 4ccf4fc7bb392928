"""The attention benchmark gives every side the same work, and sees a wrong one."""

import argparse
import json

import numpy as np
import pytest
import torch
from processes import REPOSITORY

from megatron_plm.benchmark import attention
from megatron_plm.benchmark.command import main
from megatron_plm.errors import run_command

FASTA = str(REPOSITORY / "examples/data/pretrain_valid.fasta.gz")


def test_the_command_compares_all_sides_of_this_machine(tmp_path, capsys):
    output = tmp_path / "attention.json"
    flags = ["--quick", "--rounds", "1", "--rows", "1", "--seq-length", "512", "--check", "--output", str(output)]
    assert main(["attention", "--input", FASTA, "--device", "cpu", *flags]) == 0
    result = json.loads(output.read_text())
    figures = result["presets"]["esm2-8m"]
    assert (figures["heads"], figures["head_size"]) == (20, 16)
    assert list(figures["sides"]) == ["ours", "one_by_one", "padded", "dense"]
    for side in figures["sides"].values():
        assert 0 < max(side["errors"].values()) < 1e-5
        assert side["forward"][0] > 0
        assert side["both"][0] > 0
    assert 300 < result["num_tokens"] <= 512 < result["padded_tokens"]
    printed = capsys.readouterr()
    assert "packed rows, dense mask" in printed.out
    assert "esm2-8m, forward and backward: ours" in printed.err


def test_rows_are_packed_of_the_files_proteins_and_nearly_full():
    options = argparse.Namespace(input=FASTA, seq_length=1024, seed=3)
    lengths = attention.protein_lengths(options)
    assert len(lengths) == 500
    assert max(lengths) == 1024  # longer ones are cropped
    rows = attention.packed_lengths(lengths, 4, options)
    assert all(900 < sum(row) <= 1024 for row in rows)
    assert {n for row in rows for n in row} <= set(lengths)


def test_a_side_that_lets_proteins_see_each_other_is_seen_by_its_error():
    sides = attention.build_sides([[5, 9], [7]], (2, 8), 16, torch.device("cpu"), torch.float32, seed=0)
    wrong = sides["dense"]._replace(attend=torch.nn.functional.scaled_dot_product_attention)
    errors = attention.errors_of({**sides, "wrong": wrong}, [5, 9, 7])
    assert errors.keys() == {"ours", "one_by_one", "padded", "dense", "wrong"}
    assert all(max(errors[side].values()) < 1e-6 for side in sides)
    assert min(errors["wrong"].values()) > 0.1
    found = {"x": {"sides": {"ours": {"errors": errors["wrong"]}}}}
    assert attention.missed({"checks": attention._checks(found, torch.float32)}) == ["x"]
    found = {"x": {"sides": {"ours": {"errors": {"output": 1e-7, "d query": float("nan")}}}}}
    assert attention.missed({"checks": attention._checks(found, torch.float32)}) == ["x"]


def test_every_side_holds_the_same_values():
    sides = attention.build_sides([[5, 9], [7]], (2, 8), 16, torch.device("cpu"), torch.float32, seed=0)
    tokens = [each.by_token(each.inputs[1]).detach().numpy() for each in sides.values()]
    assert all(np.array_equal(tokens[0], other) for other in tokens[1:])
    assert sides["padded"].inputs[0].shape == (3, 2, 9, 8)
    assert sides["dense"].inputs[0].shape == (2, 2, 16, 8)


def test_a_gpu_that_is_not_there_is_told_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_command(main, ["attention", "--input", FASTA, "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpus_sides_agree():
    sides = attention.build_sides([[50, 90], [70]], (20, 64), 256, torch.device("cuda"), torch.bfloat16, seed=0)
    assert "padded_flash" in sides
    errors = attention.errors_of(sides, [50, 90, 70])
    assert all(max(each.values()) < 2e-2 for each in errors.values())
