"""The command that preprocessing prints last describes a run that can begin, whatever the tokenizer."""

import re
import shlex
from pathlib import Path

import pytest
from piece_models import trained, write
from preprocess_command import TEXT, run

from megatron_plm.config.load import load_config
from megatron_plm.config.presets import PRESETS
from megatron_plm.config.problems import problems
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.tokenizers import TOKENIZER_NAMES
from megatron_plm.training.state import open_datasets


def num_parameters(preset: str) -> int:
    """About that of the blocks."""
    return PRESETS[preset]["num_layers"] * PRESETS[preset]["hidden_size"] ** 2


@pytest.mark.parametrize("tokenizer", [*TOKENIZER_NAMES, "own.model"])
@pytest.mark.parametrize("flags", [[], ["--split", "train=0.6,valid=0.4"]], ids=["whole", "split"])
def test_the_next_command_pretrains_on_this_dataset(
    tokenizer: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "in.fasta").write_bytes(TEXT + b"\n" + b"".join(b">%d\nMKV%s\n" % (n, b"A" * n) for n in range(40)))
    if tokenizer == "own.model":
        write(tmp_path / tokenizer, trained("unigram", vocab_size=150, max_letters=5_000))
    assert run(tmp_path, "--tokenizer", tokenizer, "--output-prefix", "out/p", *flags) == 0
    (typed,) = re.findall(r"next: +\S*launch/pretrain\.sh (.*)", capsys.readouterr().out)
    words = shlex.split(typed)
    config, _ = load_config(words)
    assert problems(config) == []
    datasets = open_datasets(config)
    recorded = IndexedDataset(config.data.data_path[0]).tokenizer
    assert datasets.tokenizer.sha256 == recorded["sha256"]
    assert (datasets.valid is not None) == bool(flags)
    preset = words[words.index("--preset") + 1]
    if tokenizer in TOKENIZER_NAMES:  # of its family, the smallest that has a paper
        others = [name for name, shape in PRESETS.items() if shape.get("tokenizer", "esm2") == tokenizer]
        assert num_parameters(preset) == min(num_parameters(name) for name in others if name != "tiny")
    else:
        assert preset == "tiny"
