"""A tiny checkpoint and tiny data, made once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetune_sample import OPTIONS, peptides, structures

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.native import write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint directory of two small layers."""
    return _checkpoint(OPTIONS, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def dropout_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with learned positions for 20 tokens, and with both kinds of dropout."""
    learned = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 20}
    options = replace(OPTIONS, **learned, hidden_dropout=0.2, attention_dropout=0.2)
    return _checkpoint(options, tmp_path_factory.mktemp("dropout_checkpoint"))


def _checkpoint(options: ModelOptions, directory: Path) -> Path:
    tokenizer = get_tokenizer("esm2")
    model = MaskedLanguageModel(options, tokenizer)
    initialize(model, options, seed=7)
    write_native(Weights(options, tokenizer, model.state_dict()), directory, "float32")
    return directory


@pytest.fixture(scope="session")
def peptide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 + 60 + 60 labelled peptides as CSV."""
    return peptides(tmp_path_factory.mktemp("peptides"), {"train": 200, "valid": 60, "test": 60})


@pytest.fixture(scope="session")
def structure_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 + 5 + 6 + 5 proteins for secondary structure and contacts."""
    counts = {"train": 12, "valid": 5, "test": 6, "casp12": 5}
    return structures(tmp_path_factory.mktemp("structures"), counts)
