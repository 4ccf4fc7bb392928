"""Tokens of several letters: the ids are sentencepiece's own, nothing is lost, and the model goes with the data."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from piece_models import NORMAL, SPECIALS, encoded, their_ids, theirs, trained, write

from megatron_plm.errors import UserError
from megatron_plm.tokenizers import (
    PIECE_LETTERS,
    SPECIAL_TOKENS,
    STANDARD_AMINO_ACIDS,
    PieceTokenizer,
    get_tokenizer,
    open_tokenizer,
    pieces,
    recorded_tokenizer,
)

MODELS = {name: trained(name) for name in ("unigram", "bpe")}
PEERS = {name: theirs(tokenizer) for name, tokenizer in MODELS.items()}
KNOWN = st.text("".join(PIECE_LETTERS), max_size=300)
LETTERS = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != ">")
# Mostly proteins, with any visible letter between.
TEXTS = st.lists(st.one_of(KNOWN, st.text(LETTERS, max_size=12)), max_size=6).map("".join)

either = pytest.mark.parametrize("name", MODELS)


def folded(text: str) -> str:
    """Upper case, '?' for what the models don't know."""
    return "".join(letter if letter in PIECE_LETTERS else "?" for letter in text.upper())


@either
def test_special_tokens_come_first_and_every_letter_of_esm2_is_a_token(name: str) -> None:
    tokenizer = MODELS[name]
    roles = (tokenizer.cls_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
    assert roles == (0, 1, 2, 3, 4)
    assert tokenizer.tokens[:5] == SPECIAL_TOKENS
    assert set(PIECE_LETTERS) <= set(tokenizer.tokens)
    assert tokenizer.vocab_size == 400
    assert tokenizer.dtype == np.uint16


@either
@given(text=TEXTS)
def test_the_ids_are_those_of_sentencepiece(name: str, text: str) -> None:
    ids = MODELS[name].encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == their_ids(PEERS[name], folded(text))


@either
@given(text=KNOWN)
def test_decoding_gives_the_protein_back_with_any_case(name: str, text: str) -> None:
    tokenizer = MODELS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text.lower())) == text
    unknown = "".join("<unk>" if letter.isalpha() else letter for letter in text)
    assert tokenizer.decode(tokenizer.encode(text.lower(), fold_case=False)) == unknown


@either
@given(texts=st.lists(TEXTS.filter(bool), max_size=8), longest=st.sampled_from([1, 7, 1 << 20]))
def test_proteins_end_to_end_are_segmented_each_by_itself_long_ones_in_stretches(
    name: str, texts: list[str], longest: int
) -> None:
    tokenizer = MODELS[name]
    letters = np.frombuffer("".join(map(folded, texts)).encode(), dtype=np.uint8)
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LONGEST_STRETCH", longest)
        ids, counts = tokenizer.segment(letters, lengths)
    expected = [
        [id for i in range(0, len(text), longest) for id in their_ids(PEERS[name], folded(text[i : i + longest]))]
        for text in texts
    ]
    assert counts.dtype == np.int32
    assert counts.tolist() == list(map(len, expected))
    assert ids.tolist() == [id for protein in expected for id in protein]


@either
def test_a_million_letters_are_one_stretch_and_more_are_cut(name: str) -> None:
    tokenizer, peer, rng = MODELS[name], PEERS[name], random.Random(1)
    text = "".join(rng.choices("LAGVSERTIDPKQNFYMHWCX?", k=pieces.LONGEST_STRETCH + 1000))
    million = text[:1_000_000]
    assert tokenizer.encode(million).tolist() == their_ids(peer, million)
    first, second = text[: pieces.LONGEST_STRETCH], text[pieces.LONGEST_STRETCH :]
    assert tokenizer.encode(text).tolist() == their_ids(peer, first) + their_ids(peer, second)
    for same in ("A" * 1_000_000, "?" * 1_000_000, "A?" * 500_000):
        assert tokenizer.encode(same).tolist() == their_ids(peer, same)


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = PieceTokenizer.from_model(MODELS["bpe"].model, name="x", place="x")
    rng = random.Random(2)
    texts = ["".join(rng.choices("LAGVSERTIDPKQNFYMHWC?", k=5000)) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = [ids.tolist() for ids in pool.map(tokenizer.encode, texts)]
    assert found == [their_ids(PEERS["bpe"], text) for text in texts]


@either
def test_masking_may_choose_any_piece_with_a_letter_and_puts_amino_acids_there(name: str) -> None:
    tokenizer = MODELS[name]
    texts = [tokenizer.tokens[i] for i in tokenizer.residue_ids]
    assert set(tokenizer.tokens) - set(texts) == {*SPECIAL_TOKENS, ".", "-"}
    standard = {tokenizer.tokens[i] for i in tokenizer.standard_ids}
    assert standard == {text for text in texts if set(text) <= STANDARD_AMINO_ACIDS}
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.residue_ids[0] = 0


def test_pieces_that_no_protein_holds_are_never_put_anywhere() -> None:
    texts = ["L", "A", "LA", "L▁", "AJ", "J", "a", "LC", "-", "A-", "?", "A?"]
    model = encoded(
        [(t, 0.0, k) for t, k in SPECIALS.items()] + [(t, -float(i + 1), NORMAL) for i, t in enumerate(texts)]
    )
    tokenizer = PieceTokenizer.from_model(model, name="x", place="x")
    assert [tokenizer.tokens[i] for i in tokenizer.residue_ids] == ["L", "A", "LA", "A-"]
    assert [tokenizer.tokens[i] for i in tokenizer.standard_ids] == ["L", "A", "LA"]
    assert tokenizer.decode(tokenizer.encode("LAJC-aLJJ")) == "LA<unk><unk>-AL<unk><unk>"
    assert tokenizer.dtype == np.uint8


def test_a_path_opens_a_model_and_its_name_is_that_of_the_file(tmp_path) -> None:
    path = write(tmp_path / "ünï 蛋白.model", MODELS["unigram"])
    opened = open_tokenizer(str(path))
    assert opened.name == "ünï 蛋白.model"
    assert opened.sha256 == MODELS["unigram"].sha256 != MODELS["bpe"].sha256
    assert opened.encode("MKTAYIAK").tolist() == MODELS["unigram"].encode("MKTAYIAK").tolist()
    assert open_tokenizer("esm2") is get_tokenizer("esm2")
    with pytest.raises(
        UserError, match=r"unknown tokenizer 'esm-2'.*or a sentencepiece model FILE.model; did you mean"
    ):
        open_tokenizer("esm-2")
    with pytest.raises(UserError, match=r"nowhere.model' cannot be read: No such file"):
        open_tokenizer(str(tmp_path / "nowhere.model"))


def test_what_a_dataset_records_is_the_model() -> None:
    tokenizer = MODELS["bpe"]
    assert recorded_tokenizer(tokenizer.described(), "x.json") == tokenizer
    assert get_tokenizer("esm2").described() == {"name": "esm2", "sha256": get_tokenizer("esm2").sha256}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "?"}, "x.json, the model of tokenizer bpe.model is damaged"),
        ({"model": 3}, "x.json, the model of tokenizer bpe.model is damaged"),
        ({"model": ""}, "is no sentencepiece model, or is damaged"),
        ({"sha256": "0" * 64}, "its SHA-256 is not the one beside it"),
    ],
)
def test_a_damaged_record_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recorded_tokenizer({**MODELS["bpe"].described(), **change}, "x.json")


def test_only_encoding_needs_sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = MODELS["bpe"].encode("MKTAYIAK")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    tokenizer = PieceTokenizer.from_model(MODELS["bpe"].model, name="x.model", place="x")
    assert tokenizer.decode(ids) == "MKTAYIAK"
    assert len(tokenizer.residue_ids) == 393
    with pytest.raises(UserError, match=r"tokenizer x.model: .* run `pip install 'megatron-plm\[sentencepiece\]'`"):
        tokenizer.encode("MKTAYIAK")
