"""Sentencepiece models for the tests: trained by our command, by sentencepiece itself, or put together by hand."""

import io
import struct
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from processes import REPOSITORY

from megatron_plm.data.readers import open_inputs
from megatron_plm.data.train_tokenizer import sample_letters, train_tokenizer
from megatron_plm.tokenizers import PieceTokenizer

EXAMPLES = REPOSITORY / "examples" / "data"
CONTROL, UNKNOWN, NORMAL = 3, 2, 1
SPECIALS = {"<cls>": CONTROL, "<pad>": CONTROL, "<eos>": CONTROL, "<unk>": UNKNOWN, "<mask>": CONTROL}


def trained(model_type: str, *, vocab_size: int = 400, max_letters: int = 60_000) -> PieceTokenizer:
    """A model of our own, of the example proteins."""
    inputs = open_inputs([EXAMPLES / "pretrain_valid.fasta.gz"])
    sample = sample_letters(inputs, max_letters=max_letters, seed=1)
    return train_tokenizer(sample, vocab_size=vocab_size, model_type=model_type, name=f"{model_type}.model")


def theirs(tokenizer: PieceTokenizer) -> sentencepiece.SentencePieceProcessor:
    """The peer: sentencepiece with the same model."""
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


def their_ids(peer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """What sentencepiece makes of a text, one unknown token for each letter that it has joined to one."""
    ids = []
    for piece in peer.encode(text, out_type=str):
        found = peer.piece_to_id(piece)
        ids += [found] * (len(piece) if found == peer.unk_id() else 1)
    return ids


def trained_by_them(**options: object) -> bytes:
    """A model that somebody trained with sentencepiece's own defaults, but for `options`."""
    model = io.BytesIO()
    texts = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "ACDEFGHIKLMNPQRSTVWY"] * 20
    given = {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 3, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **given)
    return model.getvalue()


def encoded(pieces: Iterable[tuple[str, float, int]], *, identity: bool = True) -> bytes:
    """The bytes of a unigram model with these pieces (text, score, type), as protocol buffers lay them out."""

    def field(number: int, content: bytes) -> bytes:
        size, length = b"", len(content)
        while length > 0x7F:
            size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    parts = [
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))
        for text, score, kind in pieces
    ]
    # unigram; ids of the special tokens as in SPECIALS; no dummy prefix.
    ids = b"".join(bytes([*key, value]) for key, value in [
        (b"\xc0\x02", 3), (b"\xc8\x02", 0), (b"\xd0\x02", 2), (b"\xd8\x02", 1),
    ])  # fmt: skip
    names = b"".join(
        bytes([number << 3 & 0x7F | 2 | 0x80, number >> 4, len(text)]) + text
        for number, text in [(45, b"<unk>"), (46, b"<cls>"), (47, b"<eos>"), (48, b"<pad>")]
    )
    normaliser = b"\x18\x00\x20\x00" if identity else b""
    return b"".join([*parts, field(2, b"\x18\x01" + ids + names), field(3, normaliser)])


def write(path: Path, tokenizer: PieceTokenizer) -> Path:
    path.write_bytes(tokenizer.model)
    return path
