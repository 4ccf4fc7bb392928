"""Inputs to batches of whole records of token ids, on one or more threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_plm.data._native import Alphabet
from megatron_plm.data.readers.ahead import Lane, pipelined
from megatron_plm.data.readers.inputs import Input
from megatron_plm.data.readers.scans import Job, Place, Scanned, jobs, line_word
from megatron_plm.data.readers.segmenting import segmented
from megatron_plm.data.readers.values import Values
from megatron_plm.data.records import RecordBatch
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import PieceTokenizer, Tokenizer


class SequenceReader:
    """Tokenizes inputs of any format; counts what it saw in all of them.

    White space inside a sequence is skipped, and so are blank lines. A '*' at the end of a sequence is the stop codon,
    no residue: it is dropped and counted. Any other letter that the tokenizer doesn't know, an inner '*' too, becomes
    its unknown token, or is an error where `strict`. Gaps ('-' and '.') are letters, tokens of their own in the
    vocabularies that have them: nothing is removed from an alignment.

    FASTA: a record is a line that begins with '>' (a bare one is a record without a name) and the lines up to the next
    such line; lines that begin with ';' are comments.

    Attributes:
        byte_counts: how often each byte stood in a sequence, uint64 [256].
        num_stops: sequences that ended in '*'.
        num_bytes: bytes of text read, after decompression.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        fold_case: bool = True,
        strict: bool = False,
        workers: int = 1,
        names: bool = False,
        identifiers: bool = False,
    ) -> None:
        """`workers` threads tokenize; with `names`, batches hold a hash of each record's name (see `hash_names`), and
        with `identifiers` the names themselves.

        Raises UserError where the tokenizer is a sentencepiece model and sentencepiece is missing.
        """
        self._alphabet = Alphabet(tokenizer.lookup_table(fold_case), tokenizer.unknown_entry, strict)
        self._pieces = tokenizer if isinstance(tokenizer, PieceTokenizer) else None
        if self._pieces is not None:
            self._pieces.check_encoder()
        self._workers = workers
        self._with_names = names
        self._with_identifiers = identifiers
        self.byte_counts = np.zeros(256, dtype=np.uint64)
        self.num_stops = 0
        self.num_bytes = 0

    def read(
        self,
        inputs: Sequence[Input],
        progress: Callable[[int], None] | None = None,
        *,
        folder: Callable[[], Path] | None = None,
    ) -> Iterator[RecordBatch]:
        """Yield the records of the inputs, in their order, some at a time; tokens are of the tokenizer's dtype.

        With several workers, compressed inputs behind the first are decompressed ahead into a file in `folder()`, if it
        is given. `progress` is told, again and again, how many bytes of all inputs have been read, as they are on the
        disk; each input's `position` tells its own. The records are the same for every number of workers, and so is
        the error: UserError, naming input, line and record, at the first fault.
        """
        bytes_done = 0
        num_lines = num_records = 0
        for source, place, scanned in self._scanned(inputs, folder):
            if place is None or scanned is None:
                if num_records == 0:
                    raise UserError(_without_records(source))
                source.position = source.size or source.position
                bytes_done += source.position
                num_lines = num_records = 0
                continue
            num_lines += place.first_line
            if scanned.fault is not None:
                line, message = scanned.fault
                first = 0 if source.format == "lmdb" else 1
                raise UserError(f"{source.label}, {line_word(source.format)} {num_lines + line + first:d}: {message}")
            num_lines += scanned.num_lines
            num_records += len(scanned.lengths)
            self.byte_counts += scanned.byte_counts
            self.num_stops += scanned.num_stops
            self.num_bytes += place.num_bytes
            source.position = place.position
            if progress is not None:
                progress(bytes_done + source.position)
            if len(scanned.lengths):
                names = scanned.names if self._with_names else None
                identifiers = _texts(scanned) if self._with_identifiers else None
                yield RecordBatch(scanned.tokens, scanned.lengths, names, identifiers)

    def _scanned(
        self, inputs: Sequence[Input], folder: Callable[[], Path] | None
    ) -> Iterator[tuple[Input, Place | None, Scanned | None]]:
        """Scan every block, in order; no place and no scan stand for the end of an input."""
        if self._workers > 1:
            yield from self._scanned_side_by_side(inputs, folder)
            return
        for source in inputs:
            for job in self._jobs(source):
                yield source, job.place, job.scan()
            yield source, None, None

    def _scanned_side_by_side(
        self, inputs: Sequence[Input], folder: Callable[[], Path] | None
    ) -> Iterator[tuple[Input, Place | None, Scanned | None]]:
        """The same with as many blocks scanned, and as many files cut or decompressed, at a time as there are workers.

        What comes of the files behind the first waits in memory or, where it took time, in `folder()`.
        """
        ahead = min(4 * self._workers, self._workers + 8)
        lanes: deque[tuple[Input, Lane]] = deque()
        with ExitStack() as stack:
            stack.callback(_for_each, Lane.close, lanes)
            scanners, cutters = (ThreadPoolExecutor(self._workers, thread_name_prefix=name) for name in ("scan", "cut"))
            stack.callback(scanners.shutdown, cancel_futures=True)
            stack.callback(cutters.shutdown, cancel_futures=True)
            stack.callback(_for_each, Lane.stop, lanes)
            left = deque(inputs)
            for source in inputs:
                # A stream may keep its reader waiting, and a thread that waits so could not be stopped: it is read
                # here, and nothing behind it ahead.
                while left and left[0].kind != "stream" and self._has_lane(left[0], lanes):
                    following = left.popleft()
                    spools_to = folder if following.is_slow else None
                    lane = Lane(self._jobs(following), scanners, num_ahead=ahead, spools_to=spools_to)
                    lanes.append((following, lane))
                    cutters.submit(lane.run)
                if source.kind == "stream":
                    left.popleft()
                    results = pipelined(self._jobs(source), scanners, ahead)
                else:
                    results = lanes[0][1].results()
                for place, scanned in results:
                    yield source, place, scanned
                yield source, None, None
                if source.kind != "stream":
                    lanes.popleft()[1].close()

    def _has_lane(self, source: Input, lanes: Iterable[tuple[Input, Lane]]) -> bool:
        """Whether one more input may be read beside those of `lanes`: each takes memory."""
        others = [other for other, _ in lanes]
        return len(others) < min(self._workers, *(one.most_at_once for one in (*others, source)))

    def _jobs(self, source: Input) -> Iterator[Job]:
        found = jobs(source, self._alphabet, with_names=self._with_names or self._with_identifiers)
        return found if self._pieces is None else segmented(found, self._pieces)


def _for_each(do: Callable[[Lane], None], lanes: Iterable[tuple[Input, Lane]]) -> None:
    for _, lane in lanes:
        do(lane)


def _texts(scanned: Scanned) -> list[str]:
    assert scanned.identifier_offsets is not None
    return Values(scanned.identifiers, scanned.identifier_offsets).texts()


def _without_records(source: Input) -> str:
    if source.format == "fasta":
        return f"{source.label}, no FASTA record: expected a line that begins with '>'"
    return f"{source.label} holds no sequence: expected at least one ({source.format})"
