"""What readers hand to the rest: whole records as token ids."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RecordBatch:
    """Some whole records of the input, in its order.

    Attributes:
        tokens: token ids of the records, end to end; uint8, uint16 or int32, shape [n].
        lengths: tokens of each record, int32 [k], each at least 1, n in all.
        names: a 128-bit hash of each record's name (its identifier in the input), uint64 [k, 2]; None where not asked.
        identifiers: the names as they stand in the input, k of them; None where not asked.
    """

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int32]
    names: npt.NDArray[np.uint64] | None = None
    identifiers: list[str] | None = None
