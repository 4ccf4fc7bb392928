"""Conversion from and to BertForMaskedLM, against transformers' own model and tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import (
    SHAPES,
    TAPE_TINY,
    our_logits,
    pack,
    random_sequences,
    random_weights,
    randomize,
)
from peer_comparison import TOLERANCE, assert_equal_values, change_config, padded_batch
from pretraining_runs import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.huggingface import read_huggingface, write_huggingface
from megatron_plm.convert.pretrained import detect_format, load_pretrained
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import TOKENIZER_NAMES, get_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

IUPAC = get_tokenizer("tape-iupac")
# The vocabulary of Rostlab's ProtBERT, in its order.
PROTBERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"]


def options_of(shape: tuple[int, int, int, int], tokenizer: str = "tape-iupac") -> ModelOptions:
    layers, hidden, heads, inner = shape
    return replace(
        TAPE_TINY, num_layers=layers, hidden_size=hidden, num_attention_heads=heads, tokenizer=tokenizer,
        ffn_hidden_size=None if inner == 4 * hidden else inner,
    )  # fmt: skip


def their_model(options: ModelOptions, kind: str = "BertForMaskedLM", **fields: object) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=len(PROTBERT),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_attention_heads,
        intermediate_size=options.ffn_size,
        max_position_embeddings=options.max_position_embeddings,
        layer_norm_eps=options.layernorm_epsilon,
        **fields,
    )
    model = getattr(transformers, kind)(config).eval()
    randomize(model)
    return model


def saved(model: torch.nn.Module, directory: Path) -> Path:
    """A directory as ProtBERT's."""
    model.save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(PROTBERT) + "\n")
    return directory


@torch.no_grad()
def their_logits(model: torch.nn.Module, sequences: list[Tensor], pad_id: int) -> Tensor:
    """Logits of the real tokens of one padded batch, sequence after sequence."""
    ids, real = padded_batch(sequences, pad_id)
    return model(input_ids=ids, attention_mask=real.long()).logits[real]


def in_protberts_order(sequences: list[Tensor]) -> list[Tensor]:
    names = {"<pad>": "[PAD]", "<unk>": "[UNK]", "<cls>": "[CLS]", "<sep>": "[SEP]", "<mask>": "[MASK]"}
    ids = torch.tensor([PROTBERT.index(names.get(token, token)) for token in IUPAC.tokens])
    return [ids[sequence] for sequence in sequences]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_logits_equal_those_of_transformers(shape: tuple[int, int, int, int], direction: str, tmp_path: Path) -> None:
    options = options_of(shape)
    if direction == "theirs to ours":
        theirs = their_model(options)
        ours = load_pretrained(saved(theirs, tmp_path)).model
        column = torch.cat(in_protberts_order([torch.arange(IUPAC.vocab_size)]))
    else:
        weights = random_weights(options)
        ours, column = weights.build(), torch.arange(IUPAC.vocab_size)
        write_huggingface(weights, tmp_path)
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        assert type(theirs).__name__ == "BertForMaskedLM"

    def theirs_by_our_ids(sequences: list[Tensor]) -> Tensor:
        ids = [column[sequence] for sequence in sequences]
        return their_logits(theirs, ids, int(column[IUPAC.pad_id]))[:, column]

    assert_equal_values(ours, IUPAC, theirs_by_our_ids)


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    for number, (shape, tokenizer) in enumerate(zip(SHAPES, TOKENIZER_NAMES, strict=True)):
        weights = random_weights(options_of(shape, tokenizer), seed=number)
        (note,) = write_huggingface(weights, tmp_path)
        assert "zeros are written" in note
        assert detect_format(tmp_path) == "huggingface"
        back = read_huggingface(tmp_path)
        assert same_bits(dict(back.tensors), weights.tensors)
        assert (back.options, back.tokenizer, back.notes) == (weights.options, weights.tokenizer, ())


def test_transformers_finds_every_tensor_and_none_too_many(tmp_path: Path) -> None:
    write_huggingface(random_weights(TAPE_TINY), tmp_path)
    _, info = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    found = {name: set(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert found == {name: set() for name in found}


def test_weights_are_written_in_shards(tmp_path: Path) -> None:
    weights = random_weights(TAPE_TINY)
    write_huggingface(weights, tmp_path, shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same_bits(dict(read_huggingface(tmp_path).tensors), weights.tensors)


def test_what_a_pretraining_checkpoint_holds_beyond_the_model_is_dropped_with_its_reason(tmp_path: Path) -> None:
    theirs = their_model(TAPE_TINY, kind="BertForPreTraining")
    saved(theirs, tmp_path)
    weights = read_huggingface(tmp_path)
    told = {note.split(":")[0] for note in weights.notes}
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.bias"} < told
    assert "token_type_embeddings.weight: but for row 0, which is added to the positions" in weights.notes[-1]
    sequences = random_sequences(IUPAC, [20], masked=0.1)
    column = torch.cat(in_protberts_order([torch.arange(IUPAC.vocab_size)]))
    with torch.no_grad():
        expected = theirs(input_ids=column[sequences[0]][None]).prediction_logits[0]
    ours = our_logits(weights.build().eval(), pack(sequences, [0], 20, IUPAC.pad_id))
    assert (ours - expected[:, column]).abs().max() <= TOLERANCE


def test_old_names_and_copies_of_tied_tensors_are_read(tmp_path: Path) -> None:
    weights = random_weights(TAPE_TINY)
    write_huggingface(weights, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for k, t in tensors.items()}  # fmt: skip
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(old, tmp_path / "model.safetensors")
    assert same_bits(dict(read_huggingface(tmp_path).tensors), weights.tensors)
    old["cls.predictions.decoder.bias"] += 1
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"cls\.predictions\.bias, cls\.predictions\.decoder\.bias: they must be equal"):
        read_huggingface(tmp_path).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu_new"}, 'hidden_act is "gelu_new", but the head .* exact GELU'),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type is "relative_key"'),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"vocab_size": 31}, "30 tokens for a vocab_size of 31"),
        ({"type_vocab_size": 2}, r"token_type_embeddings\.weight has shape \[1, 24\], but .* \[2, 24\]"),
        ({"max_position_embeddings": None}, "max_position_embeddings has no value"),
        ({"num_hidden_layers": 3}, r"16 tensors are missing \(bert\.encoder\.layer\.2"),
    ],
    ids=str,
)
def test_a_configuration_that_means_another_model_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_huggingface(random_weights(TAPE_TINY), tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        read_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu_tanh"}, 'activation is "gelu_tanh"'),
        ({"embedding_layernorm": False}, "embedding_layernorm is false"),
        ({"token_dropout": True}, "token_dropout is true"),
        ({"objective": "clm"}, 'objective is "clm"'),
    ],
    ids=str,
)
def test_a_model_that_is_no_bert_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_huggingface(random_weights(replace(TAPE_TINY, **options)), tmp_path)
