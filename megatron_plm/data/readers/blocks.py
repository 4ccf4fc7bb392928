"""Text cut into blocks of whole records."""

from collections.abc import Callable, Iterator

import numpy as np

from megatron_plm.data.formats import BLOCK_SIZE, BlockReader
from megatron_plm.errors import UserError

# Where the whole records of some text end: (text, start) -> a place behind `start`, 0 where none is known to. The
# text begins with a record, and what lies before `start` was looked at before.
FindEnd = Callable[[memoryview, int], int]


def blocks_of_records(reader: BlockReader, find_end: FindEnd, longest: int, reason: str) -> Iterator[memoryview]:
    """Yield the content of `reader` in blocks of about BLOCK_SIZE that end where records do; each has its own memory.

    Only the rest behind the last whole record is copied, to the front of the next block. A record larger than a block
    makes its block larger, up to `longest` bytes: beyond, a UserError tells `reason`.
    """
    rest = memoryview(b"")
    while True:
        # A block that holds no end of a record doubles, so that a long record is copied few times.
        more = max(BLOCK_SIZE, min(len(rest), longest - len(rest)))
        buffer = np.empty(len(rest) + more, dtype=np.uint8).data
        buffer[: len(rest)] = rest
        size = len(rest) + reader.readinto(buffer[len(rest) :])
        if size < len(buffer):
            if size:
                yield buffer[:size]
            return
        # A record's end may be told by bytes on both sides of the seam.
        end = find_end(buffer, max(0, len(rest) - 1))
        if end:
            yield buffer[:end]
        elif size > longest:
            raise UserError(f"{reader.label}: a record in it is longer than {longest:,} bytes: {reason}")
        rest = buffer[end:]
