"""ProteinLM's TAPE fork: its names, and what they compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
