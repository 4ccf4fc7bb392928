"""The embedding benchmark measures what it says, with a real peer."""

import json

import numpy as np
import pytest

from megatron_plm.benchmark import embed as subject
from megatron_plm.benchmark.checks import check_lines
from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.peer import peer_config
from megatron_plm.benchmark.rounds import ratio_checks
from megatron_plm.config.options import ModelOptions
from megatron_plm.errors import run_command
from megatron_plm.tokenizers import get_tokenizer

ESM2 = get_tokenizer("esm2")
QUICK = ["--rounds", "2", "--seconds", "0.1", "--peer-batch-sizes", "2", "4", "--preset", "tiny"]


@pytest.fixture
def fasta(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [5, 40, 17, 300, 9, 61, 33]
    records = [f">p{i}\n{''.join(rng.choice(list('ACDEFGHIKLMNPQRSTVWY'), n))}\n" for i, n in enumerate(lengths)]
    (tmp_path / "in.fasta").write_text("".join(records))
    return tmp_path / "in.fasta"


def test_the_command_writes_ratios_of_this_run(fasta, tmp_path, capsys):
    output = tmp_path / "embed.json"
    assert main(["embed", "--input", str(fasta), *QUICK, "--max-length", "128", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["num_proteins"] == 6  # the one of 300 residues is left out
    for side, bar in (("padded", 1.5), ("single", None)):
        speeds = result["tokens_per_second"]
        each = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[side], strict=True)]
        assert result["ratios"][side]["median"] == pytest.approx(sum(each) / 2)
        assert result["ratios"][side]["bar"] == bar
    assert "EsmModel, padded batches of " in capsys.readouterr().out


@pytest.mark.parametrize(("median", "expected"), [(1.49, ["padded"]), (1.5, [])])
def test_a_bar_is_missed_below_it(median, expected):
    found = {"padded": {"median": median, "bar": subject.BARS["padded"]}, "single": {"median": 0.1, "bar": None}}
    checks = ratio_checks(found, {"padded": "the peer"}, "embedding")
    assert subject.missed({"checks": checks}) == expected
    assert any("MISSED" in line for line in check_lines(checks)) == bool(expected)


def test_the_peer_reads_the_same_tokens_and_counts_no_padding():
    options = ModelOptions(num_layers=1, hidden_size=16, num_attention_heads=2)
    model = subject._peer_model(options, ESM2, seed=1)
    assert model.config.num_hidden_layers == peer_config(options, ESM2).num_hidden_layers == 1
    sequences = ["MKV", "MKVLAG", "MK"]
    step = subject._peer_step(model, ESM2, sequences, 2)
    assert [step(), step(), step()] == [3 + 6 + 4, 2 + 2, 3 + 6 + 4]
    ids = subject._peer_tokenizer(ESM2)("MKVX")["input_ids"]
    assert ids == [ESM2.cls_id, *ESM2.encode("MKVX").tolist(), ESM2.eos_id]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-length", "4"], "--max-length 4: every protein of"),
        (["--batch-tokens", "100"], "--batch-tokens 100: one protein may have 1024"),
        (["--input", "absent.fasta"], "'absent.fasta' does not exist"),
        (["--seconds", "0"], "argument --seconds: '0' is not a number of seconds above 0"),
    ],
)
def test_a_wrong_flag_is_a_sentence(fasta, flags, expected, capsys):
    assert run_command(main, ["embed", "--input", str(fasta), *QUICK, *flags]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
