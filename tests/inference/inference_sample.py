"""A tiny ESM-2 of transformers' own, proteins in files, and what both say, protein by protein."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EsmForMaskedLM
from transformers_peer import esm_config

from megatron_plm.cli import VERBS
from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.native import write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import run_command
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

ESM2 = get_tokenizer("esm2")
SHAPE = ModelOptions(num_layers=3, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48)
LETTERS = "LAGVSERTIDPKQNFYMHWC"


def run(verb: str, *flags: object) -> int:
    """Run the command in this process; returns its exit code."""
    return run_command(importlib.import_module(VERBS[verb][0]).main, [str(flag) for flag in flags])


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of its own, such that outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name.lower() and name.endswith("weight")
        parameter.copy_(noise * (0.2 if parameter.dim() == 1 else parameter.shape[1] ** -0.5) + float(is_scale))


def peer_checkpoint(path: Path, *, token_dropout: bool = True, seed: int = 0) -> EsmForMaskedLM:
    """Write a random model with transformers; returns it."""
    model = EsmForMaskedLM(esm_config(SHAPE, token_dropout=token_dropout)).eval()
    randomize(model, seed)
    model.save_pretrained(path)
    return model


def our_checkpoint(path: Path, seed: int = 0, **options: Any) -> MaskedLanguageModel:
    """Write a random native checkpoint of SHAPE with other options; returns the model."""
    shape = ModelOptions(**{**vars(SHAPE), **options})
    tokenizer = get_tokenizer(shape.tokenizer)
    model = MaskedLanguageModel(shape, tokenizer).eval()
    randomize(model, seed)
    path.mkdir()
    write_native(Weights(shape, tokenizer, model.state_dict()), path, "float32")
    return model


def random_sequences(lengths: Sequence[int], seed: int = 0, letters: str = LETTERS) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), length)) for length in lengths]


def write_fasta(path: Path, sequences: Sequence[str], names: Sequence[str] | None = None) -> Path:
    names = names or [f"p{number}" for number in range(len(sequences))]
    records = [f">{name}\n{sequence}\n" for name, sequence in zip(names, sequences, strict=True)]
    path.write_text("".join(records), encoding="utf-8")
    return path


def with_specials(sequence: str) -> list[int]:
    return [ESM2.cls_id, *ESM2.encode(sequence).tolist(), ESM2.eos_id]


@torch.no_grad()
def their_hidden_states(model: EsmForMaskedLM, tokens: Sequence[int]) -> np.ndarray:
    """All of them, of one protein alone: float32 [layers + 1, tokens, D]."""
    found = model.esm(torch.tensor([tokens]), output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    return torch.cat(found.hidden_states).numpy()


@torch.no_grad()
def their_log_probabilities(model: EsmForMaskedLM, tokens: Sequence[int]) -> np.ndarray:
    """Of one sequence alone: float32 [tokens, V]."""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1).numpy()


@torch.no_grad()
def our_last_states(model: MaskedLanguageModel, tokens: Sequence[int]) -> np.ndarray:
    """What our encoder says of one sequence alone: float32 [tokens, D]."""
    row = torch.tensor([tokens])
    cuts = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return model.encoder(row, torch.arange(len(tokens))[None], torch.ones_like(row), cuts)[0].numpy()
