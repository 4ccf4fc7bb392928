"""From a row stream to the batches of one process.

The rows of a global batch are the next `global_batch_size` rows of the stream, whatever the number of processes:
each process walks the same stream and builds only its own rows.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_plm.config.options import DataOptions
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.masking import choose_and_corrupt
from megatron_plm.data.packing import NUM_SPECIAL_TOKENS, Cursor, RowStream, Segment, row_limits
from megatron_plm.philox import derive_key
from megatron_plm.tokenizers import Tokenizer

IGNORED_LABEL = -100  # a padded entry of label_id; the value cross entropy ignores


@dataclass(frozen=True)
class Batch:
    """Packed rows of fixed shape: B rows of L tokens, at most M labels a row and S segments a row.

    A token outside every protein is padding: token `<pad>`, segment 0. `cu_seqlens` cuts the B·L tokens of the rows,
    laid end to end, into segments for attention; padding forms segments of its own, and unused entries repeat B·L.
    """

    tokens: Tensor  # int64 [B, L], corrupted
    positions: Tensor  # int64 [B, L], 0 at the first token of each segment
    segment_ids: Tensor  # int64 [B, L], 1, 2, … within a row; 0 is padding
    cu_seqlens: Tensor  # int32 [B * (S + 1) + 1]
    label_index: Tensor  # int64 [B, M], index into the row; 0 where unused
    label_id: Tensor  # int64 [B, M], the original token; IGNORED_LABEL where unused
    num_tokens: int  # tokens that are not padding
    num_labels: int
    num_cropped: int  # proteins longer than a row, of which a stretch is here

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **moved})


@dataclass(frozen=True)
class Step:
    """This process's share of one global batch, and the cursor behind that global batch."""

    micro_batches: list[Batch]
    cursor: Cursor


class Loader:
    """Masked, packed batches of one dataset for process `rank` of `world_size`."""

    def __init__(
        self,
        dataset: IndexedDataset,
        options: DataOptions,
        tokenizer: Tokenizer,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        dataset_id: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._dataset = dataset
        self._options = options
        self._tokenizer = tokenizer
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._dataset_id = dataset_id
        self._rank = rank
        self._world_size = world_size
        self._limits = row_limits(options.seq_length, options.mask_prob)
        self._stream = RowStream(
            dataset.lengths,
            seq_length=options.seq_length,
            mask_prob=options.mask_prob,
            window=options.packing_window,
            seed=seed,
            dataset_id=dataset_id,
        )

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        """The endless sequence of global batches from `cursor` on."""
        stream = self._stream.rows_from(cursor)
        epoch = cursor.epoch
        while True:
            rows = []
            for row, after in itertools.islice(stream, self._global_batch_size):
                rows.append((epoch, row))
                epoch, cursor = after.epoch, after
            yield Step(self._own_batches(rows), cursor)

    def first_epoch(self, max_batches: int) -> Iterator[Step]:
        """At most `max_batches` global batches of epoch 0, the same at every call; the last is filled up with empty
        rows."""
        rows = []
        for row, after in self._stream.rows_from(Cursor()):
            rows.append((0, row))
            ends = after.epoch > 0
            if ends or len(rows) == self._global_batch_size:
                rows += [(0, [])] * (self._global_batch_size - len(rows))
                yield Step(self._own_batches(rows), after)
                max_batches -= 1
                rows = []
            if ends or max_batches == 0:
                return

    def _own_batches(self, rows: list[tuple[int, list[Segment]]]) -> list[Batch]:
        size = self._micro_batch_size
        stride = size * self._world_size
        return [self._build(rows[start : start + size]) for start in range(self._rank * size, len(rows), stride)]

    def _build(self, rows: list[tuple[int, list[Segment]]]) -> Batch:
        num_rows, limits = len(rows), self._limits
        tokens = np.full((num_rows, limits.tokens), self._tokenizer.pad_id, dtype=np.uint8)
        positions = np.zeros((num_rows, limits.tokens), dtype=np.int64)
        segment_ids = np.zeros((num_rows, limits.tokens), dtype=np.int64)
        label_index = np.zeros((num_rows, limits.labels), dtype=np.int64)
        label_id = np.full((num_rows, limits.labels), IGNORED_LABEL, dtype=np.int64)
        cuts, num_tokens, num_labels, num_cropped = [0], 0, 0, 0
        for b, (epoch, row) in enumerate(rows):
            if row:
                used = sum(segment.length for segment in row)
                original = np.concatenate([self._read(segment) for segment in row])
                lengths = [segment.length for segment in row]
                offsets = np.concatenate([np.arange(length) for length in lengths])
                index, tokens[b, :used] = choose_and_corrupt(
                    original,
                    sequences=np.repeat([segment.sequence for segment in row], lengths),
                    positions=offsets + np.repeat([segment.start for segment in row], lengths),
                    tokenizer=self._tokenizer,
                    mask_prob=self._options.mask_prob,
                    key=derive_key("mask", self._seed, self._dataset_id, epoch),
                )
                positions[b, :used] = offsets
                segment_ids[b, :used] = np.repeat(np.arange(1, len(row) + 1), lengths)
                label_index[b, : len(index)] = index
                label_id[b, : len(index)] = original[index]
                cuts += (cuts[-1] + np.cumsum(lengths)).tolist()
                num_tokens += used
                num_labels += len(index)
                num_cropped += sum(
                    segment.length < self._dataset.lengths[segment.sequence] + NUM_SPECIAL_TOKENS for segment in row
                )
            if cuts[-1] != (b + 1) * limits.tokens:
                cuts.append((b + 1) * limits.tokens)
        cu_seqlens = np.full(num_rows * (limits.segments + 1) + 1, num_rows * limits.tokens, dtype=np.int32)
        cu_seqlens[: len(cuts)] = cuts
        return Batch(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            positions=torch.from_numpy(positions),
            segment_ids=torch.from_numpy(segment_ids),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            label_index=torch.from_numpy(label_index),
            label_id=torch.from_numpy(label_id),
            num_tokens=num_tokens,
            num_labels=num_labels,
            num_cropped=int(num_cropped),
        )

    def _read(self, segment: Segment) -> np.ndarray:
        """The segment's tokens, uint8 [length]: a stretch of `<cls> residues <eos>`."""
        residues = self._dataset[segment.sequence]
        stop = segment.start + segment.length
        parts = [residues[max(segment.start - 1, 0) : stop - 1]]
        if segment.start == 0:
            parts.insert(0, np.array([self._tokenizer.cls_id], dtype=np.uint8))
        if stop == len(residues) + 2:
            parts.append(np.array([self._tokenizer.eos_id], dtype=np.uint8))
        return np.concatenate(parts)
