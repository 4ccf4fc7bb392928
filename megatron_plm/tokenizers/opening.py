"""The tokenizer that a user or a dataset names."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_plm.errors import UserError, suggestion
from megatron_plm.tokenizers.pieces import PieceTokenizer
from megatron_plm.tokenizers.vocabulary import TOKENIZER_NAMES, Tokenizer, get_tokenizer

MODEL_SUFFIX = ".model"


def open_tokenizer(word: str) -> Tokenizer:
    """Return the tokenizer that `word` means: a name of the table, or the path of a sentencepiece model.

    A path ends in `.model`. Raises UserError for an unknown name, and where the file cannot be read or used.
    """
    if word in TOKENIZER_NAMES:
        return get_tokenizer(word)
    if not word.endswith(MODEL_SUFFIX):
        known = ", ".join(TOKENIZER_NAMES)
        raise UserError(
            f"unknown tokenizer {word!r}: expected one of {known}, or a sentencepiece model FILE{MODEL_SUFFIX}"
            f"{suggestion(word, TOKENIZER_NAMES)}"
        )
    return read_model(Path(word), name=Path(word).name)


def read_model(path: Path, *, name: str) -> PieceTokenizer:
    """Return the tokenizer of a model file, under `name`; raises UserError where it cannot be read or used."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer '{path}' cannot be read: {error.strerror or error}; make one with tools/train_tokenizer.py"
        ) from None
    return PieceTokenizer.from_model(content, name=name, place=f"tokenizer '{path}'")


def recorded_tokenizer(described: Mapping[str, Any], place: str) -> PieceTokenizer:
    """Return the sentencepiece model that a dataset holds: `described` is what PieceTokenizer.described gave.

    `place` names the dataset's description. Raises UserError where the model is not what was recorded.
    """
    name = str(described.get("name"))
    place = f"{place}, the model of tokenizer {name}"
    try:
        content = base64.b64decode(described["model"], validate=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} is damaged ({error}); copy the dataset again") from None
    tokenizer = PieceTokenizer.from_model(content, name=name, place=place)
    if tokenizer.sha256 != described.get("sha256"):
        raise UserError(f"{place} is damaged: its SHA-256 is not the one beside it; copy the dataset again")
    return tokenizer
