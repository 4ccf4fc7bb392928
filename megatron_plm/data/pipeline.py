"""From input files to one indexed dataset, or one for each split: read, select, arrange, write."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plm import __version__
from megatron_plm.data._native import add_token_counts
from megatron_plm.data.indexed import DatasetPaths
from megatron_plm.data.indexed_writer import IndexedDatasetWriter, publish
from megatron_plm.data.progress import Progress
from megatron_plm.data.readers import Input, SequenceReader, open_inputs
from megatron_plm.data.rearrange import Arranged, Arranger, Selection, SelectionCounts, pick
from megatron_plm.data.records import RecordBatch
from megatron_plm.data.splits import split_prefix
from megatron_plm.data.statistics import LengthStatistics, count_tokens, count_unknown_letters, description
from megatron_plm.errors import UserError
from megatron_plm.files import encodable
from megatron_plm.tokenizers import Tokenizer


@dataclass(frozen=True)
class Written:
    """One dataset. Lengths are in tokens."""

    paths: DatasetPaths
    split: str | None
    num_sequences: int
    num_documents: int
    num_residues: int
    min_length: int
    mean_length: float
    max_length: int


@dataclass(frozen=True)
class Summary:
    """What `preprocess` did. Letters are counted in the whole input; `num_bytes` is its text after decompression."""

    datasets: tuple[Written, ...]
    counts: SelectionCounts
    num_letters: int
    num_stops: int
    unknown_letters: dict[str, int]
    num_bytes: int
    seconds: float


def preprocess(
    inputs: Sequence[str | os.PathLike[str] | Input],
    output_prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    selection: Selection | None = None,
    fold_case: bool = True,
    strict: bool = False,
    workers: int = 1,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the sequences of `inputs`, in order, as one indexed dataset, or as `selection` says.

    `inputs` are files and patterns for open_inputs, or what it returned. With splits, each becomes the dataset
    PREFIX_NAME. Memory is bounded, and the files are the same for every number of `workers` (tokenizing threads).
    `command`, the command line that asks for this if one does, is kept in PREFIX.json. `progress` is told of bytes of
    the inputs as they are on the disk.

    Raises UserError at the first fault of an input, and where nothing is left for a dataset, and leaves nothing behind
    then; see SequenceReader, ClusterJoin and IndexedDatasetWriter for which.
    """
    started = time.perf_counter()
    selection = selection or Selection()
    opened = list(_opened(inputs))
    reader = SequenceReader(
        tokenizer, fold_case=fold_case, strict=strict, workers=workers, names=selection.clusters is not None
    )
    dtype, as_read = tokenizer.dtype, selection == Selection()
    count_letters = as_read and tokenizer.one_letter_a_token
    with contextlib.ExitStack() as stack:
        outputs = []
        for split in selection.split_names:
            writer = IndexedDatasetWriter(
                split_prefix(output_prefix, split),
                dtype=dtype,
                documents=selection.clusters is not None,
                force=force,
                workers=workers,
            )
            outputs.append(_Output(stack.enter_context(writer), split, tokenizer))
        # The last on the stack, so their files are closed before the writers remove the folder that they lie in.
        folder = outputs[0].writer.work_folder
        arranger = stack.enter_context(Arranger(selection, tokenizer, dtype, folder))
        records = stack.enter_context(contextlib.closing(_records(reader, opened, progress, folder)))
        for arranged in arranger.arranged(records):
            for number, output in enumerate(outputs):
                output.append(arranged, number=number, counting=not count_letters)
        _check_not_empty(outputs, arranger.counts)
        unknown = count_unknown_letters(reader.byte_counts, tokenizer, fold_case=fold_case)
        origin = {
            "unknown_letters": unknown,
            "num_final_stops": reader.num_stops,
            "keep_case": not fold_case,
            "sources": [
                {"path": encodable(source.path), "format": source.format, "bytes": source.position} for source in opened
            ],
            "tool_version": __version__,
            **({} if command is None else {"command": encodable(command)}),
        }
        token_counts = count_tokens(reader.byte_counts, tokenizer, fold_case=fold_case) if count_letters else None
        for output in outputs:
            chosen = {} if as_read else {"selection": arranger.described(output.split)}
            output.writer.complete(description(tokenizer, output.contents(token_counts), {**origin, **chosen}))
        publish([output.writer for output in outputs])
    return Summary(
        datasets=tuple(output.written for output in outputs),
        counts=arranger.counts,
        num_letters=int(reader.byte_counts.sum()),
        num_stops=reader.num_stops,
        unknown_letters=unknown,
        num_bytes=reader.num_bytes,
        seconds=time.perf_counter() - started,
    )


class _Output:
    """One dataset that is being written, and what it holds."""

    def __init__(self, writer: IndexedDatasetWriter, split: str | None, tokenizer: Tokenizer) -> None:
        self.writer = writer
        self.split = split
        self._tokenizer = tokenizer
        self._lengths = LengthStatistics()
        self._token_counts = np.zeros(tokenizer.vocab_size, dtype=np.uint64)

    def append(self, arranged: Arranged, *, number: int, counting: bool) -> None:
        """Write the records of split `number`; `counting` their tokens takes a tenth of the time of the rest."""
        batch, starts = arranged.batch, arranged.starts
        if arranged.splits is not None:
            mine = np.flatnonzero(arranged.splits == number)
            batch, starts = pick(batch, mine), None if starts is None else starts[mine]
        self.writer.append(batch.tokens, batch.lengths, starts)
        self._lengths.add(batch.lengths)
        if counting:
            add_token_counts(batch.tokens, self._token_counts)

    def contents(self, token_counts: dict[str, int] | None) -> dict[str, Any]:
        """What the description tells of the content; `token_counts` where they were not counted here."""
        tokens = self._tokenizer.tokens
        counts = token_counts or dict(zip(tokens, self._token_counts.tolist(), strict=True))
        return {
            "num_sequences": self._lengths.count,
            "num_documents": self.writer.num_documents,
            "num_residues": self._lengths.total,
            "num_unknown_letters": counts[tokens[self._tokenizer.unk_id]],
            "length_histogram": self._lengths.histogram(),
            "token_counts": counts,
        }

    @property
    def written(self) -> Written:
        lengths = self._lengths
        return Written(
            paths=self.writer.paths,
            split=self.split,
            num_sequences=lengths.count,
            num_documents=self.writer.num_documents,
            num_residues=lengths.total,
            min_length=lengths.minimum,
            mean_length=lengths.mean,
            max_length=lengths.maximum,
        )


def _records(
    reader: SequenceReader, inputs: Sequence[Input], progress: Progress | None, folder: Callable[[], Path]
) -> Generator[RecordBatch]:
    yield from reader.read(inputs, None if progress is None else progress.read, folder=folder)
    if progress is not None:
        progress.then("everything is read: arranging and writing")


def _opened(inputs: Sequence[str | os.PathLike[str] | Input]) -> Iterator[Input]:
    for item in inputs:
        if isinstance(item, Input):
            yield item
        else:
            yield from open_inputs([item])


def _check_not_empty(outputs: Sequence[_Output], counts: SelectionCounts) -> None:
    for output in outputs:
        if output.writer.num_sequences:
            continue
        if output.split is None or not any(other.writer.num_sequences for other in outputs):
            raise UserError(
                f"nothing is left of {counts.num_read:,} sequences: {counts.num_shorter:,} are shorter than "
                f"--min-length and {counts.num_longer:,} longer than --max-length"
            )
        raise UserError(
            f"--split: none of {counts.num_read - counts.num_left_out:,} sequences falls into {output.split}: give it "
            "a larger fraction or leave it out"
        )
