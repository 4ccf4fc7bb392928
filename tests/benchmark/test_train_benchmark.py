"""The training benchmark measures what it says, with a real peer."""

import argparse
import contextlib
import copy
import json
import sys
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_plm.benchmark import train
from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.device import gpu_in_table, quick_values
from megatron_plm.benchmark.train import table
from megatron_plm.benchmark.train_peer import packed_step, padded_batches
from megatron_plm.config.load import config_from_values
from megatron_plm.config.options import ModelOptions
from megatron_plm.config.presets import PRESETS
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.preprocess import preprocess
from megatron_plm.errors import run_command
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.plan.hardware import GPUS
from megatron_plm.tokenizers import get_tokenizer
from megatron_plm.training.state import open_datasets

TOKENIZER, GPU = get_tokenizer("esm2"), torch.device("cuda")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 120)
    records = [f">p{i}\n{''.join(rng.choice(list('ACDEFGHIKLMNPQRSTVWY'), n))}\n" for i, n in enumerate(lengths)]
    (folder / "p.fasta").write_text("".join(records))
    preprocess([folder / "p.fasta"], folder / "p", TOKENIZER)
    return folder / "p"


def peer_epoch(dataset, kind, batch_size=8, seq_length=300):
    options = argparse.Namespace(seed=1, seq_length=seq_length)
    batches = padded_batches(IndexedDataset(dataset), TOKENIZER, kind, batch_size, options)
    return list(islice(batches, 120 // batch_size))


def test_the_peers_useful_tokens_are_those_of_the_proteins(dataset):
    expected = int(np.minimum(IndexedDataset(dataset).lengths + 2, 300).sum())
    for kind in ("padded", "bucketed"):
        assert sum(int(mask.sum()) for _, mask, _ in peer_epoch(dataset, kind)) == expected


def test_bucketing_leaves_less_padding_than_random_batches(dataset):
    def padding(kind):
        return np.mean([1 - float(mask.float().mean()) for _, mask, _ in peer_epoch(dataset, kind)])

    assert padding("bucketed") < 0.1 < padding("padded")


def test_the_peers_labels_are_15_percent_of_residues_and_never_padding(dataset):
    epoch = peer_epoch(dataset, "padded")
    chosen = sum(int((labels >= 0).sum()) for _, _, labels in epoch)
    useful = sum(int(mask.sum()) for _, mask, _ in epoch)
    assert 0.12 < chosen / useful < 0.17
    for tokens, mask, labels in epoch:
        assert (labels[mask == 0] == -100).all()
        assert (tokens[mask == 0] == TOKENIZER.pad_id).all()


QUICK = ["--rounds", "2", "--seconds", "0.2", "--peer-batch-sizes", "4", "--presets", "tiny", "--seq-length", "128"]


def test_the_command_writes_ratios_of_this_run(dataset, tmp_path, capsys):
    output = tmp_path / "train.json"
    assert main(["train", "--data-path", str(dataset), *QUICK, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert list(result["presets"]) == ["tiny"]
    figures = result["presets"]["tiny"]
    speeds = figures["tokens_per_second"]
    assert list(speeds) == ["ours", "padded", "bucketed", "packed"]
    for kind in ("padded", "bucketed", "packed"):
        ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[kind], strict=True)]
        assert figures["ratios"][kind]["median"] == pytest.approx(sum(ratios) / 2)
    assert figures["mfu"]["ours"] is None, "a CPU's peak is not known"
    assert result["machine"]["processor"]
    assert result["checks"] == {}, "the bars are for the 8M and 35M shapes"
    printed = capsys.readouterr()
    assert "EsmForMaskedLM, random batches of 4" in printed.out
    assert "attention by a function of ours, through transformers' AttentionInterface" in printed.out
    lines = printed.err.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("round")] == ["round 1 of 2", "round 2 of 2"]
    assert len([line for line in lines if " batches of 4: " in line or " length-bucketed of 4: " in line]) == 2


def test_one_side_alone_and_its_memory(dataset, tmp_path):
    output = tmp_path / "train.json"
    flags = [*QUICK, "--sides", "ours", "--memory", "--dtype", "bfloat16", "--output", str(output)]
    assert main(["train", "--data-path", str(dataset), *flags]) == 0
    result = json.loads(output.read_text())
    figures = result["presets"]["tiny"]
    assert (result["dtype"], figures["ratios"]) == ("bfloat16", {})
    assert 100e6 < figures["peak_memory"]["ours"] < 5e9
    # By hand: 2 layers of hidden size 64, matrices 12 D^2; half of the tokens' attention lengths squared; the head.
    lengths = np.minimum(IndexedDataset(dataset).lengths + 2, 128)
    attended = (lengths**2).sum() / lengths.sum()
    expected = 2 * (6 * 12 * 64**2 + 12 * 64 * attended) + 0.15 * 6 * 64 * (64 + 33)
    assert figures["flops_per_token"] == pytest.approx(expected)


def test_the_side_of_the_fused_ops_runs_them(dataset, tmp_path, monkeypatch):
    built = []
    build_run = train.build_run
    monkeypatch.setattr(
        train, "build_run", lambda *args, **kwargs: (built.append(args[0]), build_run(*args, **kwargs))[1]
    )
    flags = [*QUICK, "--sides", "ours", "fused", "--output", str(tmp_path / "train.json")]
    assert main(["train", "--data-path", str(dataset), *flags]) == 0
    assert [config.training.fused_kernels for config in built] == [False, True]
    assert json.loads((tmp_path / "train.json").read_text())["presets"]["tiny"]["ratios"]["fused"]["median"] > 0


def test_other_packages_kernels_reach_no_bar_for_ours(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    found = {"esm2-650m": {"ratios": {}, "mfu": {"ours": 0.3, "fused_compiled": 0.44, "apex": 0.9, "padded": 0.9}}}
    checks = train._checks(found, torch.device("cuda"))
    assert checks["esm2-650m mfu"]["value"] == pytest.approx(44)
    result = {"checks": checks, "presets": {"esm2-650m": {"failed": {"fused": "why"}}}}
    assert train.missed(result) == ["esm2-650m mfu", "esm2-650m fused"]


def test_a_side_that_fails_on_a_gpu_loses_no_other(dataset, tmp_path, monkeypatch, capsys):
    """The sides one after the other, as on a GPU; what measures each is put in their place."""

    def alone(preset, side):
        if side == "compiled":
            raise RuntimeError("backend='inductor' raised:\n  no such kernel")
        preset._sizes[side] = 4
        return [100.0, 200.0], 5

    monkeypatch.setattr(train._Preset, "_alone", alone)
    monkeypatch.setattr(train, "chosen_device", lambda _: GPU)
    monkeypatch.setattr(train, "require_sides", lambda *_: None)
    monkeypatch.setattr(train, "gpu_here", lambda _: GPUS["h200"])
    monkeypatch.setattr(train, "free_memory", lambda _: None)
    monkeypatch.setattr(train, "joined_world", lambda **_: contextlib.nullcontext(SimpleNamespace(device=GPU)))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H200")
    output, sides = tmp_path / "train.json", ["--sides", "ours", "compiled", "fused"]
    assert main(["train", "--data-path", str(dataset), *QUICK, *sides, "--output", str(output), "--check"]) == 1
    result = json.loads(output.read_text())
    figures = result["presets"]["tiny"]
    assert figures["failed"] == {"compiled": "RuntimeError: backend='inductor' raised: no such kernel"}
    assert list(figures["tokens_per_second"]) == list(figures["mfu"]) == ["ours", "fused"]
    assert result["missed"] == ["tiny compiled"]
    printed = capsys.readouterr()
    assert "tiny, compiled failed: RuntimeError" in printed.err
    assert "tiny, fused: MFU 0.0 %" in printed.err


def test_micro_batches_make_a_step_of_ours_larger(dataset, tmp_path, monkeypatch):
    built = []
    build_run = train.build_run
    monkeypatch.setattr(
        train, "build_run", lambda *args, **kwargs: (built.append(args[0]), build_run(*args, **kwargs))[1]
    )
    flags = [*QUICK, "--sides", "ours", "--rows", "2", "--micro-batches", "3", "--output", str(tmp_path / "train.json")]
    assert main(["train", "--data-path", str(dataset), *flags]) == 0
    assert [(c.training.micro_batch_size, c.training.global_batch_size) for c in built] == [(2, 6)]


def test_the_bars_are_those_of_the_issue():
    found = {
        preset: {"ratios": {"padded": {"median": 2.49, "bar": 2.5}, "packed": {"median": 1.0, "bar": None}}, "mfu": {}}
        for preset in ("esm2-8m", "esm2-35m")
    }
    checks = train._checks(found, torch.device("cpu"))
    assert train.missed({"checks": checks, "presets": {}}) == ["esm2-8m padded", "esm2-35m padded"]
    assert train.BARS == {"padded": 2.5, "bucketed": 1.5}
    assert train.MFU_BARS == {"esm2-650m": 45.0, "esm2-3b": 52.0}


@pytest.mark.parametrize(
    ("name", "gigabytes", "bf16_tera"),
    [
        ("NVIDIA H200", 150.8, 989),
        ("NVIDIA H100 80GB HBM3", 85, 989),
        ("NVIDIA H100 PCIe", 85, None),
        ("NVIDIA A100-SXM4-80GB", 85, 312),
        ("NVIDIA A100-SXM4-40GB", 42.3, 312),
        ("NVIDIA L4", 24, 121),
        ("NVIDIA L40S", 48, 362),
        ("NVIDIA GeForce RTX 4090", 24, None),
        ("NVIDIA L40", 48, None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_name_and_memory(name, gigabytes, bf16_tera):
    gpu = gpu_in_table(name, gigabytes * 1e9)
    assert (gpu and gpu.bf16_flops) == (bf16_tera and bf16_tera * 1e12)


def test_the_packed_peer_computes_each_protein_as_if_alone(dataset):
    """transformers' own padded batch of the same tokens, one protein a row, gives the same loss."""
    from transformers import AutoModelForMaskedLM

    values = {"data_path": (str(dataset),), "seq_length": 128, "num_workers": 0, "token_dropout": False}
    config = config_from_values({**PRESETS["tiny"], **values, "micro_batch_size": 2, "global_batch_size": 2})
    datasets = open_datasets(config)
    losses = []

    def forward(self, **inputs):
        losses.append(self._model(**inputs).loss.item())
        cuts = inputs["cu_seq_lens_q"].tolist()
        parts = [
            {name: inputs[name][0, begin:end] for name in ("input_ids", "labels")} for begin, end in pairwise(cuts)
        ]
        rows = {
            name: torch.nn.utils.rnn.pad_sequence([part[name] for part in parts], True, -100 if name == "labels" else 1)
            for name in ("input_ids", "labels")
        }
        lengths = torch.tensor([len(part["labels"]) for part in parts])
        mask = (torch.arange(rows["labels"].shape[1]) < lengths[:, None]).long()
        padded = AutoModelForMaskedLM.from_config(copy.deepcopy(self._model.config), attn_implementation="sdpa").train()
        padded.load_state_dict(self._model.state_dict())
        losses.append(padded(**rows, attention_mask=mask).loss.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_plm.benchmark.train_peer._Trainer.step", forward)
        tokens = packed_step(config, datasets, torch.device("cpu"))()
    assert 200 < tokens <= 256
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_quick_values_fill_every_parameter():
    options = ModelOptions(num_layers=1, hidden_size=64, num_attention_heads=4)
    model = MaskedLanguageModel(options, TOKENIZER)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    quick_values(model, options, 1, piece=lambda parameter: (parameter, (0,) * parameter.dim()))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.encoder.embedding.tokens.weight.std().item() == pytest.approx(options.init_method_std, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rounds", "0"], "argument --rounds: '0' is not a whole number of 1 or more"),
        (["--peer-batch-sizes", "4", "0"], "argument --peer-batch-sizes: '0' is not a whole number"),
        (["--rows", "-1"], "argument --rows: '-1' is not a whole number"),
        (["--seq-length", "x"], "argument --seq-length: 'x' is not a whole number"),
        (["--seconds", "0"], "argument --seconds: '0' is not a number of seconds above 0"),
        (["--seconds", "nan"], "argument --seconds: 'nan' is not"),
        (["--seconds", "soon"], "argument --seconds: 'soon' is not"),
        (["--output", "absent/train.json"], "--output absent/train.json: there is no folder absent"),
        (["--output", "."], "--output .: is a folder"),
        (["--seq-length", "1"], "seq_length"),
    ],
)
def test_a_wrong_flag_is_a_sentence_before_any_measurement(flags, expected, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_plm.benchmark.train.build_run", lambda *_, **__: pytest.fail("the measurement began"))
    assert run_command(main, ["train", "--data-path", str(dataset), "--presets", "tiny", *flags]) == 2
    printed = capsys.readouterr()
    assert expected.replace("_", "-") in printed.err.replace("_", "-")
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_an_output_folder_without_write_permission_is_told_at_once(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_plm.benchmark.command.os.access", lambda *_: False)  # root may write anywhere
    assert run_command(main, ["train", "--data-path", str(dataset), "--output", str(tmp_path / "train.json")]) == 2
    assert "train.json: cannot be written; choose a folder with write permission" in capsys.readouterr().err


def test_without_transformers_the_way_to_install_it_is_named(dataset, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run_command(main, ["train", "--data-path", str(dataset)]) == 2
    assert "pip install 'megatron-plm[huggingface]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("best", "tried", "expected"),
    [
        (4, [1, 2, 4, 8], None),
        (1, [1, 2], None),  # nothing is smaller
        (8, [1, 4, 8], "fastest at 8, the largest size tried"),
        (4, [8, 4, 16], "fastest at 4, the smallest size tried"),
        (1, [1], "fastest at 1, the largest size tried"),
    ],
)
def test_the_table_tells_where_the_peers_best_batch_size_is_at_an_end_of_those_tried(best, tried, expected):
    figures = {
        "tokens_per_second": {"ours": [2.0], "padded": [1.0]},
        "batch_sizes": {"ours": 4, "padded": best},
        "tried_sizes": tried,
        "ratios": {"padded": {"median": 2.0, "bar": 2.0}},
        "mfu": {"ours": None, "padded": None},
        "peak_memory": {"ours": None, "padded": 2e9},
        "micro_batches": 3,
        "failed": {"compiled": "CompileError: why"},
    }
    result = {
        "device": "cpu",
        "dtype": "float32",
        "presets": {"tiny": figures},
        "machine": {"processor": "p", "threads": 1, "versions": {}},
    }
    notes = [line for line in table(result).splitlines() if line.startswith("note")]
    assert [expected in note for note in notes] == ([] if expected is None else [True])
    assert "megatron-plm, packed rows, 12 a step" in table(result)
    assert "FAILED: megatron-plm, packed rows, compiled: CompileError: why" in table(result)
