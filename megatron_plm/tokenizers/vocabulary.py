"""Vocabularies: one table of token lists, and the `Tokenizer` that encodes and decodes with them.

A tokenizer of the table maps one letter to one token id; pieces.py has those whose tokens are several letters. The
special tokens (<cls>, <eos>, ...) are never produced by `encode`; the loader adds them, so one dataset serves every
model that shares the letters.
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
    """An immutable vocabulary; this class is for one of fewer than 256 tokens, one for each letter.

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

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype of the index format that holds every token id."""
        return np.dtype(next(t for t in (np.uint8, np.uint16, np.int32) if self.vocab_size - 1 <= np.iinfo(t).max))

    @property
    def one_letter_a_token(self) -> bool:
        """Whether a protein has as many tokens as letters, each in the place of its letter."""
        return True

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the token list: two vocabularies with the same digest give the same ids."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    @functools.cached_property
    def residue_ids(self) -> npt.NDArray[np.integer]:
        """Ids, ascending, of the letters: what masking may choose. No '.', '-', specials."""
        return read_only((i for i, token in enumerate(self.tokens) if len(token) == 1 and token.isalpha()), self.dtype)

    @functools.cached_property
    def standard_ids(self) -> npt.NDArray[np.integer]:
        """Ids, ascending, of the 20 standard amino acids, shape [20]: what masking replaces letters with."""
        return read_only((i for i, token in enumerate(self.tokens) if token in STANDARD_AMINO_ACIDS), self.dtype)

    @property
    def unknown_entry(self) -> int:
        """What `lookup_table` holds for a byte that is no letter of the vocabulary."""
        return self.unk_id

    def lookup_table(self, fold_case: bool = True) -> npt.NDArray[np.uint8]:
        """Return the table, shape [256], from a byte of text to its token id: what the scanners of input write.

        A byte that is no letter of the vocabulary has `unknown_entry`. `fold_case` gives a lower-case letter the id
        of its upper-case form.
        """
        table = np.full(256, self.unk_id, dtype=np.uint8)
        for token_id, token in enumerate(self.tokens):
            if len(token) == 1:
                table[ord(token)] = token_id
                if fold_case and token.isalpha():
                    table[ord(token.lower())] = token_id
        return table

    def encode(self, sequence: str, fold_case: bool = True) -> npt.NDArray[np.integer]:
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

    def described(self) -> dict[str, str]:
        """What a dataset records of its tokenizer; see `recorded_tokenizer`."""
        return {"name": self.name, "sha256": self.sha256}


def read_only(ids: Iterable[int], dtype: npt.DTypeLike) -> npt.NDArray[np.integer]:
    """The ids as an array that cannot be changed."""
    array = np.fromiter(ids, dtype=dtype)
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
    # ProteinLM's iupac_vocab.txt.
    "proteinlm": _Vocabulary(
        tokens=("[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", "[unused1]", *"ABCDEFGHIKLMNOPQRSTUVWXYZ"),
        cls="[CLS]", eos="[SEP]", pad="[PAD]", unk="[UNK]", mask="[MASK]",
    ),
    # AMPLIFY's; it knows no X, Z, U and O.
    "amplify": _Vocabulary(
        tokens=("<pad>", "<unk>", "<mask>", "<bos>", "<eos>", *"|LAGVSERTIDPKQNFYMHWCB"),
        cls="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", mask="<mask>",
    ),
}  # fmt: skip

TOKENIZER_NAMES = tuple(_VOCABULARIES)


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of that name in the table; a UserError lists the known ones."""
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


def token_roles(tokenizer: Tokenizer) -> list[str]:
    """The tokens of a vocabulary with ESM-2's names for the five special roles, so that vocabularies can be matched.

    Vocabularies name the same role differently: `<eos>` of ESM-2 is `<sep>` of TAPE.
    """
    roles = {
        tokenizer.cls_id: "<cls>",
        tokenizer.eos_id: "<eos>",
        tokenizer.pad_id: "<pad>",
        tokenizer.unk_id: "<unk>",
        tokenizer.mask_id: "<mask>",
    }
    return [roles.get(i, token) for i, token in enumerate(tokenizer.tokens)]


def matching_rows(tokenizer: Tokenizer, other: Tokenizer) -> list[int | None]:
    """For each token of `tokenizer` the id of the one of the same role or text in `other`; None where there is none."""
    row = {role: i for i, role in enumerate(token_roles(other))}
    return [row.get(role) for role in token_roles(tokenizer)]
