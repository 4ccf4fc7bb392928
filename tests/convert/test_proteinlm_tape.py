"""Conversion to and from the names and files of ProteinLM's TAPE fork."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import (
    PROTEINLM_TINY,
    SHAPES,
    TINY,
    options_of,
    our_logits,
    pack,
    random_sequences,
    random_weights,
)
from fork_sample import FORK_LAYER_MODULES, FORK_OTHER_KEYS, forward_by_the_forks_names
from peer_comparison import change_config
from pretraining_runs import same_bits
from torch import Tensor

from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.convert.proteinlm_tape import read_proteinlm_tape, write_proteinlm_tape
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

LEARNED = replace(PROTEINLM_TINY, tokenizer="tape-iupac")
ESM2, IUPAC = get_tokenizer("esm2"), get_tokenizer("tape-iupac")


def read_file(directory: Path) -> dict[str, Tensor]:
    return torch.load(directory / "pytorch_model.bin", weights_only=True)


def test_the_keys_are_the_forks_and_the_rotary_frequencies(tmp_path: Path) -> None:
    write_proteinlm_tape(random_weights(), tmp_path, "float32")
    layers = {
        f"bert.encoder.layer.{i}.{module}.{kind}"
        for i in range(TINY.num_layers)
        for module in FORK_LAYER_MODULES
        for kind in ("weight", "bias")
    }
    assert set(read_file(tmp_path)) == layers | FORK_OTHER_KEYS | {"bert.encoder.rotary.inverse_frequencies"}
    write_proteinlm_tape(random_weights(PROTEINLM_TINY), tmp_path, "float32")
    positions = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("position", "token_type")}
    assert set(read_file(tmp_path)) == layers | FORK_OTHER_KEYS | positions


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_file_means_the_same_model_token_for_token(
    shape: tuple[int, int, int, int], token_dropout: bool, tmp_path: Path
) -> None:
    weights = random_weights(options_of(shape, token_dropout=token_dropout))
    write_proteinlm_tape(weights, tmp_path, "float32")
    config = json.loads((tmp_path / "config.json").read_text())
    sequences = random_sequences(ESM2, [17, 30], masked=0.3)
    ours = our_logits(weights.build(), pack(sequences, [0, 0], 47, ESM2.pad_id))

    names = {"<eos>": "<sep>"}
    column = [IUPAC.tokens.index(names.get(t, t)) if names.get(t, t) in IUPAC.tokens else -1 for t in ESM2.tokens]
    shared = [i for i, target in enumerate(column) if target >= 0]
    assert len(shared) == IUPAC.vocab_size
    tensors, iupac = read_file(tmp_path), [torch.tensor(column)[sequence] for sequence in sequences]
    theirs = torch.cat([forward_by_the_forks_names(tensors, config, sequence) for sequence in iupac])
    # fp32 in another order of operations; logits of order one.
    assert (ours[:, shared] - theirs[:, [column[i] for i in shared]]).abs().max() < 2e-5

    back = load_pretrained(tmp_path)
    assert back.tokenizer == IUPAC
    again = our_logits(back.model, pack(iupac, [0, 0], 47, IUPAC.pad_id))
    assert (ours[:, shared] - again[:, [column[i] for i in shared]]).abs().max() < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_learned_positions_and_both_gelus_mean_the_same_model(activation: str, tmp_path: Path) -> None:
    weights = random_weights(replace(LEARNED, activation=activation))
    assert write_proteinlm_tape(weights, tmp_path, "float32") == ()
    config = json.loads((tmp_path / "config.json").read_text())
    sequences = random_sequences(IUPAC, [17, 30], masked=0.3)
    theirs = torch.cat([forward_by_the_forks_names(read_file(tmp_path), config, sequence) for sequence in sequences])
    ours = our_logits(weights.build().eval(), pack(sequences, [0, 0], 47, IUPAC.pad_id))
    assert (ours - theirs).abs().max() < 2e-5
    back = read_proteinlm_tape(tmp_path)
    assert same_bits(dict(back.tensors), weights.tensors)
    assert back.options == weights.options


def test_a_vector_of_the_token_type_counts(tmp_path: Path) -> None:
    weights = random_weights(LEARNED)
    write_proteinlm_tape(weights, tmp_path, "float32")
    tensors = read_file(tmp_path)
    types = torch.linspace(-1, 1, LEARNED.hidden_size).repeat(2, 1)
    torch.save({**tensors, "bert.embeddings.token_type_embeddings.weight": types}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"token_type_embeddings\.weight has shape \[2, 24\], but .* \[1, 24\]"):
        read_proteinlm_tape(tmp_path)
    torch.save({**tensors, "bert.embeddings.token_type_embeddings.weight": types[:1]}, tmp_path / "pytorch_model.bin")
    back = read_proteinlm_tape(tmp_path).tensors
    positions = "encoder.embedding.positions.weight"
    assert torch.equal(back[positions], weights.tensors[positions] + types[0])


def test_the_fork_stops_at_the_tanh_gelu(tmp_path: Path) -> None:
    write_proteinlm_tape(random_weights(PROTEINLM_TINY), tmp_path, "float32")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_act"] not in ("gelu", "relu", "swish")  # all that the fork's get_activation_fn knows


def test_a_round_trip_of_an_iupac_model_changes_no_bit(tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        weights = random_weights(options_of(shape, tokenizer="tape-iupac", token_dropout=number % 2 == 0))
        assert write_proteinlm_tape(weights, tmp_path, "float32") == ()
        back = read_proteinlm_tape(tmp_path)
        assert same_bits(back.tensors, weights.tensors)
        assert (back.options, back.tokenizer, back.notes) == (weights.options, IUPAC, ())


def test_only_the_three_tokens_tape_lacks_are_lost_and_named(tmp_path: Path) -> None:
    weights = random_weights()
    (note,) = write_proteinlm_tape(weights, tmp_path, "float32")
    assert re.findall(r"<\w+>|[.-]", note.split(":")[0]) == [".", "-", "<null_1>"]
    back = read_proteinlm_tape(tmp_path).tensors
    for name, tensor in weights.tensors.items():
        if name in ("encoder.embedding.tokens.weight", "head.bias"):
            for i, token in enumerate(IUPAC.tokens):
                assert torch.equal(back[name][i], tensor[ESM2.tokens.index({"<sep>": "<eos>"}.get(token, token))])
        else:
            assert torch.equal(back[name], tensor)


def test_the_forks_constructor_stops_on_the_configuration(tmp_path: Path) -> None:
    write_proteinlm_tape(random_weights(), tmp_path, "float32")
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(TypeError):  # as in the fork's ProteinBertEmbeddings
        torch.nn.Embedding(config["max_position_embeddings"], config["hidden_size"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": None}, "position_embedding_type has no value"),
        ({"position_embedding_type": "absolute"}, "max_position_embeddings has no value"),
        ({"hidden_act": "relu"}, 'hidden_act is "relu"'),
        ({"vocab_size": 31}, "vocab_size is 31"),
        ({"intermediate_size": 50}, r"dense_4h_h\.weight has shape \[24, 96\], but .* \[24, 50\]"),
    ],
    ids=str,
)
def test_a_configuration_that_means_another_model_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_proteinlm_tape(random_weights(), tmp_path, "float32")
    change_config(tmp_path, **fields)
    with pytest.raises(UserError, match=re.compile(message)):
        read_proteinlm_tape(tmp_path)
