"""A run that begins with weights of another vocabulary: rows by token, initial values where there is none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretraining_runs import pretrain
from sample_proteins import pair_proteins, write_dataset
from torch import Tensor

from megatron_plm.config.load import load_config
from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.native import write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel.mesh import joined_world
from megatron_plm.tokenizers import Tokenizer, get_tokenizer
from megatron_plm.training.checkpoint import load_pretrained_weights
from megatron_plm.training.other_vocabulary import BY_TOKEN, OtherVocabulary
from megatron_plm.training.state import build_run, open_datasets

MODEL = ModelOptions(
    tokenizer="proteinlm", num_layers=1, hidden_size=16, num_attention_heads=2, token_dropout=False,
    untie_embeddings_and_output_weights=True, hidden_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
FLAGS = [
    "--num-layers=1", "--hidden-size=16", "--num-attention-heads=2", "--no-token-dropout",
    "--untie-embeddings-and-output-weights", "--seq-length=64", "--micro-batch-size=4", "--global-batch-size=8",
    "--train-iters=1", "--lr-warmup-iters=0",
]  # fmt: skip
# By hand: what the special tokens of one vocabulary are called in the other.
ESM2_TO_PROTEINLM = {"<cls>": "[CLS]", "<pad>": "[PAD]", "<eos>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}


def random_checkpoint(path: Path, options: ModelOptions = MODEL) -> dict[str, Tensor]:
    """A native checkpoint in which every number is another; returns its tensors."""
    tokenizer = get_tokenizer(options.tokenizer)
    tensors = MaskedLanguageModel(options, tokenizer).state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "rotary" not in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    path.mkdir()
    write_native(Weights(options, tokenizer, tensors), path)
    return tensors


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    prefix = write_dataset(tmp_path / "esm2", pair_proteins(40, seed=1))
    return [f"--data-path={prefix}", f"--valid-data-path={prefix}"]


def test_each_token_has_the_row_of_its_name_and_the_rest_is_as_it_was(tmp_path: Path, data: list[str]) -> None:
    theirs = random_checkpoint(tmp_path / "native")
    config, _ = load_config([*FLAGS, *data])
    with joined_world(config.parallel) as world:
        run = build_run(config, world, open_datasets(config))
        (model,) = run.model.parts
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        told = load_pretrained_weights(run, tmp_path / "native")
        loaded = model.state_dict()
    esm2, proteinlm = get_tokenizer("esm2"), get_tokenizer("proteinlm")
    for name, tensor in loaded.items():
        if name not in BY_TOKEN:
            assert torch.equal(tensor, theirs[name]), name
            continue
        for i, token in enumerate(esm2.tokens):
            token = ESM2_TO_PROTEINLM.get(token, token)
            has_row = token in proteinlm.tokens
            expected = theirs[name][proteinlm.tokens.index(token)] if has_row else initial[name][i]
            assert torch.equal(tensor[i], expected), (name, token)
    assert {name for name in loaded if name in BY_TOKEN} == set(BY_TOKEN)
    assert told == (
        f"the weights of {tmp_path / 'native'}; its rows of proteinlm go by name to 30 of 33 tokens, initial values to "
        ". - <null_1>; without a place here: [unused1]"
    )


def test_a_run_says_what_went_where_and_trains(tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture) -> None:
    random_checkpoint(tmp_path / "native")
    flag = f"--pretrained-checkpoint={tmp_path / 'native'}"
    assert pretrain(*FLAGS, *data, flag) == 0  # without the dropout that the checkpoint was trained with
    assert "its rows of proteinlm go by name to 30 of 33 tokens" in capsys.readouterr().out
    # Its own configuration with the dataset's vocabulary, as one goes on from a converted checkpoint.
    config = ["--config", tmp_path / "native" / "config.toml", "--tokenizer=esm2"]
    few = ["--seq-length=64", "--micro-batch-size=4", "--global-batch-size=8", "--train-iters=1", "--lr-warmup-iters=0"]
    assert pretrain(*config, *few, *data, flag) == 0


def test_the_same_vocabulary_says_nothing_of_rows(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture
) -> None:
    random_checkpoint(tmp_path / "native", replace(MODEL, tokenizer="esm2"))
    assert pretrain(*FLAGS, *data, f"--pretrained-checkpoint={tmp_path / 'native'}") == 0
    assert f"beginning with the weights of {tmp_path / 'native'}\n" in capsys.readouterr().out


def test_vocabularies_that_share_no_residue_are_told_apart() -> None:
    ours = get_tokenizer("esm2")
    codons = Tokenizer(
        name="codons", tokens=("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "AUG", "GCU"),
        cls_id=0, pad_id=1, eos_id=2, unk_id=3, mask_id=4,
    )  # fmt: skip
    assert not OtherVocabulary(ours=ours, theirs=codons).shares_residues
    assert OtherVocabulary(ours=ours, theirs=get_tokenizer("amplify")).shares_residues
