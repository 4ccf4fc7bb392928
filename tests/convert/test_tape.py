"""Conversion from and to stock TAPE, against the models of tape-proteins 0.5."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import (
    AMPLIFY_TINY,
    PROTEINLM_TINY,
    SHAPES,
    TAPE_TINY,
    TINY,
    Packed,
    convert,
    native_checkpoint,
    our_logits,
    random_sequences,
    random_weights,
    randomize,
)
from harmful_pickle import Calls
from peer_comparison import assert_equal_values, change_config, padded_batch
from pretraining_runs import same_bits
from tape_peer import import_tape, tape_config
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.pretrained import detect_format, load_pretrained
from megatron_plm.convert.tape import read_tape, write_tape
from megatron_plm.errors import UserError
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

IUPAC = get_tokenizer("tape-iupac")
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
TYPES = "bert.embeddings.token_type_embeddings.weight"


def options_of(shape: tuple[int, int, int, int]) -> ModelOptions:
    layers, hidden, heads, inner = shape
    return replace(
        TAPE_TINY, num_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        ffn_hidden_size=None if inner == 4 * hidden else inner,
    )  # fmt: skip


def their_model(options: ModelOptions, **fields: object) -> torch.nn.Module:
    model = import_tape().ProteinBertForMaskedLM(tape_config(options, **fields))
    randomize(model)
    return model.eval()


@torch.no_grad()
def their_values(directory: Path, sequences: list[Tensor]) -> Tensor:
    """Hidden states and logits [T, D + V] of one padded batch, by the two stock models loaded from there."""
    ids, real = padded_batch(sequences, IUPAC.pad_id)
    values = []
    for name in ("ProteinBertModel", "ProteinBertForMaskedLM"):
        model, told = getattr(import_tape(), name).from_pretrained(str(directory), output_loading_info=True)
        unused = [key for key in told["unexpected_keys"] if name == "ProteinBertForMaskedLM" or "mlm." not in key]
        assert (told["missing_keys"], unused) == ([], [])
        values.append(model(ids, real.long())[0][real])
    return torch.cat(values, dim=1)


def our_values(model: MaskedLanguageModel, packed: Packed) -> Tensor:
    hidden = model.encoder(*packed.inputs)[packed.rows, packed.columns]
    return torch.cat([hidden, our_logits(model, packed)], dim=1)


def assert_equal_to_stock(ours: MaskedLanguageModel, directory: Path) -> None:
    assert_equal_values(ours, IUPAC, lambda sequences: their_values(directory, sequences), our_values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_hidden_states_and_logits_equal_those_of_stock_tape(
    shape: tuple[int, int, int, int], direction: str, tmp_path: Path
) -> None:
    options = options_of(shape)
    if direction == "theirs to ours":
        their_model(options).save_pretrained(tmp_path)
        ours = load_pretrained(tmp_path).model
    else:
        weights = random_weights(options)
        write_tape(weights, tmp_path)
        ours = weights.build()
    assert_equal_to_stock(ours, tmp_path)


def test_a_stock_directory_is_recognised_and_what_it_holds_beyond_the_model_is_told(tmp_path: Path) -> None:
    theirs = their_model(TAPE_TINY, type_vocab_size=2)
    theirs.save_pretrained(tmp_path)
    assert "model_type" not in json.loads((tmp_path / "config.json").read_text())
    assert detect_format(tmp_path) == "tape"
    weights = read_tape(tmp_path)
    assert weights.options == TAPE_TINY
    told = {note.split(":")[0] for note in weights.notes}
    assert told == {*POOLER, TYPES}
    assert "but for row 0, which is added to the positions" in weights.notes[-1]
    expected = (
        theirs.bert.embeddings.position_embeddings.weight + theirs.bert.embeddings.token_type_embeddings.weight[0]
    )
    assert torch.equal(weights.tensors["encoder.embedding.positions.weight"], expected)
    assert_equal_to_stock(weights.build(), tmp_path)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_our_export_adds_is_told_and_makes_stock_tape_load_it_whole(tmp_path: Path) -> None:
    notes = write_tape(random_weights(TAPE_TINY), tmp_path)
    assert [note.split(":")[0] for note in notes] == ["bert.pooler.dense", TYPES]
    model, told = import_tape().ProteinBertModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert told["missing_keys"] == told["error_msgs"] == []
    task = import_tape().ProteinBertForValuePrediction
    _, told = task.from_pretrained(str(tmp_path), output_loading_info=True)
    assert {key.split(".")[0] for key in told["missing_keys"]} == {"predict"}
    assert {key.split(".")[0] for key in told["unexpected_keys"]} == {"mlm"}
    (sequence,) = random_sequences(IUPAC, [20], masked=0.0)
    with torch.no_grad():
        hidden, pooled = model(sequence[None])
    assert torch.equal(pooled, hidden[:, 0].tanh())
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.1, 0.1)


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        weights = random_weights(options_of(shape), seed=number)
        write_tape(weights, tmp_path)
        back = read_tape(tmp_path)
        assert same_bits(dict(back.tensors), weights.tensors)
        assert (back.options, back.tokenizer) == (weights.options, weights.tokenizer)
        assert [note.split(":")[0] for note in back.notes] == sorted(POOLER)


def test_old_names_of_norms_are_read_as_tape_reads_them(tmp_path: Path) -> None:
    weights = random_weights(TAPE_TINY)
    write_tape(weights, tmp_path)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for k, t in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert detect_format(tmp_path) == "tape"
    assert same_bits(dict(read_tape(tmp_path).tensors), weights.tensors)
    assert_equal_to_stock(weights.build(), tmp_path)


def test_looking_at_a_directory_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "it ran"
    source = tmp_path / "source"
    source.mkdir()
    write_tape(random_weights(TAPE_TINY), source)
    torch.save({"mlm.bias": torch.zeros(30), "x": Calls(Path.touch, marker)}, source / "pytorch_model.bin")
    assert convert("tape", "native", source, tmp_path / "out") == 2
    assert "would run code (nothing of it was run)" in capsys.readouterr().err
    assert not marker.exists()


def test_rows_go_by_the_role_of_a_token(tmp_path: Path) -> None:
    weights = random_weights(replace(TAPE_TINY, tokenizer="esm2"))
    notes = write_tape(weights, tmp_path)
    assert "the rows of ., -, <null_1>" in notes[-1]
    esm2, back = get_tokenizer("esm2"), read_tape(tmp_path).tensors
    for name in ("encoder.embedding.tokens.weight", "head.bias"):
        for i, token in enumerate(IUPAC.tokens):
            assert torch.equal(
                back[name][i], weights.tensors[name][esm2.tokens.index({"<sep>": "<eos>"}.get(token, token))]
            )


def test_a_pre_ln_model_is_refused_with_the_format_that_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native_checkpoint(tmp_path / "native", PROTEINLM_TINY)
    assert convert("native", "tape", tmp_path / "native", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--to tape: the model normalizes what goes into attention and MLP (pre-LN)" in error
    assert "--to proteinlm-tape" in error
    assert convert("native", "proteinlm-tape", tmp_path / "native", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu_tanh"}, 'activation is "gelu_tanh"'),
        ({"embedding_layernorm": False}, "embedding_layernorm is false"),
        ({"position_embedding_type": "rope", "max_position_embeddings": None}, 'position_embedding_type is "rope"'),
        ({"token_dropout": True}, "token_dropout is true"),
        ({"objective": "clm"}, 'objective is "clm"'),
        ({"tokenizer": "amplify"}, "no row for O, U, X, Z"),
    ],
    ids=str,
)
def test_a_model_that_is_no_bert_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_tape(random_weights(replace(TAPE_TINY, **options)), tmp_path)
    for other in (TINY, AMPLIFY_TINY):
        with pytest.raises(UserError, match="pre-LN"):
            write_tape(random_weights(other), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "relu"}, 'hidden_act is "relu"'),
        ({"vocab_size": 8000}, "vocab_size is 8000, but TAPE's IUPAC vocabulary has 30 tokens"),
        ({"max_position_embeddings": 65}, r"position_embeddings\.weight has shape \[64, 24\], but .* \[65, 24\]"),
        ({"type_vocab_size": 2}, r"token_type_embeddings\.weight has shape \[1, 24\], but .* \[2, 24\]"),
        ({"num_hidden_layers": 3}, r"16 tensors are missing \(bert\.encoder\.layer\.2"),
        ({"layer_norm_eps": None}, "layer_norm_eps has no value"),
    ],
    ids=str,
)
def test_a_configuration_that_means_another_model_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_tape(random_weights(TAPE_TINY), tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        read_tape(tmp_path)
