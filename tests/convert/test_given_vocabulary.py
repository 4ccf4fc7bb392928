"""--tokenizer: what the rows of a checkpoint mean whose files do not tell it."""

import json
import random
from dataclasses import replace
from pathlib import Path

import megatron_sample
import pytest
import torch
from convert_sample import PROTEINLM_TINY, TAPE_TINY, TINY, convert, our_logits, random_weights, randomize, written
from peer_comparison import assert_equal_values, change_config, padded_batch
from pretraining_runs import same_bits
from tape_peer import import_tape, tape_config
from torch import Tensor

from megatron_plm.convert.megatron import read_megatron
from megatron_plm.convert.native import read_native
from megatron_plm.convert.tape import read_tape
from megatron_plm.tokenizers import get_tokenizer

ESM2 = get_tokenizer("esm2")
PROTEINLM = get_tokenizer("proteinlm")


def in_another_order(path: Path) -> tuple[Path, Tensor]:
    """A file with ESM-2's tokens by BERT's names and in another order, and the column there of each of our ids."""
    names = {"<cls>": "[CLS]", "<pad>": "[PAD]", "<eos>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
    order = list(range(ESM2.vocab_size))
    random.Random(3).shuffle(order)
    tokens = [ESM2.tokens[i] for i in order]
    path.write_text("\n".join(names.get(token, token) for token in tokens) + "\n")
    return path, torch.tensor([order.index(i) for i in range(ESM2.vocab_size)])


@pytest.mark.parametrize("by_file", [False, True])
def test_a_stock_tape_model_of_another_vocabulary_gives_its_logits(by_file: bool, tmp_path: Path) -> None:
    theirs = import_tape().ProteinBertForMaskedLM(tape_config(TAPE_TINY, vocab_size=ESM2.vocab_size)).eval()
    randomize(theirs)
    source = tmp_path / "in"
    source.mkdir()
    theirs.save_pretrained(source)
    file, column = in_another_order(tmp_path / "tokens.txt")
    if not by_file:
        column = torch.arange(ESM2.vocab_size)
    given = str(file) if by_file else "esm2"
    assert convert("tape", "native", source, tmp_path / "out", "--tokenizer", given) == 0
    weights = read_native(tmp_path / "out")
    assert weights.tokenizer == ESM2

    def their_logits(sequences: list[Tensor]) -> Tensor:
        ids, real = padded_batch([column[sequence] for sequence in sequences], int(column[ESM2.pad_id]))
        return theirs(ids, real.long())[0][real][:, column]

    assert_equal_values(weights.build(), ESM2, their_logits, our_logits)


def test_the_forks_and_transformers_rows_are_named_too(tmp_path: Path) -> None:
    for name, options in (("proteinlm-tape", replace(TINY, tokenizer="tape-iupac")), ("huggingface", TAPE_TINY)):
        weights = random_weights(options)
        source = written(weights, name, tmp_path / name)
        for file in ("vocab.txt", "tokenizer.json"):
            (source / file).unlink(missing_ok=True)
        assert convert(name, "native", source, tmp_path / f"{name} out", "--tokenizer", "tape-iupac") == 0
        assert same_bits(dict(read_native(tmp_path / f"{name} out").tensors), weights.tensors)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("tokenizer", ["esm2", "tape-iupac", "amplify"])
def test_megatron_takes_any_vocabulary_of_letters_and_gives_it_back(
    tokenizer: str, num_ranks: int, tmp_path: Path
) -> None:
    weights = random_weights(replace(PROTEINLM_TINY, num_attention_heads=4, tokenizer=tokenizer))
    source = written(weights, "native", tmp_path / "native")
    flags = ["--target-tensor-parallel-size", str(num_ranks)]
    assert convert("native", "megatron", source, tmp_path / "there", *flags) == 0
    tokens = (tmp_path / "there" / "vocab.txt").read_text().split()
    assert tuple(tokens) == weights.tokenizer.tokens
    file = torch.load(tmp_path / "there/release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    rows = megatron_sample.words(file)["weight"]  # in the model's own order, not in ProteinLM's
    assert torch.equal(rows[: len(tokens)], weights.tensors["encoder.embedding.tokens.weight"])
    assert not rows[len(tokens) :].any()
    for place in ("there", "there/release", "there/release/mp_rank_00"):
        back = read_megatron(tmp_path / place)
        assert (back.options, back.tokenizer) == (weights.options, weights.tokenizer)
        assert same_bits(dict(back.tensors), weights.tensors)
    (tmp_path / "there" / "vocab.txt").unlink()
    back = read_megatron(tmp_path / "there", tokenizer=tokenizer)
    assert same_bits(dict(back.tensors), weights.tensors)


def test_a_flag_does_not_overrule_a_megatron_checkpoints_own_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(replace(PROTEINLM_TINY, tokenizer="esm2")), "megatron", tmp_path / "in")
    assert convert("megatron", "native", source, tmp_path / "out", "--tokenizer", "proteinlm") == 2
    assert "vocab.txt says otherwise what the rows mean" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert("megatron", "native", source, tmp_path / "out", "--tokenizer", "esm2") == 0


def test_a_megatron_checkpoint_is_of_proteinlms_vocabulary_unless_told(tmp_path: Path) -> None:
    model = megatron_sample.random_model()
    megatron_sample.save(tmp_path, model)
    (tmp_path / "iupac_vocab.txt").write_text("\n".join(PROTEINLM.tokens[::-1]) + "\n")
    plain = read_megatron(tmp_path)
    turned = read_megatron(tmp_path, tokenizer=str(tmp_path / "iupac_vocab.txt"))
    assert plain.tokenizer == turned.tokenizer == PROTEINLM
    for name in ("encoder.embedding.tokens.weight", "head.bias"):
        assert torch.equal(turned.tensors[name], plain.tensors[name].flip(0))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("esm3", "--tokenizer esm3: expected one of esm2, tape-iupac, proteinlm, amplify, or a file that lists"),
        ("esm2", "vocab_size is 30, but --tokenizer esm2 has 33 tokens"),
        ("words.txt", "words.txt: its 3 tokens are those of none of the vocabularies esm2"),
        ("folder", "folder: cannot be read: Is a directory"),
    ],
)
def test_what_is_no_vocabulary_of_the_checkpoint_is_refused(
    given: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("the\nlazy\nfox\n")
    Path("folder").mkdir()
    source = written(random_weights(TAPE_TINY), "tape", tmp_path / "tape")
    assert convert("tape", "native", source, tmp_path / "out", "--tokenizer", given) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_format_that_tells_its_vocabulary_takes_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sentence in (
        ("native", "--tokenizer: --from native has no use for it"),
        ("fair-esm", "--tokenizer: --from fair-esm has no use for it"),
        ("huggingface", "vocab.txt tells what the rows mean; leave the flag out"),
    ):
        source = written(random_weights(), name, tmp_path / name)
        assert convert(name, "native", source, tmp_path / "out", "--tokenizer", "esm2") == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_model_of_another_vocabulary_is_told_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(random_weights(TAPE_TINY), "tape", tmp_path / "tape")
    change_config(source, vocab_size=33)
    assert convert("tape", "native", source, tmp_path / "out") == 2
    assert "TAPE's IUPAC vocabulary has 30 tokens; convert it with --tokenizer" in capsys.readouterr().err
    assert json.loads((source / "config.json").read_text())["vocab_size"] == 33
    change_config(source, vocab_size=30)
    assert read_tape(source).tokenizer == get_tokenizer("tape-iupac")
