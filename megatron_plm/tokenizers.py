"""Vocabularies: one table of token lists, and the `Tokenizer` that encodes and decodes with them.

A tokenizer maps one letter to one token id. The special tokens (<cls>, <eos>, ...) are never produced by
`encode`; the loader adds them, so one dataset serves every model that shares the letters.
"""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError, suggestion

STANDARD_AMINO_ACIDS = frozenset("ACDEFGHIKLMNPQRSTVWY")


@dataclass(frozen=True)
class Tokenizer:
    """An immutable vocabulary of fewer than 256 tokens.

    `tokens[i]` is the text of token id i. A token of one character stands for that letter; longer ones are
    special.
    """

    name: str
    tokens: tuple[str, ...]
    cls_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    mask_id: int

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the token list: two vocabularies with the same digest give the same ids."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    @functools.cached_property
    def residue_ids(self) -> npt.NDArray[np.uint8]:
        """Ids, ascending, of the letters: what masking may choose and replace with. No '.', '-', specials."""
        return _read_only(i for i, token in enumerate(self.tokens) if len(token) == 1 and token.isalpha())

    @functools.cached_property
    def standard_ids(self) -> npt.NDArray[np.uint8]:
        """Ids, ascending, of the 20 standard amino acids, shape [20]."""
        return _read_only(i for i, token in enumerate(self.tokens) if token in STANDARD_AMINO_ACIDS)

    def lookup_table(self, fold_case: bool = True) -> npt.NDArray[np.uint8]:
        """Return the table, shape [256], from a byte of text to its token id.

        A byte that is no letter of the vocabulary has `unk_id`. `fold_case` gives a lower-case letter the id
        of its upper-case form.
        """
        table = np.full(256, self.unk_id, dtype=np.uint8)
        for token_id, token in enumerate(self.tokens):
            if len(token) == 1:
                table[ord(token)] = token_id
                if fold_case and token.isalpha():
                    table[ord(token.lower())] = token_id
        return table

    def encode(self, sequence: str, fold_case: bool = True) -> npt.NDArray[np.uint8]:
        """Return the token ids, shape [len(sequence)], no specials added; an unknown letter is `unk_id`."""
        letters = np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)
        return self.lookup_table(fold_case)[letters]

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of the token ids, special tokens spelt out; ValueError outside the vocabulary."""
        text = []
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is outside {self.name}'s vocabulary of {self.vocab_size}")
            text.append(self.tokens[token_id])
        return "".join(text)


def _read_only(ids: Iterable[int]) -> npt.NDArray[np.uint8]:
    array = np.fromiter(ids, dtype=np.uint8)
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class _Vocabulary:
    """A row of the table: the token list and which token plays which special part."""

    tokens: tuple[str, ...]
    cls: str
    eos: str
    pad: str
    unk: str
    mask: str


_VOCABULARIES = {
    # fair-esm's alphabet "ESM-1b", which ESM-2 uses, in its order.
    "esm2": _Vocabulary(
        tokens=("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"),
        cls="<cls>", eos="<eos>", pad="<pad>", unk="<unk>", mask="<mask>",
    ),
    # tape-proteins' IUPAC_VOCAB: A to Z without J.
    "tape-iupac": _Vocabulary(
        tokens=("<pad>", "<mask>", "<cls>", "<sep>", "<unk>", *"ABCDEFGHIKLMNOPQRSTUVWXYZ"),
        cls="<cls>", eos="<sep>", pad="<pad>", unk="<unk>", mask="<mask>",
    ),
}  # fmt: skip

TOKENIZER_NAMES = tuple(_VOCABULARIES)


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of that name; a UserError lists the known ones."""
    if name not in _VOCABULARIES:
        raise UserError(
            f"unknown tokenizer {name!r}: expected one of {', '.join(_VOCABULARIES)}{suggestion(name, _VOCABULARIES)}"
        )
    vocabulary = _VOCABULARIES[name]
    return Tokenizer(
        name=name,
        tokens=vocabulary.tokens,
        cls_id=vocabulary.tokens.index(vocabulary.cls),
        eos_id=vocabulary.tokens.index(vocabulary.eos),
        pad_id=vocabulary.tokens.index(vocabulary.pad),
        unk_id=vocabulary.tokens.index(vocabulary.unk),
        mask_id=vocabulary.tokens.index(vocabulary.mask),
    )
