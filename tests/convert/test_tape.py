"""Conversion to and from the names and files of ProteinLM's TAPE fork."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from convert_sample import SHAPES, TINY, options_of, our_logits, pack, random_sequences, random_weights
from pretraining_runs import same_bits
from torch import Tensor

from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.convert.tape import read_proteinlm_tape, write_proteinlm_tape
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

ESM2, IUPAC = get_tokenizer("esm2"), get_tokenizer("tape-iupac")

# The fork's modules, after tape/models/modeling_bert.py and modeling_utils.py of THUDM/ProteinLM.
FORK_LAYER_MODULES = (
    "input_ln", "attention.self.query", "attention.self.key", "attention.self.value", "attention.dense",
    "post_attn_ln", "mlp.dense_h_4h", "mlp.dense_4h_h",
)  # fmt: skip
FORK_OTHER_KEYS = {
    "bert.embeddings.word_embeddings.weight", "bert.encoder.final_ln.weight", "bert.encoder.final_ln.bias",
    "mlm.transform.dense.weight", "mlm.transform.dense.bias", "mlm.transform.LayerNorm.weight",
    "mlm.transform.LayerNorm.bias", "mlm.decoder.weight", "mlm.bias",
}  # fmt: skip


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


def forward_by_the_forks_names(tensors: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """Logits [L, V] of one sequence of IUPAC ids: the fork's layer order, with rotary positions and token dropout."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def rotated(x: Tensor) -> Tensor:  # [L, heads, size] as complex numbers, pairs (i, i + size/2)
        angles = torch.arange(len(ids))[:, None] * tensors["bert.encoder.rotary.inverse_frequencies"]
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    is_mask = ids == 1  # <mask> of TAPE
    x = tensors["bert.embeddings.word_embeddings.weight"][ids]
    if config["token_dropout"]:
        x = x * ~is_mask[:, None] * 0.88 / (1 - is_mask.float().mean())
    for i in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        y = norm(x, f"{layer}.input_ln")
        q, k, v = (linear(y, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
        q, k, v = (part.unflatten(1, (heads, -1)) for part in (q, k, v))
        scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + linear(mixed, f"{layer}.attention.dense")
        y = norm(x, f"{layer}.post_attn_ln")
        x = x + linear(F.gelu(linear(y, f"{layer}.mlp.dense_h_4h")), f"{layer}.mlp.dense_4h_h")
    y = F.gelu(linear(norm(x, "bert.encoder.final_ln"), "mlm.transform.dense"))
    return norm(y, "mlm.transform.LayerNorm") @ tensors["mlm.decoder.weight"].T + tensors["mlm.bias"]


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
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(UserError, match=re.compile(message)):
        read_proteinlm_tape(tmp_path)
