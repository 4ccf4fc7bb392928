"""From datasets to the batches of one process.

The rows of a global batch are the next `global_batch_size` rows of the stream, whatever the number of processes:
each process walks the same stream and builds only its own rows. Tokens, masks and labels come from csrc/data/rows.cpp,
in threads that run ahead of the training loop.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_plm.config.options import DataOptions
from megatron_plm.data._native import build_rows
from megatron_plm.data.blend import Blend, Cursor
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.masking import Masking, native_vocabulary
from megatron_plm.data.packing import Row, RowStream, row_limits
from megatron_plm.errors import UserError
from megatron_plm.philox import derive_key
from megatron_plm.tokenizers import Tokenizer

IGNORED_LABEL = -100  # a padded entry of label_id; the value cross entropy ignores
_STEPS_AHEAD = 2  # global batches under way for each thread
_UNPACKED_MULTIPLE = 8  # tokens; unpacked rows are padded to a multiple of it
_SEGMENTS_OF_A_ROW = 4  # for which a batch's cu_seqlens has room at least, on average


@dataclass(frozen=True)
class Batch:
    """Rows of fixed shape: B rows of L tokens, at most M labels a row; of `cu_seqlens` alone the length may change.

    A token outside every protein is padding: token `<pad>`, segment 0. `cu_seqlens` cuts the B·L tokens of the rows,
    laid end to end, into segments for attention; padding forms segments of its own, and unused entries repeat B·L.
    It has room for `segment_room` segments at most, so that nearly all batches of a run agree on its length.
    """

    tokens: Tensor  # int64 [B, L], corrupted
    positions: Tensor  # int64 [B, L], 0 at the first token of each segment
    segment_ids: Tensor  # int64 [B, L], 1, 2, … within a row; 0 is padding
    cu_seqlens: Tensor  # int32 [segments + 1]
    label_index: Tensor  # int64 [B, M], index into the row; 0 where unused
    label_id: Tensor  # int64 [B, M], the original token; IGNORED_LABEL where unused
    row_keys: Tensor  # int64 [B], of each row another number, the same at every layout: what dropout is keyed by
    num_tokens: int  # tokens that are not padding
    num_labels: int
    num_cropped: int  # segments that are only a stretch of their protein

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in memory from which a GPU copies while the host goes on."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **changed})


@dataclass(frozen=True)
class Step:
    """This process's share of one global batch, and the cursor behind that global batch."""

    micro_batches: list[Batch]
    cursor: Cursor


class Loader:
    """Batches of a blend of datasets for process `rank` of `world_size`.

    `name` tells the order and the masks of several loaders of one run apart. With `num_workers` 0 batches are built
    when they are asked for. Iterating raises UserError where a dataset turns out damaged.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        weights: Sequence[float],
        options: DataOptions,
        tokenizer: Tokenizer,
        *,
        objective: str = "mlm",
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        name: str,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        masking = Masking.from_options(options, objective)
        self._datasets = list(datasets)
        self._files = [dataset.tokens for dataset in datasets]
        self._options = options
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._names = [name if index == 0 else f"{name}/{index}" for index in range(len(datasets))]
        self._rank = rank
        self._world_size = world_size
        self._pin_memory = pin_memory
        self._limits = row_limits(options, masking)
        self._corruption = masking.native()
        self._vocabulary = native_vocabulary(tokenizer)
        streams = [
            RowStream(dataset, options, masking, seed=seed, name=name, index=index)
            for index, (dataset, name) in enumerate(zip(datasets, self._names, strict=True))
        ]
        self._blend = Blend(streams, weights)

    def start(self) -> Cursor:
        """The cursor before the first row."""
        return Cursor.start(len(self._datasets))

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        """The endless sequence of global batches from `cursor` on."""

        def plans() -> Iterator[tuple[list[Row | None], Cursor]]:
            stream = self._blend.rows_from(cursor)
            while True:
                rows, cursors = zip(*itertools.islice(stream, self._global_batch_size), strict=True)
                yield list(rows), cursors[-1]

        return self._built(plans())

    def first_epoch(self, max_batches: int) -> Iterator[Step]:
        """At most `max_batches` global batches of epoch 0 of all datasets, in their shares, the same at every call; the
        last is filled up with empty rows."""

        def plans() -> Iterator[tuple[list[Row | None], Cursor]]:
            stream = self._blend.first_epoch()
            while rows := list(itertools.islice(stream, self._global_batch_size)):
                yield [*rows, *[None] * (self._global_batch_size - len(rows))], self.start()

        return self._built(itertools.islice(plans(), max_batches))

    def epochs(self, cursor: Cursor) -> list[float]:
        """How often each dataset has been read at `cursor`."""
        return self._blend.epochs(cursor)

    def _built(self, plans: Iterator[tuple[list[Row | None], Cursor]]) -> Iterator[Step]:
        if not self._options.num_workers:
            for rows, cursor in plans:
                yield Step(self._own_batches(rows), cursor)
            return
        ahead: deque[tuple[Future[list[Batch]], Cursor]] = deque()
        with (
            ThreadPoolExecutor(self._options.num_workers, thread_name_prefix="loader") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="plan") as planner,
        ):
            plan = planner.submit(next, plans, None)
            while (planned := plan.result()) is not None:
                plan = planner.submit(next, plans, None)  # packing a window takes a while now and then
                rows, cursor = planned
                ahead.append((pool.submit(self._own_batches, rows), cursor))
                if len(ahead) > _STEPS_AHEAD * self._options.num_workers:
                    future, cursor = ahead.popleft()
                    yield Step(future.result(), cursor)
            while ahead:
                future, cursor = ahead.popleft()
                yield Step(future.result(), cursor)

    def _own_batches(self, rows: Sequence[Row | None]) -> list[Batch]:
        """Of each global micro-batch's rows, which are dealt to the processes in turn, this process's share."""
        size, stride = self._micro_batch_size, self._micro_batch_size * self._world_size
        length = self._row_length(rows)
        return [
            self._build(rows[first : first + size], length) for first in range(self._rank * size, len(rows), stride)
        ]

    def _row_length(self, rows: Sequence[Row | None]) -> int:
        if self._options.row_layout == "packed":
            return self._limits.tokens
        longest = max((int(row.length[0]) for row in rows if row), default=1)
        return min(self._limits.tokens, -(-longest // _UNPACKED_MULTIPLE) * _UNPACKED_MULTIPLE)

    def _build(self, rows: Sequence[Row | None], row_length: int) -> Batch:
        held = [row for row in rows if row]
        counts = [len(row.sequence) if row else 0 for row in rows]
        file, pointer, residues = self._places(held)
        sequence, start = _joined([row.sequence for row in held]), _joined([row.start for row in held])
        keys = [derive_key("mask", self._seed, self._names[row.dataset], row.epoch) for row in held]
        try:
            *arrays, num_tokens, num_labels, num_cropped = build_rows(
                files=self._files,
                file=file,
                pointer=pointer,
                residues=residues,
                sequence=sequence,
                start=start,
                length=_joined([row.length for row in held]),
                key=np.repeat(np.array(keys, dtype=np.uint64), [len(row.sequence) for row in held]),
                row_offsets=np.concatenate([[0], np.cumsum(counts)]),
                vocabulary=self._vocabulary,
                corruption=self._corruption,
                row_tokens=row_length,
                row_labels=min(self._limits.labels, row_length),
                row_segments=self._limits.segments,
            )
        except IndexError as error:
            prefixes = ", ".join(sorted({self._datasets[row.dataset].prefix for row in held}))
            raise UserError(f"dataset '{prefixes}' is damaged: {error}; make the dataset again") from None
        tokens, positions, segment_ids, cuts, label_index, label_id = map(torch.from_numpy, arrays)
        used = int(torch.searchsorted(cuts, cuts[-1]))
        row_keys = [_row_key(key, row) for key, row in zip(keys, held, strict=True)] + [0] * (len(rows) - len(held))
        batch = Batch(
            tokens=tokens,
            positions=positions,
            segment_ids=segment_ids,
            cu_seqlens=cuts[: segment_room(len(rows), used) + 1].clone(),
            label_index=label_index,
            label_id=label_id,
            row_keys=torch.tensor(row_keys),
            num_tokens=num_tokens,
            num_labels=num_labels,
            num_cropped=num_cropped,
        )
        return batch.pin_memory() if self._pin_memory else batch

    def _places(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dataset, first byte and number of residues of every segment's sequence; int64 each."""
        places: list[list[np.ndarray]] = [[], [], []]
        for row in rows:
            dataset = self._datasets[row.dataset]
            places[0].append(np.full(len(row.sequence), row.dataset))
            places[1].append(dataset.pointers[row.sequence])
            places[2].append(dataset.lengths[row.sequence])
        return _joined(places[0]), _joined(places[1]), _joined(places[2])


def segment_room(rows: int, used: int) -> int:
    """For how many segments `cu_seqlens` has room, where the batch's rows have so many.

    Few, as flash attention starts work for each, though it be empty; and a power of two, as every other length is
    another graph to torch.compile.
    """
    return 1 << (max(used, _SEGMENTS_OF_A_ROW * rows) - 1).bit_length()


def _row_key(epoch_key: int, row: Row) -> int:
    """A number of 63 bits by what the row begins with, which no other row of the epoch does."""
    return (epoch_key ^ (int(row.sequence[0]) * 0x9E3779B97F4A7C15 + int(row.start[0]))) & (2**63 - 1)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.empty(0, dtype=np.int64)
