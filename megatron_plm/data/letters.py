"""What records say, letter by letter, apart from how a tokenizer numbers its tokens: their hashes."""

import numpy as np
import numpy.typing as npt

from megatron_plm.data._native import LetterTable
from megatron_plm.data.records import RecordBatch
from megatron_plm.tokenizers import Tokenizer

_OTHER = "?"  # stands for what is no letter
_DUPLICATE_SEED = 1
_SPLIT_SEED = 2  # changing it moves proteins between the splits of everyone


class LetterHashes:
    """MurmurHash3 x64 128 of the letters of each record, in upper case.

    With `letters_only`, whatever is no letter A to Z counts alike ('*', '-', '.', a letter that the tokenizer doesn't
    know), so that the hash is the same for every tokenizer that knows the letters. Without, records with equal hashes
    have equal tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, letters_only: bool) -> None:
        texts = [_text(token, letters_only=letters_only) for token in tokenizer.tokens]
        self._table = LetterTable([text.encode() for text in texts])
        self._seed = _SPLIT_SEED if letters_only else _DUPLICATE_SEED

    def of(self, batch: RecordBatch) -> npt.NDArray[np.uint64]:
        """Return the hashes of the records of a batch, uint64 [k, 2]."""
        return self._table.hash_records(batch.tokens, batch.lengths, self._seed)


def _text(token: str, *, letters_only: bool) -> str:
    if token.startswith("<") and token.endswith(">") and len(token) > 1:
        return _OTHER
    upper = token.upper()
    if letters_only:
        upper = "".join(letter if "A" <= letter <= "Z" else _OTHER for letter in upper)
    return upper
