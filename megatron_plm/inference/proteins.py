"""The proteins of input files, in order, with their names."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_plm.data.readers import Input, SequenceReader
from megatron_plm.data.records import RecordBatch
from megatron_plm.tokenizers import Tokenizer


class Protein(NamedTuple):
    """One record: its name as it stands in the input, and its token ids without specials, [L]."""

    identifier: str
    tokens: npt.NDArray[np.integer]


@dataclass(frozen=True)
class Survey:
    """What some inputs hold.

    Attributes:
        num_tokens: tokens of them all, without specials.
        unknown: how often each letter stands in them that is not in the vocabulary.
    """

    num_tokens: int
    unknown: Counter[str]


class ProteinReader:
    """Reads inputs of any format; every protein goes through the tokenizer as in preprocessing."""

    def __init__(self, inputs: Sequence[Input], tokenizer: Tokenizer, *, numbered: bool, strict: bool = False) -> None:
        """With `numbered`, and where the format has no names, proteins are called 1, 2, … over all inputs."""
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._numbered = numbered
        self._strict = strict

    @property
    def can_read_twice(self) -> bool:
        """Whether no input is a pipe."""
        return all(source.kind != "stream" for source in self._inputs)

    def survey(self) -> Survey:
        """Read all of them, which tells every fault before any work; raises UserError. Not for pipes."""
        assert self.can_read_twice
        num_tokens = 0
        unknown: Counter[str] = Counter()
        table = self._tokenizer.lookup_table()
        for reader, batches in self._readings():
            for batch in batches:
                num_tokens += len(batch.tokens)
            letters = np.flatnonzero((table == self._tokenizer.unknown_entry) & (reader.byte_counts > 0))
            unknown.update({chr(letter): int(reader.byte_counts[letter]) for letter in letters.tolist()})
        return Survey(num_tokens, unknown)

    def read(self) -> Iterator[Protein]:
        """Yield the proteins in order; raises UserError at a fault of the input."""
        number = 0
        for _, batches in self._readings():
            for batch in batches:
                ends = np.cumsum(batch.lengths, dtype=np.int64).tolist()
                begins = [0, *ends[:-1]]
                names = batch.identifiers or [str(number + i) for i in range(1, len(ends) + 1)]
                for name, begin, end in zip(names, begins, ends, strict=True):
                    yield Protein(name, batch.tokens[begin:end])
                number += len(ends)

    def _readings(self) -> Iterator[tuple[SequenceReader, Iterator[RecordBatch]]]:
        """A reader of each input with its batches: whether there are names depends on the format."""
        for source in self._inputs:
            named = not self._numbered and source.format != "text"
            reader = SequenceReader(self._tokenizer, strict=self._strict, identifiers=named)
            yield reader, reader.read([source])
