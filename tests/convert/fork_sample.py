"""ProteinLM's TAPE fork: its names, what they compute, and a directory as its own scripts leave it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from convert_sample import PROTEINLM_TINY
from torch import Tensor

MODEL = replace(PROTEINLM_TINY, tokenizer="tape-iupac", activation="gelu", layernorm_epsilon=1e-12)

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


def forward_by_the_forks_names(tensors: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """Logits [L, V] of one sequence of IUPAC ids: the fork's layer order, with what config.json says beyond it."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    rotary = config["position_embedding_type"] == "rotary"

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        if config["hidden_act"] == "gelu_new":
            return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))
        return F.gelu(x)

    def rotated(x: Tensor) -> Tensor:  # [L, heads, size] as complex numbers, pairs (i, i + size/2)
        if not rotary:
            return x
        angles = torch.arange(len(ids))[:, None] * tensors["bert.encoder.rotary.inverse_frequencies"]
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    is_mask = ids == 1  # <mask> of TAPE
    x = tensors["bert.embeddings.word_embeddings.weight"][ids]
    if config["token_dropout"]:
        x = x * ~is_mask[:, None] * 0.88 / (1 - is_mask.float().mean())
    if not rotary:
        x = x + tensors["bert.embeddings.position_embeddings.weight"][: len(ids)]
        x = x + tensors["bert.embeddings.token_type_embeddings.weight"][0]
    for i in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        y = norm(x, f"{layer}.input_ln")
        q, k, v = (linear(y, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
        q, k, v = (part.unflatten(1, (heads, -1)) for part in (q, k, v))
        scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + linear(mixed, f"{layer}.attention.dense")
        y = norm(x, f"{layer}.post_attn_ln")
        x = x + linear(gelu(linear(y, f"{layer}.mlp.dense_h_4h")), f"{layer}.mlp.dense_4h_h")
    y = F.gelu(linear(norm(x, "bert.encoder.final_ln"), "mlm.transform.dense"))
    return norm(y, "mlm.transform.LayerNorm") @ tensors["mlm.decoder.weight"].T + tensors["mlm.bias"]


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
