"""A tiny checkpoint and tiny data, made once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archive_server import ARCHIVE, TASK, Archives, databases, record, serving, tar_of
from finetune_sample import OPTIONS, peptides, structures

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.native import write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer
from tape_finetune import fetch as fetching
from tape_finetune.download import SPLITS


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


@pytest.fixture(scope="session")
def archive_records() -> dict[str, list[Any]]:
    """What stands in the archive, by split."""
    return {split: [record(split, number) for number in range(3)] for split in SPLITS[TASK]}


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, archive_records: dict[str, list[Any]]) -> bytes:
    """An archive as TAPE has them."""
    # Random bytes beside the data: an archive of some size, which gzip would make small otherwise.
    noise = np.random.default_rng(0).bytes(300_000)
    members = databases(tmp_path_factory.mktemp("databases"), archive_records)
    return tar_of({**members, f"{TASK}/noise.bin": noise, f"{TASK}/._noise.bin": b"of macOS"})


@pytest.fixture
def server(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archives]:
    """A server that has it."""
    monkeypatch.setattr(fetching, "_PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    archives = Archives()
    archives.files[ARCHIVE] = archive
    with serving(archives):
        yield archives
