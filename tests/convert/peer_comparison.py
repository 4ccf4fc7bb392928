"""A model of ours against a peer's: the same proteins, in the peer's padded batch and in rows as ours can have them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from convert_sample import Packed, our_logits, pack, random_sequences
from torch import Tensor

from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer

LENGTHS = (13, 37, 3, 22)
# Both compute in fp32 and differ in the order of sums only; the project's bar for logits of order one.
TOLERANCE = 1e-5


def padded_batch(sequences: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """The ids of one padded batch [B, L], and which of them are real."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(sequence) for sequence in sequences])[:, None]


@torch.no_grad()
def assert_equal_values(
    model: MaskedLanguageModel,
    tokenizer: Tokenizer,
    theirs: Callable[[list[Tensor]], Tensor],
    ours: Callable[[MaskedLanguageModel, Packed], Tensor] = our_logits,
) -> None:
    """Their values [T, …] of sequences of our ids, and ours, within TOLERANCE: padded and packed, with `<mask>` and
    without."""
    worst = 0.0
    for masked in (0.0, 0.3):
        sequences = random_sequences(tokenizer, LENGTHS, masked=masked)
        expected = theirs(sequences)
        assert expected.abs().max() > 1  # the tolerance is meant for values of this size
        for layout in (
            pack(sequences, range(len(sequences)), max(LENGTHS), tokenizer.pad_id),
            pack(sequences, [0] * len(sequences), sum(LENGTHS), tokenizer.pad_id),
            pack(sequences, [0, 0, 1, 1], 61, tokenizer.pad_id),
        ):
            worst = max(worst, (ours(model.eval(), layout) - expected).abs().max().item())
    print(f"max abs difference {worst:.1e}")  # pytest -rP shows it; docs/converters.md states the largest
    assert worst <= TOLERANCE


def change_config(directory: Path, **fields: object) -> None:
    """Change fields of a directory's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
