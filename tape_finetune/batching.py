"""From proteins to one packed row, without any padding, and from a split to batches.

A protein that is read in windows lies there as several stretches of `<cls> residues <eos>`, of which a cut end has no
`<cls>` or `<eos>`. Neighbours overlap by a quarter, and a residue is taken from the stretch in which it is farthest
from a cut, so that what reads residues finds one row for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_plm.data.order import permute
from megatron_plm.data.packing import NUM_SPECIAL_TOKENS
from megatron_plm.inference.windows import most_central, windows
from megatron_plm.philox import derive_key
from megatron_plm.tokenizers import Tokenizer
from tape_finetune.data import Example


@dataclass(frozen=True)
class Packed:
    """Proteins end to end in one row of T tokens, with R residues in all; the first four are the encoder's arguments.
    A protein is one stretch, or several where it is read in windows."""

    tokens: Tensor  # int64 [1, T]
    positions: Tensor  # int64 [1, T], 0 at the first token of each stretch
    segment_ids: Tensor  # int64 [1, T], 1, 2, …
    cu_seqlens: Tensor  # int32 [number of stretches + 1], from 0 to T
    residue_index: Tensor  # int64 [R], where in the row the residues are, in order
    lengths: tuple[int, ...]  # residues of each protein; they add up to R

    def to(self, device: torch.device) -> "Packed":
        """The same with its tensors on `device`."""
        return Packed(
            self.tokens.to(device),
            self.positions.to(device),
            self.segment_ids.to(device),
            self.cu_seqlens.to(device),
            self.residue_index.to(device),
            self.lengths,
        )


def pack(examples: Sequence[Example], tokenizer: Tokenizer) -> Packed:
    """Lay `<cls> residues <eos>` of each protein end to end; a cut end, as in pretraining, has no `<eos>`."""
    pieces: list[NDArray[np.int64]] = []
    lengths, places, start = [], [], 0
    for example in examples:
        residues = tokenizer.encode(example.sequence)
        end = () if example.cropped else (tokenizer.eos_id,)
        tokens = np.concatenate([[tokenizer.cls_id], residues, end]).astype(np.int64)
        parts, place = _in_row(len(tokens), example.window)
        pieces += [tokens[part] for part in parts]
        places.append(start + place[1 : 1 + len(residues)])
        lengths.append(len(residues))
        start += sum(part.stop - part.start for part in parts)
    sizes = np.array([len(piece) for piece in pieces])
    ends = np.cumsum(sizes)
    return Packed(
        tokens=torch.from_numpy(np.concatenate(pieces))[None],
        positions=torch.from_numpy(offsets(sizes))[None],
        segment_ids=torch.from_numpy(np.repeat(np.arange(1, len(pieces) + 1), sizes))[None],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        residue_index=torch.from_numpy(np.concatenate(places)),
        lengths=tuple(lengths),
    )


def _in_row(num_tokens: int, window: int | None) -> tuple[list[slice], NDArray[np.int64]]:
    """The stretches of a protein, laid end to end, and where among them each of its tokens is taken from."""
    if window is None:
        return [slice(0, num_tokens)], np.arange(num_tokens)
    size = window + NUM_SPECIAL_TOKENS
    parts = windows(num_tokens, size, size // 4)
    chosen = most_central(parts)
    starts = np.array([part.start for part in parts])
    # All stretches of several are of one size.
    return [slice(*part) for part in parts], chosen * size + np.arange(num_tokens) - starts[chosen]


def offsets(lengths: NDArray[np.integer] | Sequence[int]) -> NDArray[np.int64]:
    """0, 1, … up to each length, one after the other: int64 [sum of lengths]."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def shuffled_batches(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """Indices of each batch of one epoch; every example once, in an order that (seed, epoch) decides."""
    order = permute(np.arange(num_examples), num_examples, derive_key("finetune", seed, epoch))
    for start in range(0, num_examples, batch_size):
        yield order[start : start + batch_size]


def length_batches(
    lengths: Sequence[int], max_residues: int, max_proteins: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Indices of batches of similar length, shortest proteins first: at most `max_residues` and `max_proteins` a batch,
    but always one protein."""
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        # The longest comes last, so this bounds the batch with its own proteins.
        if batch and ((len(batch) + 1) * lengths[index] > max_residues or len(batch) == max_proteins):
            yield np.array(batch)
            batch = []
        batch.append(index)
    if batch:
        yield np.array(batch)
