"""Reading sentencepiece's model files without sentencepiece: what training and decoding need of them.

A model file is a protocol buffer, `ModelProto` of sentencepiece_model.proto (github.com/google/sentencepiece), of which
these fields matter: 1 pieces (1 text, 3 type), 2 how it was trained (3 algorithm), 3 how text is normalised (2 table of
replacements, 3 add_dummy_prefix). The encoding: developers.google.com/protocol-buffers/docs/encoding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_plm.errors import UserError

SPECIAL_TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")

# Types of pieces.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WAY_OUT = "make one with tools/train_tokenizer.py"


@dataclass(frozen=True)
class PieceModel:
    """What a model file holds: the pieces' texts in the order of their ids, and which of them text is made of."""

    pieces: tuple[str, ...]
    in_text: tuple[bool, ...]


def parse_model(content: bytes, place: str) -> PieceModel:
    """Read a model that proteins can be tokenized with; `place` names it in messages.

    Raises UserError where it is no sentencepiece model or a damaged one, lacks one of SPECIAL_TOKENS, or changes text
    before or while it cuts it, so that letters would be lost.
    """
    try:
        return _parsed(content, place)
    except (ValueError, IndexError) as error:
        raise UserError(f"{place} is no sentencepiece model, or is damaged ({error}); {_WAY_OUT}") from None


def _parsed(content: bytes, place: str) -> PieceModel:
    pieces, types = [], []
    # The proto's defaults, for files that leave a field out.
    algorithm, replacements, dummy_prefix = 1, b"", True
    for number, value in _fields(content):
        if number == 1:
            text, kind = _piece(_message(value))
            pieces.append(text)
            types.append(kind)
        elif number == 2:
            algorithm = _number(dict(_fields(_message(value))).get(3, algorithm))
        elif number == 3:
            normaliser = dict(_fields(_message(value)))
            replacements = _message(normaliser.get(2, replacements))
            dummy_prefix = bool(_number(normaliser.get(3, dummy_prefix)))
    if not pieces:
        raise ValueError("it lists no pieces")
    if len(set(pieces)) != len(pieces) or "" in pieces:
        raise ValueError("a piece is listed twice, or is empty")
    _check_special(pieces, types, place)
    if _ALGORITHMS.get(algorithm) not in ("unigram", "bpe"):
        name = _ALGORITHMS.get(algorithm, str(algorithm))
        raise UserError(f"{place} is a sentencepiece model of type {name}, expected unigram or bpe; {_WAY_OUT}")
    if dummy_prefix or replacements:
        what = "puts a space before each text (add_dummy_prefix)" if dummy_prefix else "normalises its text"
        raise UserError(
            f"{place} {what}, which proteins must not have: train it with add_dummy_prefix=false and "
            f"normalization_rule_name=identity, or {_WAY_OUT}"
        )
    if _BYTE in types:
        raise UserError(f"{place} spells unknown letters as bytes: train it without byte_fallback, or {_WAY_OUT}")
    return PieceModel(tuple(pieces), tuple(kind in (_NORMAL, _USER_DEFINED) for kind in types))


def _check_special(pieces: list[str], types: list[int], place: str) -> None:
    kind_of = dict(zip(pieces, types, strict=True))
    for token in SPECIAL_TOKENS:
        wanted = _UNKNOWN if token == "<unk>" else _CONTROL
        if kind_of.get(token) != wanted:
            kind = "unknown" if wanted == _UNKNOWN else "control"
            raise UserError(
                f"{place} has no {kind} symbol {token}: models here need {', '.join(SPECIAL_TOKENS)}; {_WAY_OUT}"
            )


def _piece(content: bytes) -> tuple[str, int]:
    fields = dict(_fields(content))
    return _message(fields.get(1, b"")).decode(), _number(fields.get(3, _NORMAL))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a message; raises ValueError or IndexError where it is none."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == _VARINT:
            value, place = _varint(content, place)
        else:
            if kind == _BYTES:
                size, place = _varint(content, place)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"byte {place}: a field of type {kind}")
            value, place = content[place : place + size], place + size
            if place > len(content):
                raise ValueError(f"it ends {place - len(content):,} bytes too early")
        if number == 0:
            raise ValueError(f"byte {place}: a field without a number")
        yield number, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """Return the number at `place`, of seven bits a byte, and the place behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(content):
            raise ValueError("it ends inside a number")
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError(f"byte {place}: a number longer than 64 bits")


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text or a message was expected")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number was expected")
    return value
