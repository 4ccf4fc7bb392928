"""Tokens of several letters: a sentencepiece model (Kudo and Richardson 2018) as a tokenizer.

The model file is the vocabulary, and goes with whatever was made with it: datasets and checkpoints hold a copy. To
decode, mask or train nothing but its list of pieces is needed; only to encode is the package sentencepiece.
"""

import base64
import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError
from megatron_plm.tokenizers.piece_model import SPECIAL_TOKENS, parse_model
from megatron_plm.tokenizers.vocabulary import STANDARD_AMINO_ACIDS, Tokenizer, get_tokenizer, read_only

# The letters that pieces are made of, those of ESM-2: so what is an unknown letter, and which split a protein falls
# into, depends on no model.
PIECE_LETTERS = tuple(token for token in get_tokenizer("esm2").tokens if len(token) == 1)
# Stands for every other letter in the text that sentencepiece is given: the first of these that no piece has.
_UNKNOWN = "?" + "".join(map(chr, range(1, 0x7F)))

# Longer sequences are cut into stretches of so many letters, which bounds memory.
LONGEST_STRETCH = 1 << 20


@dataclass(frozen=True)
class PieceTokenizer(Tokenizer):
    """A sentencepiece model. A letter that it doesn't know is one `<unk>`, where sentencepiece joins neighbouring ones.

    Its name is that of its file, without folders. `model` is the file's content.
    """

    model: bytes = field(repr=False)
    in_text: tuple[bool, ...] = field(repr=False)

    @staticmethod
    def from_model(model: bytes, *, name: str, place: str) -> "PieceTokenizer":
        """The tokenizer of a model file's content; `place` names it in messages. Raises UserError; see parse_model."""
        parsed = parse_model(model, place)
        cls_id, pad_id, eos_id, unk_id, mask_id = map(parsed.pieces.index, SPECIAL_TOKENS)
        tokenizer = PieceTokenizer(
            name=name, tokens=parsed.pieces, cls_id=cls_id, pad_id=pad_id, eos_id=eos_id, unk_id=unk_id,
            mask_id=mask_id, model=model, in_text=parsed.in_text,
        )  # fmt: skip
        if not len(tokenizer.standard_ids):
            raise UserError(f"{place} has no piece that stands for an amino acid: train it on proteins, in upper case")
        return tokenizer

    @property
    def one_letter_a_token(self) -> bool:
        """False."""
        return False

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the model file: the pieces and their scores decide the ids."""
        return hashlib.sha256(self.model).hexdigest()

    @functools.cached_property
    def residue_ids(self) -> npt.NDArray[np.integer]:
        """Ids, ascending, of the pieces with letters: what masking may choose. No gaps alone, no specials."""
        return read_only((i for i in self._used_ids() if any(map(str.isalpha, self.tokens[i]))), self.dtype)

    @functools.cached_property
    def standard_ids(self) -> npt.NDArray[np.integer]:
        """Ids, ascending, of the pieces of standard amino acids only: what masking replaces pieces with."""
        return read_only((i for i in self._used_ids() if STANDARD_AMINO_ACIDS.issuperset(self.tokens[i])), self.dtype)

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        """The letters that text can be made of: each has a piece of its own."""
        pairs = zip(self.tokens, self.in_text, strict=True)
        return frozenset(token for token, in_text in pairs if in_text and token in PIECE_LETTERS)

    def _used_ids(self) -> Iterator[int]:
        """The ids that encoding can give, but for `unk_id`."""
        return (i for i, token in enumerate(self.tokens) if self.in_text[i] and self._known.issuperset(token))

    @functools.cached_property
    def unknown_entry(self) -> int:
        """What `lookup_table` holds for a byte that is no known letter: a byte that is in no piece."""
        used = set("".join(itertools.compress(self.tokens, self.in_text)))
        return next((ord(letter) for letter in _UNKNOWN if letter not in used), 0)

    def lookup_table(self, fold_case: bool = True) -> npt.NDArray[np.uint8]:
        """Return the table, shape [256], from a byte of text to the letter that it stands for: `segment` takes those.

        A byte that is no known letter has `unknown_entry`. `fold_case` gives a lower-case letter its upper-case form.
        """
        table = np.full(256, self.unknown_entry, dtype=np.uint8)
        for letter in self._known:
            table[ord(letter)] = ord(letter)
            if fold_case:
                table[ord(letter.lower())] = ord(letter)
        return table

    def encode(self, sequence: str, fold_case: bool = True) -> npt.NDArray[np.integer]:
        """Return the token ids of a protein, no specials added; see `segment`."""
        letters = np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)
        return self.segment(self.lookup_table(fold_case)[letters], np.array([len(letters)]))[0]

    def segment(
        self, letters: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int32]]:
        """Return the token ids of proteins that lie end to end, and the number of tokens of each.

        `letters` are entries of `lookup_table`, uint8; `lengths` says how many each protein has. A protein of more than
        LONGEST_STRETCH is cut into stretches of that length, and each of them into pieces. Several threads can call
        this at a time. Raises UserError where the package sentencepiece is missing or refuses the model.
        """
        sizes, num_stretches = _stretches(lengths)
        ends = np.cumsum(sizes)
        text = letters.tobytes().decode("ascii")
        texts = [text[begin:end] for begin, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True)]
        parts: list[npt.NDArray[np.integer]] = [np.empty(0, self.dtype)]
        counts: list[int] = []
        for some in _about(LONGEST_STRETCH, texts):
            # Arrays, because lists of numbers would be made while all other threads wait.
            encoded = self._encoder.encode(some, return_type="numpy", num_threads=1)
            counts += map(len, encoded)
            parts.append(np.concatenate(encoded).astype(self.dtype))
        ids = np.concatenate(parts)
        repeats = self._repeats(ids, letters, ends - sizes)
        token_ends = _from_zero(counts)[_from_zero(num_stretches)]
        num_tokens = np.diff(_from_zero(repeats)[token_ends])
        return np.repeat(ids, repeats), num_tokens.astype(np.int32)

    def _repeats(
        self, ids: npt.NDArray[np.integer], letters: npt.NDArray[np.integer], begins: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """How many letters each `<unk>` stands for; 1 for the other tokens."""
        repeats = np.ones(len(ids), dtype=np.int64)
        unknown = letters == self.unknown_entry
        if unknown.any():
            first = unknown.copy()
            first[1:] &= ~unknown[:-1]
            first[begins] = unknown[begins]
            run = np.cumsum(first)[unknown] - 1
            repeats[ids == self.unk_id] = np.bincount(run)
        return repeats

    def check_encoder(self) -> None:
        """Raise UserError where `encode` and `segment` would: sentencepiece is missing or refuses the model."""
        _ = self._encoder

    @functools.cached_property
    def _encoder(self) -> Any:
        try:
            import sentencepiece

            sentencepiece.SentencePieceProcessor.EncodeAsNumpy  # noqa: B018 (older versions lack it)
        except (ImportError, AttributeError):
            raise UserError(
                f"tokenizer {self.name}: cutting proteins into pieces needs the package sentencepiece, 0.2.3 or newer: "
                "run `pip install 'megatron-plm[sentencepiece]'`"
            ) from None
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"tokenizer {self.name}: sentencepiece refuses the model: {error}") from None

    def described(self) -> dict[str, str]:
        """What a dataset records of its tokenizer: the whole model, in base64."""
        return {**super().described(), "model": base64.b64encode(self.model).decode()}


def _stretches(lengths: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the lengths of the stretches that proteins are cut into, and how many there are of each."""
    counts = -(-lengths.astype(np.int64) // LONGEST_STRETCH)
    sizes = np.full(int(counts.sum()), LONGEST_STRETCH, dtype=np.int64)
    last = np.cumsum(counts)[counts > 0] - 1
    sizes[last] = (lengths - (counts - 1) * LONGEST_STRETCH)[counts > 0]
    return sizes, counts


def _from_zero(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Sums of the first 0, 1, 2, ... counts."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _about(size: int, texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, some at a time: at least one, and more while they have fewer than `size` letters."""
    some: list[str] = []
    total = 0
    for text in texts:
        some.append(text)
        total += len(text)
        if total >= size:
            yield some
            some, total = [], 0
    if some:
        yield some
