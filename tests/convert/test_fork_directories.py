"""Directories that ProteinLM's TAPE fork made itself: its converter's file with its config.json."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import convert, our_logits, pack, random_sequences
from fork_sample import MODEL, forks_directory, forward_by_the_forks_names

from megatron_plm.convert.pretrained import detect_format, load_pretrained
from megatron_plm.convert.proteinlm_tape import read_proteinlm_tape
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

IUPAC = get_tokenizer("tape-iupac")


@pytest.mark.parametrize(("activation", "name"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
@pytest.mark.parametrize("num_types", [1, 2])
def test_it_is_the_model_with_the_final_norm_and_the_tied_matrix(
    activation: str, name: str, num_types: int, tmp_path: Path
) -> None:
    tensors = forks_directory(tmp_path, num_types=num_types, hidden_act=name)
    assert detect_format(tmp_path) == "proteinlm-tape"
    loaded = load_pretrained(tmp_path)
    assert (loaded.options, loaded.tokenizer) == (replace(MODEL, activation=activation), IUPAC)

    sequences = random_sequences(IUPAC, [17, 30], masked=0.3)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"position_embedding_type": "absolute", "token_dropout": False}
    tensors["mlm.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]  # as the fork's tie_weights does
    expected = torch.cat([forward_by_the_forks_names(tensors, config, sequence) for sequence in sequences])
    ours = our_logits(loaded.model.eval(), pack(sequences, [0, 0], 47, IUPAC.pad_id))
    # fp32 in another order of operations; logits of order one.
    assert (ours - expected).abs().max() < 2e-5


def test_what_the_fork_lost_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fork = tmp_path / "fork"
    fork.mkdir()
    forks_directory(fork)
    assert convert("tape", "native", fork, tmp_path / "out") == 2
    assert "holds a proteinlm-tape checkpoint, not tape; give --from proteinlm-tape" in capsys.readouterr().err
    assert convert("proteinlm-tape", "native", fork, tmp_path / "out") == 0
    told = capsys.readouterr().out
    for words in (
        "mlm.decoder.weight: the fork takes the token embedding",
        "bert.bert_tail_dense.weight: a layer that the fork never runs",
        "ProteinLM's head: the fork's converter leaves it out",
        "the fork's neglect of bert.encoder.final_ln",
        "hidden_act gelu_new in config.json means the tanh form",
    ):
        assert f"not carried: {words}" in told or words in told
    forks_directory(fork, hidden_act="gelu_new")
    assert not any("tanh GELU" in note for note in read_proteinlm_tape(fork).notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 31}, "vocab_size is 31"),
        ({"hidden_act": "swish"}, 'hidden_act is "swish"'),
        ({"num_hidden_layers": 3}, r"16 tensors are missing \(bert\.encoder\.layer\.2"),
        ({"type_vocab_size": 3}, r"token_type_embeddings\.weight has shape \[1, 24\], but .* \[3, 24\]"),
        ({"position_embedding_type": "rotary"}, 'position_embedding_type is "rotary", but the fork\'s own models'),
        ({"max_position_embeddings": None}, "max_position_embeddings has no value"),
    ],
    ids=str,
)
def test_a_configuration_that_means_another_model_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    forks_directory(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        read_proteinlm_tape(tmp_path)
