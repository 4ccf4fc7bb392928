"""The training benchmark measures what it says, with a real peer."""

import argparse
import json
from itertools import islice

import numpy as np
import pytest

from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.train import _padded_batches
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.preprocess import preprocess
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
    flags = ["--rounds", "1", "--seconds", "0.3", "--peer-batch-sizes", "4", "--preset", "tiny", "--seq-length", "128"]
    assert main(["train", "--data-path", str(dataset), *flags, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    for kind in ("padded", "bucketed"):
        speeds = result["tokens_per_second"]
        assert result["ratios"][kind]["median"] == pytest.approx(speeds["ours"][0] / speeds[kind][0])
    assert result["machine"]["processor"]
    assert "EsmForMaskedLM" in capsys.readouterr().out
