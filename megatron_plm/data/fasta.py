"""FASTA to token ids: blocks of bytes in, blocks of tokens and record lengths out, on one or more threads."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from megatron_plm.data._native import Alphabet, Block, FastaError, FastaStream, LineState, scan_block, state_after
from megatron_plm.data.formats import BlockReader
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer

Tokens = npt.NDArray[np.uint8]


class FastaTokenizer:
    """Tokenizes FASTA files; counts what it saw in all of them.

    A record is a line that begins with '>' and the lines up to the next such line. White space inside a sequence,
    blank lines and lines that begin with ';' are skipped. What is no letter of the tokenizer becomes its unknown
    token and is counted, or is an error where `strict`.

    Attributes:
        byte_counts: how often each byte stood in a sequence, uint64, shape [256].
        num_bytes: bytes of FASTA text read, after decompression.
    """

    def __init__(self, tokenizer: Tokenizer, *, fold_case: bool = True, strict: bool = False, workers: int = 1) -> None:
        self._alphabet = Alphabet(tokenizer.lookup_table(fold_case), tokenizer.unk_id, strict)
        self._workers = workers
        self.byte_counts = np.zeros(256, dtype=np.uint64)
        self.num_bytes = 0

    def read(self, reader: BlockReader) -> Iterator[tuple[Tokens, npt.NDArray[np.int32]]]:
        """Yield, block by block, the tokens [n] and the lengths [k] of the records that ended in the block.

        A record may stretch over several blocks: its length comes with its last tokens or after them. The sequence
        of tokens and of lengths is the same for every number of workers. Raises UserError, naming file, line and
        record, at the first fault of the file.
        """
        stream = FastaStream()
        try:
            for block, tokens in self._scanned(reader):
                stream.add(block)
                yield tokens, stream.take_lengths()
            stream.finish()
        except FastaError as error:
            raise UserError(f"input file '{reader.path}', {error}") from None
        self.byte_counts += stream.byte_counts
        yield np.empty(0, dtype=np.uint8), stream.take_lengths()

    def _scanned(self, blocks: Iterable[bytes]) -> Iterator[tuple[Block, Tokens]]:
        """Scan blocks, in order; with several workers, up to two blocks for each are under way at a time."""
        if self._workers == 1:
            for data, state in self._with_states(blocks):
                yield self._scan(data, state)
            return
        pending: deque[Future[tuple[Block, Tokens]]] = deque()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="tokenize") as pool:
            for data, state in self._with_states(blocks):
                pending.append(pool.submit(self._scan, data, state))
                if len(pending) > 2 * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _with_states(self, blocks: Iterable[bytes]) -> Iterator[tuple[bytes, LineState]]:
        state = LineState.line_start
        for data in blocks:
            self.num_bytes += len(data)
            yield data, state
            state = state_after(data, state)

    def _scan(self, data: bytes, state: LineState) -> tuple[Block, Tokens]:
        tokens = np.empty(len(data), dtype=np.uint8)
        block = scan_block(self._alphabet, data, state, tokens)
        return block, tokens[: block.num_tokens]
