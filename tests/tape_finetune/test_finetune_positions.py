"""A model with learned positions takes proteins no longer than these, and says how many it cropped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_sample import OPTIONS

from megatron_plm.convert.native import write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import run_command
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer
from tape_finetune.evaluate import main as tape_eval
from tape_finetune.train import main as tape_train


@pytest.fixture
def flags(tmp_path: Path, structure_dir: Path) -> list[str]:
    options = replace(
        OPTIONS, tokenizer="tape-iupac", position_embedding_type="learned_absolute", max_position_embeddings=42,
        norm_placement="post", embedding_layernorm=True, token_dropout=False,
    )  # fmt: skip
    tokenizer = get_tokenizer("tape-iupac")
    model = MaskedLanguageModel(options, tokenizer)
    initialize(model, options, seed=7)
    (tmp_path / "checkpoint").mkdir()
    write_native(Weights(options, tokenizer, model.state_dict()), tmp_path / "checkpoint")
    named = {"from_pretrained": tmp_path / "checkpoint", "data_dir": structure_dir, "output_dir": tmp_path}
    return ["transformer", "secondary_structure", "--num_train_epochs=1", "--exp_name=run",
            *(f"--{name}={value}" for name, value in named.items())]  # fmt: skip


def test_longer_proteins_are_cropped_and_counted_in_training_and_evaluation(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(tape_train, flags) == 0  # the sample's have 30 to 59 residues
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    cropped = results["splits"]["casp12"]["cropped"]
    assert 0 < cropped < 5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["max_length"] == 40
    capsys.readouterr()
    assert run_command(tape_eval, [*flags[:2], str(tmp_path / "run"), "--split", "casp12"]) == 0
    assert f"{cropped} cropped" in capsys.readouterr().out


def test_a_length_beyond_the_positions_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(tape_train, [*flags, "--max_length=41"]) == 2
    assert "--max_length 41: the model has learned positions for 40 residues" in capsys.readouterr().err
