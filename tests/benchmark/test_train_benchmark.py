"""The training benchmark measures what it says, with a real peer."""

import argparse
import json
import sys
from itertools import islice

import numpy as np
import pytest

from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.train import _padded_batches, table
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.preprocess import preprocess
from megatron_plm.errors import run_command
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")


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
    batches = _padded_batches(IndexedDataset(dataset), TOKENIZER, kind, batch_size, options)
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


def test_the_command_writes_ratios_of_this_run(dataset, tmp_path, capsys):
    output = tmp_path / "train.json"
    flags = ["--rounds", "2", "--seconds", "0.2", "--peer-batch-sizes", "4", "--preset", "tiny", "--seq-length", "128"]
    assert main(["train", "--data-path", str(dataset), *flags, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    for kind in ("padded", "bucketed"):
        speeds = result["tokens_per_second"]
        ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[kind], strict=True)]
        assert result["ratios"][kind]["median"] == pytest.approx(sum(ratios) / 2)
    assert result["machine"]["processor"]
    printed = capsys.readouterr()
    assert "EsmForMaskedLM, random batches of 4" in printed.out
    lines = printed.err.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("round")] == ["round 1 of 2", "round 2 of 2"]
    assert len([line for line in lines if " batches of 4: " in line or " length-bucketed of 4: " in line]) == 2


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
    monkeypatch.setattr("megatron_plm.benchmark.train.build_run", lambda *_: pytest.fail("the measurement began"))
    assert run_command(main, ["train", "--data-path", str(dataset), "--preset", "tiny", *flags]) == 2
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
    result = {
        "options": {"peer_batch_sizes": tried},
        "tokens_per_second": {"ours": [2.0], "padded": [1.0]},
        "peer_batch_size": {"padded": best},
        "ratios": {"padded": {"median": 2.0, "bar": 2.0}},
        "machine": {"processor": "p", "threads": 1, "versions": {}},
    }
    notes = [line for line in table(result).splitlines() if line.startswith("note")]
    assert [expected in note for note in notes] == ([] if expected is None else [True])
