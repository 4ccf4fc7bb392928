"""The tokenizer's files that are written beside BERT and AMPLIFY, read by transformers, and those that are read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import AMPLIFY_TINY, TAPE_TINY, random_weights
from pretraining_runs import same_bits

from megatron_plm.convert.hf_tokenizer import write_letter_tokenizer
from megatron_plm.convert.huggingface import read_huggingface, write_huggingface
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import TOKENIZER_NAMES, Tokenizer, get_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SEQUENCES = ("MKTAYIAKQRQISFVKSHFSRQ", "ACDEFGHIKLMNPQRSTVWYXBUZO", "AJJA", "mktAy", "A.-|C", "")


def ids_of(tokenizer: Tokenizer, sequence: str) -> list[int]:
    return [tokenizer.cls_id, *tokenizer.encode(sequence).tolist(), tokenizer.eos_id]


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
def test_autotokenizer_gives_our_ids(name: str, tmp_path: Path) -> None:
    tokenizer = get_tokenizer(name)
    write_huggingface(random_weights(replace(TAPE_TINY, tokenizer=name)), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    for sequence in SEQUENCES:
        assert theirs(sequence)["input_ids"] == ids_of(tokenizer, sequence)
    assert theirs("M K T\nA")["input_ids"] == ids_of(tokenizer, "MKTA")  # as ProtBERT wants them
    mask = tokenizer.tokens[tokenizer.mask_id]
    assert theirs(f"AA{mask}C")["input_ids"][3] == theirs.mask_token_id == tokenizer.mask_id
    batch = theirs(["AAAA", "A"], padding=True)
    assert batch["input_ids"][1][3:] == [tokenizer.pad_id] * 3
    assert batch["attention_mask"][1] == [1, 1, 1, 0, 0, 0]
    assert theirs.decode(theirs("ACD")["input_ids"], skip_special_tokens=True) == "ACD"
    assert (theirs.cls_token_id, theirs.eos_token_id) == (tokenizer.cls_id, tokenizer.eos_id)
    assert (theirs.pad_token_id, theirs.unk_token_id) == (tokenizer.pad_id, tokenizer.unk_id)
    assert theirs.model_max_length == TAPE_TINY.max_position_embeddings


def test_a_protein_goes_through_tokenizer_and_model_of_one_directory(tmp_path: Path) -> None:
    write_huggingface(random_weights(TAPE_TINY), tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        ["MKTAYIAKQR", "MK"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert model(**tokens).logits.shape == (2, 12, 30)


def test_amplifys_tokenizer_needs_no_code_of_others(tmp_path: Path) -> None:
    write_huggingface(random_weights(AMPLIFY_TINY), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    for sequence in SEQUENCES:
        assert theirs(sequence)["input_ids"] == ids_of(get_tokenizer("amplify"), sequence)


def permuted(directory: Path, order: list[int]) -> list[str]:
    """Reorder the rows of a written model; returns its tokens in the new order. vocab.txt goes."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, directory / "model.safetensors")
    tokens = (directory / "vocab.txt").read_text().split()
    (directory / "vocab.txt").unlink()
    return [tokens[i] for i in order]


def test_rows_go_by_token_whatever_file_names_them(tmp_path: Path) -> None:
    weights = random_weights(TAPE_TINY)
    write_huggingface(weights, tmp_path)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist()
    tokens = permuted(tmp_path, order)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token: i for i, token in enumerate(tokens) if len(token) == 1}
    for added in content["added_tokens"]:
        added["id"] = tokens.index(added["content"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert same_bits(dict(read_huggingface(tmp_path).tensors), weights.tensors)
    (tmp_path / "tokenizer.json").unlink()
    # ProtBERT's names of the roles
    names = {"<pad>": "[PAD]", "<unk>": "[UNK]", "<cls>": "[CLS]", "<sep>": "[SEP]", "<mask>": "[MASK]"}
    (tmp_path / "vocab.txt").write_text("\n".join(names.get(token, token) for token in tokens))
    back = read_huggingface(tmp_path)
    assert back.tokenizer.name == "tape-iupac"
    assert same_bits(dict(back.tensors), weights.tensors)


@pytest.mark.parametrize(
    ("vocabulary", "tokenizer", "message"),
    [
        (None, None, r"has no vocab\.txt and no tokenizer\.json"),
        ("A\nC\n", None, r"vocab\.txt: 2 tokens for a vocab_size of 30 in config\.json; expected one of"),
        (
            "\n".join(f"t{i}" for i in range(30)),
            None,
            r"vocab\.txt: 30 tokens .* expected one of the vocabularies esm2",
        ),
        (None, "{", r"tokenizer\.json: lists no tokens by id"),
        (None, "[]", r"tokenizer\.json: lists no tokens by id"),
        (None, '{"model": {"vocab": [["A", -1.0]]}, "added_tokens": []}', r"tokenizer\.json: lists no tokens by id"),
        (None, '{"model": {"vocab": {"A": 7}}, "added_tokens": []}', r"its ids are not 0, 1, 2"),
        (None, '{"model": {"vocab": {"A": "x"}}, "added_tokens": []}', r"tokenizer\.json: lists no tokens by id"),
    ],
    ids=str,
)
def test_a_vocabulary_that_is_not_ours_is_refused(
    vocabulary: str | None, tokenizer: str | None, message: str, tmp_path: Path
) -> None:
    write_huggingface(random_weights(TAPE_TINY), tmp_path)
    for name, text in (("vocab.txt", vocabulary), ("tokenizer.json", tokenizer)):
        (tmp_path / name).unlink()
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_huggingface(tmp_path)


def test_writing_needs_no_transformers(tmp_path: Path) -> None:
    write_letter_tokenizer(get_tokenizer("amplify"), tmp_path)
    assert "model_max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
