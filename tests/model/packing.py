"""Packs proteins into rows by hand, apart from the loader: what the model's tests feed it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")
SHAPE = ModelOptions(num_layers=3, hidden_size=48, num_attention_heads=4)


class Rows(NamedTuple):
    """The arguments of the encoder."""

    tokens: Tensor
    positions: Tensor
    segment_ids: Tensor
    cu_seqlens: Tensor


def pack(rows: Sequence[Sequence[Sequence[int]]], length: int, *, pad: int = TOKENIZER.pad_id) -> Rows:
    """Rows of `length` tokens, each holding the proteins listed for it, and `pad` behind them."""
    tokens = torch.full((len(rows), length), pad)
    positions, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
    cuts = [0]
    for r, row in enumerate(rows):
        at = 0
        for number, protein in enumerate(row, start=1):
            here = slice(at, at + len(protein))
            tokens[r, here] = torch.as_tensor(protein)
            positions[r, here] = torch.arange(len(protein))
            segments[r, here] = number
            at += len(protein)
            cuts.append(r * length + at)
        if at < length:
            cuts.append((r + 1) * length)
    cuts += [cuts[-1]] * 3  # unused entries, as the loader leaves them
    return Rows(tokens, positions, segments, torch.tensor(cuts, dtype=torch.int32))


def random_proteins(lengths: Sequence[int], *, seed: int = 0, masked: float = 0.2) -> list[list[int]]:
    """Tokens `<cls> residues <eos>` of the given lengths, some of the residues masked."""
    rng = np.random.default_rng(seed)
    proteins = []
    for length in lengths:
        residues = rng.choice(TOKENIZER.standard_ids, length - 2).astype(int)
        residues[rng.random(length - 2) < masked] = TOKENIZER.mask_id
        proteins.append([TOKENIZER.cls_id, *residues.tolist(), TOKENIZER.eos_id])
    return proteins


def build(options: ModelOptions = SHAPE, *, seed: int = 1, std: float = 0.2) -> MaskedLanguageModel:
    """A model in float64, with weights large enough that every part of it shows in the output."""
    model = MaskedLanguageModel(options, TOKENIZER)
    initialize(model, options, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model.double()
