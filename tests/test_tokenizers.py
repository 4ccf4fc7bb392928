"""The vocabularies: the peers' tokens in the peers' order."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import environment
from transformers import EsmTokenizer

from megatron_plm.errors import UserError
from megatron_plm.tokenizers import STANDARD_AMINO_ACIDS, TOKENIZER_NAMES, get_tokenizer

ESM2_TOKENS = [
    "<cls>",
    "<pad>",
    "<eos>",
    "<unk>",
    "L",
    "A",
    "G",
    "V",
    "S",
    "E",
    "R",
    "T",
    "I",
    "D",
    "P",
    "K",
    "Q",
    "N",
    "F",
    "Y",
    "M",
    "H",
    "W",
    "C",
    "X",
    "B",
    "U",
    "Z",
    "O",
    ".",
    "-",
    "<null_1>",
    "<mask>",
]


def test_esm2_has_the_33_tokens_of_esm2_in_their_order() -> None:
    tokenizer = get_tokenizer("esm2")
    assert list(tokenizer.tokens) == ESM2_TOKENS
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == 32
    assert tokenizer.vocab_size == 33


def test_esm2_encodes_as_transformers_esm_tokenizer(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(ESM2_TOKENS))
    theirs = EsmTokenizer(str(tmp_path / "vocab.txt"))
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQXBUZO.-"
    assert theirs(sequence, add_special_tokens=False)["input_ids"] == get_tokenizer("esm2").encode(sequence).tolist()


def test_tape_iupac_has_the_30_tokens_of_tape_in_their_order() -> None:
    tokenizer = get_tokenizer("tape-iupac")
    letters = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) != "J"]
    assert list(tokenizer.tokens) == ["<pad>", "<mask>", "<cls>", "<sep>", "<unk>", *letters]
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.cls_id, tokenizer.eos_id, tokenizer.unk_id) == (
        0,
        1,
        2,
        3,
        4,
    )


def test_proteinlm_has_the_31_tokens_of_its_vocabulary_file() -> None:
    tokenizer = get_tokenizer("proteinlm")
    specials = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", "[unused1]"]
    assert list(tokenizer.tokens) == [*specials, *"ABCDEFGHIKLMNOPQRSTUVWXYZ"]
    assert {letter: tokenizer.encode(letter)[0] for letter in "AIKOUZ"} == {
        "A": 6, "I": 14, "K": 15, "O": 19, "U": 25, "Z": 30
    }  # fmt: skip
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.cls_id, tokenizer.eos_id, tokenizer.unk_id) == (
        0,
        1,
        2,
        3,
        4,
    )


def test_amplify_has_its_27_tokens() -> None:
    tokenizer = get_tokenizer("amplify")
    assert list(tokenizer.tokens) == ["<pad>", "<unk>", "<mask>", "<bos>", "<eos>", *"|LAGVSERTIDPKQNFYMHWCB"]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id, tokenizer.cls_id, tokenizer.eos_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.encode("XUZO").tolist() == [tokenizer.unk_id] * 4


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
def test_masking_may_touch_letters_only(name: str) -> None:
    tokenizer = get_tokenizer(name)
    letters = {tokenizer.tokens[i] for i in tokenizer.residue_ids}
    assert letters == {token for token in tokenizer.tokens if "A" <= token[0] <= "Z"}
    assert {tokenizer.tokens[i] for i in tokenizer.standard_ids} == STANDARD_AMINO_ACIDS
    assert len(tokenizer.standard_ids) == 20
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.residue_ids[0] = 0


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
@given(data=st.data())
def test_decoding_known_letters_gives_them_back(name: str, data: st.DataObject) -> None:
    tokenizer = get_tokenizer(name)
    alphabet = "".join(token for token in tokenizer.tokens if len(token) == 1)
    sequence = data.draw(st.text(alphabet))
    ids = tokenizer.encode(sequence)
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == sequence


@given(st.text())
def test_any_text_encodes_to_one_id_a_character_as_a_search_in_the_token_list_does(text: str) -> None:
    tokenizer = get_tokenizer("esm2")

    def search(letter: str) -> int:
        return tokenizer.tokens.index(letter) if letter in tokenizer.tokens else tokenizer.unk_id

    assert tokenizer.encode(text, fold_case=False).tolist() == [search(letter) for letter in text]
    upper = [letter.upper() if letter.isascii() else letter for letter in text]
    assert tokenizer.encode(text).tolist() == [search(letter) for letter in upper]


def test_decoding_an_id_outside_the_vocabulary_is_an_error() -> None:
    for wrong in (33, -1):
        with pytest.raises(ValueError, match=rf"token id {wrong} is outside esm2's vocabulary of 33"):
            get_tokenizer("esm2").decode(np.array([4, wrong]))


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"'esm-2': expected one of esm2, tape-iupac, proteinlm, amplify; did you mean 'esm2'\?"
    ):
        get_tokenizer("esm-2")


def test_vocabularies_differ_in_their_hash() -> None:
    assert len({get_tokenizer(name).sha256 for name in TOKENIZER_NAMES}) == len(TOKENIZER_NAMES)


def test_importing_the_tokenizers_does_not_import_torch() -> None:
    code = "import sys, megatron_plm.tokenizers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=60)
