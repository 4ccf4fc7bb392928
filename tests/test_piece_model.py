"""Reading model files: what sentencepiece itself reads from them, and nothing but a sentence for what is no model."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from piece_models import CONTROL, NORMAL, SPECIALS, encoded, theirs, trained, trained_by_them

from megatron_plm.errors import UserError
from megatron_plm.tokenizers import PieceTokenizer
from megatron_plm.tokenizers.piece_model import parse_model

BPE = trained("bpe", vocab_size=60)
ROLES = {"bos_piece": "<cls>", "pad_piece": "<pad>", "eos_piece": "<eos>", "unk_piece": "<unk>", "pad_id": 3}
PLAIN = {"add_dummy_prefix": False, "normalization_rule_name": "identity"}
MASK = {"control_symbols": ["<mask>"]}
GOOD = [(text, 0.0, kind) for text, kind in SPECIALS.items()] + [(text, -1.0, NORMAL) for text in "LAGVSE"]


@pytest.mark.parametrize("tokenizer", [BPE, trained("unigram", vocab_size=300)], ids=lambda t: t.name)
def test_pieces_and_types_are_those_that_sentencepiece_reads(tokenizer: PieceTokenizer) -> None:
    peer, parsed = theirs(tokenizer), parse_model(tokenizer.model, "x")
    assert list(parsed.pieces) == [peer.id_to_piece(i) for i in range(peer.get_piece_size())]
    assert list(parsed.in_text) == [
        not peer.is_control(i) and not peer.is_unknown(i) for i in range(len(parsed.pieces))
    ]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_that_somebody_trained_for_proteins_is_used(model_type: str) -> None:
    model = trained_by_them(**ROLES, **PLAIN, **MASK, model_type=model_type)
    tokenizer = PieceTokenizer.from_model(model, name="x", place="x")
    assert tokenizer.decode(tokenizer.encode("MKTAYIAKQRJ")) == "MKTAYIAKQR<unk>"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "x has no control symbol <cls>: models here need <cls>, <pad>, <eos>, <unk>, <mask>; make one with"),
        ({**ROLES, **PLAIN}, "no control symbol <mask>"),
        ({**ROLES, **PLAIN, "user_defined_symbols": ["<mask>"]}, "no control symbol <mask>"),
        ({**ROLES, **MASK, "normalization_rule_name": "identity"}, "puts a space before each text"),
        ({**ROLES, **MASK, "add_dummy_prefix": False}, "normalises its text"),
        ({**ROLES, **MASK, **PLAIN, "model_type": "word"}, "of type word, expected unigram or bpe"),
        ({**ROLES, **MASK, **PLAIN, "model_type": "char"}, "of type char"),
        ({**ROLES, **MASK, **PLAIN, "byte_fallback": True, "vocab_size": 300}, "spells unknown letters as bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_model_that_does_not_fit_proteins_is_refused_with_the_reason(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_model(trained_by_them(**options), "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "lists no pieces"),
        (b"\x00\x00", "without a number"),
        (b"\x0f", "field of type 7"),
        (b"\x0a\x05ab", "ends 3 bytes too early"),
        (b"\x80", "ends inside a number"),
        (b"\x08" + b"\xff" * 10, "longer than 64 bits"),
        (b"\x08\x01", "a number where text"),
        (b"\x0a\x03\x0a\x01\xff", "is no sentencepiece model"),
        (b"\x0a\x02\x18\x01", "is empty"),
        (b">P1\nMKTAYIAK\n" * 9, "is no sentencepiece model"),
        (encoded([*GOOD, ("L", -1.0, NORMAL)]), "listed twice"),
        (encoded([*GOOD[:4], *GOOD[5:]]), "no control symbol <mask>"),
        (
            encoded([("<unk>", 0.0, CONTROL) if piece[0] == "<unk>" else piece for piece in GOOD]),
            "no unknown symbol <unk>",
        ),
        (encoded(GOOD, identity=False), "puts a space before each text"),
    ],
)
def test_what_is_no_model_is_told(content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse_model(content, "tokenizer 'x.model'")
    assert str(caught.value).startswith("tokenizer 'x.model'")
    assert "\n" not in str(caught.value)


def test_a_model_without_amino_acids_is_refused() -> None:
    with pytest.raises(UserError, match="no piece that stands for an amino acid"):
        PieceTokenizer.from_model(encoded([*GOOD[:5], ("l", -1.0, NORMAL)]), name="x", place="x")


def test_a_truncated_model_is_refused_or_has_lost_nothing_that_matters() -> None:
    whole = parse_model(BPE.model, "x")
    refused = 0
    for size in range(len(BPE.model)):
        try:
            assert parse_model(BPE.model[:size], "x") == whole
        except UserError:
            refused += 1
    assert refused > 0.9 * len(BPE.model)


@given(st.data())
def test_a_model_with_wrong_bytes_is_used_or_refused_as_any_other(data: st.DataObject) -> None:
    model = bytearray(BPE.model)
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        PieceTokenizer.from_model(bytes(model), name="x", place="x").encode("MKTAYIAKQR")
