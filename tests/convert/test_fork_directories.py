"""Directories that ProteinLM's TAPE fork made itself: its converter's file with its config.json."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import PROTEINLM_TINY, convert, our_logits, pack, random_sequences
from fork_sample import forward_by_the_forks_names
from torch import Tensor

from megatron_plm.convert.pretrained import detect_format, load_pretrained
from megatron_plm.convert.proteinlm_tape import read_proteinlm_tape
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

IUPAC = get_tokenizer("tape-iupac")
MODEL = replace(PROTEINLM_TINY, tokenizer="tape-iupac", activation="gelu", layernorm_epsilon=1e-12)


def forks_directory(directory: Path, *, num_types: int = 1, **fields: object) -> dict[str, Tensor]:
    """Write what the fork's converter leaves: random numbers by the fork's names; returns them."""
    hidden, inner = MODEL.hidden_size, MODEL.ffn_size
    shapes = {
        "bert.embeddings.word_embeddings.weight": (30, hidden),
        "bert.embeddings.position_embeddings.weight": (MODEL.max_position_embeddings, hidden),
        "bert.embeddings.token_type_embeddings.weight": (num_types, hidden),
        "mlm.decoder.weight": (30, hidden),  # of the model that was filled: on loading it is the token embedding again
        "mlm.bias": (30,),
    }
    modules = {"bert.bert_tail_dense": (hidden, hidden), "mlm.transform.dense": (hidden, hidden)}
    modules |= dict.fromkeys(("bert.encoder.final_ln", "mlm.transform.LayerNorm"), (hidden,))
    for i in range(MODEL.num_layers):
        layer = f"bert.encoder.layer.{i}"
        modules |= {f"{layer}.{name}": (hidden,) for name in ("input_ln", "post_attn_ln")}
        parts = ("self.query", "self.key", "self.value", "dense")
        modules |= {f"{layer}.attention.{name}": (hidden, hidden) for name in parts}
        modules |= {f"{layer}.mlp.dense_h_4h": (inner, hidden), f"{layer}.mlp.dense_4h_h": (hidden, inner)}
    shapes |= {f"{name}.weight": shape for name, shape in modules.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=generator) * (shape[1] ** -0.5 if len(shape) > 1 else 0.3)
        for name, shape in shapes.items()
    }
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config = {
        "attention_probs_dropout_prob": 0.1, "base_model": "transformer", "finetuning_task": None,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": hidden, "initializer_range": 0.02,
        "intermediate_size": inner, "layer_norm_eps": 1e-12,
        "max_position_embeddings": MODEL.max_position_embeddings,
        "num_attention_heads": MODEL.num_attention_heads, "num_hidden_layers": MODEL.num_layers, "num_labels": 2,
        "output_attentions": False, "output_hidden_states": False, "pruned_heads": {}, "torchscript": False,
        "type_vocab_size": num_types, "vocab_size": 30,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    return tensors


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
