"""Checkpoints as ProteinLM and the Megatron-LM before it wrote them, and what their model computes, by hand.

Nothing here uses the converters. A model is a dictionary of whole tensors with query, key and value apart; `save` lays
them out as each version and number of ranks did, `logits` computes with them as they are.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, D, N, P = 4, 48, 4, 40  # layers, hidden size, heads, positions
H, V = D // N, 31
EPSILON = 1e-12
Model = dict[str, Tensor]


def random_model(seed: int = 0) -> Model:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def vector(size: int, around: float = 0.0) -> Tensor:
        return torch.randn(size, generator=generator) * 0.2 + around

    model = {"words": matrix(V, D), "positions": matrix(P, D)}
    for i in range(LAYERS):
        for part in "qkv":
            model |= {f"{i}.{part}.weight": matrix(N, H, D), f"{i}.{part}.bias": vector(N * H).view(N, H)}
        for name, rows, columns in (("out", D, D), ("up", 4 * D, D), ("down", D, 4 * D)):
            model |= {f"{i}.{name}.weight": matrix(rows, columns), f"{i}.{name}.bias": vector(rows)}
        for norm in ("norm1", "norm2"):
            model |= {f"{i}.{norm}.weight": vector(D, 1.0), f"{i}.{norm}.bias": vector(D)}
    for norm in ("final", "head.norm"):
        model |= {f"{norm}.weight": vector(D, 1.0), f"{norm}.bias": vector(D)}
    return model | {"head.dense.weight": matrix(D, D), "head.dense.bias": vector(D), "head.bias": vector(V)}


def logits(model: Model, tokens: Tensor) -> Tensor:
    """Logits [L, V] of one sequence: pre-LN, learned positions, tanh GELU in the MLP, exact GELU in the head."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), model[f"{name}.weight"], model[f"{name}.bias"], eps=EPSILON)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ model[f"{name}.weight"].T + model[f"{name}.bias"]

    x = model["words"][tokens] + model["positions"][: len(tokens)]
    for i in range(LAYERS):
        y = norm(x, f"{i}.norm1")
        q, k, v = (
            torch.einsum("nhd,ld->nlh", model[f"{i}.{part}.weight"], y) + model[f"{i}.{part}.bias"][:, None]
            for part in "qkv"
        )
        mixed = (q @ k.transpose(1, 2) / H**0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).flatten(1), f"{i}.out")
        up = linear(norm(x, f"{i}.norm2"), f"{i}.up")
        gelu = 0.5 * up * (1 + torch.tanh(0.7978845608028654 * (up + 0.044715 * up**3)))
        x = x + linear(gelu, f"{i}.down")
    y = linear(norm(x, "final"), "head.dense")
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    return norm(y, "head.norm") @ model["words"].T + model["head.bias"]


def fused(model: Model, layer: int, kind: str, heads: slice, version: float) -> Tensor:
    """Rows of query_key_value of the heads of one rank."""
    parts = [model[f"{layer}.{part}.{kind}"][heads] for part in "qkv"]  # each [heads, H, ...]
    if version == 0:
        return torch.cat([part.flatten(0, 1) for part in parts])
    return torch.stack(parts, dim=2 if version == 1 else 1).flatten(0, 2)


def padded(tensor: Tensor, num_ranks: int) -> Tensor:
    """With rows up to the next multiple of 128 for each rank, which hold what no one must ever see."""
    rows = -len(tensor) % (128 * num_ranks)
    return torch.cat([tensor, torch.full((rows, *tensor.shape[1:]), 1e6)])


def rank_state(model: Model, stage: int, rank: int, num_stages: int, num_ranks: int, version: float) -> dict[str, Any]:
    """The entry 'model' of one rank."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor[len(tensor) // num_ranks * rank : len(tensor) // num_ranks * (rank + 1)]

    def columns(tensor: Tensor) -> Tensor:
        return rows(tensor.T).T.contiguous()

    heads = slice(N // num_ranks * rank, N // num_ranks * (rank + 1))
    per_stage = LAYERS // num_stages
    transformer: dict[str, Tensor] = {}
    for local in range(per_stage):
        i, theirs = stage * per_stage + local, f"layers.{local}"
        for kind in ("weight", "bias"):
            transformer |= {
                f"{theirs}.input_layernorm.{kind}": model[f"{i}.norm1.{kind}"],
                f"{theirs}.attention.query_key_value.{kind}": fused(model, i, kind, heads, version),
                f"{theirs}.post_attention_layernorm.{kind}": model[f"{i}.norm2.{kind}"],
                f"{theirs}.mlp.dense_h_to_4h.{kind}": rows(model[f"{i}.up.{kind}"]),
            }
        transformer |= {
            f"{theirs}.attention.dense.weight": columns(model[f"{i}.out.weight"]),
            f"{theirs}.attention.dense.bias": model[f"{i}.out.bias"],
            f"{theirs}.mlp.dense_4h_to_h.weight": columns(model[f"{i}.down.weight"]),
            f"{theirs}.mlp.dense_4h_to_h.bias": model[f"{i}.down.bias"],
        }
    words = {"weight": rows(padded(model["words"], num_ranks))}
    state: dict[str, Any] = {"language_model": {"transformer": transformer}}
    if stage == 0:
        positions = {"weight": model["positions"]}
        state["language_model"]["embedding"] = {"word_embeddings": words, "position_embeddings": positions}
    if stage == num_stages - 1:
        transformer |= {f"final_layernorm.{kind}": model[f"final.{kind}"] for kind in ("weight", "bias")}
        state["lm_head"] = {
            "bias": rows(padded(model["head.bias"], num_ranks)),
            **{f"dense.{kind}": model[f"head.dense.{kind}"] for kind in ("weight", "bias")},
            **{f"layernorm.{kind}": model[f"head.norm.{kind}"] for kind in ("weight", "bias")},
        }
        if stage > 0:
            state["word_embeddings_for_head"] = words
    return state


def arguments(num_stages: int, num_ranks: int, version: float) -> argparse.Namespace:
    args = argparse.Namespace(
        num_layers=LAYERS, hidden_size=D, num_attention_heads=N, max_position_embeddings=P, layernorm_epsilon=EPSILON,
        hidden_dropout=0.1, attention_dropout=0.1, openai_gelu=False, onnx_safe=None, bias_gelu_fusion=True,
        apply_residual_connection_post_layernorm=False, init_method_std=0.02, make_vocab_size_divisible_by=128,
        padded_vocab_size=128 * num_ranks, params_dtype=torch.float16, data_path=["proteins"], lr=1e-4, seed=1234,
    )  # fmt: skip
    if version < 3:
        args.model_parallel_size = num_ranks
    else:
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size = num_ranks, num_stages
    return args


def save(path: Path, model: Model, *, num_stages: int = 1, num_ranks: int = 1, version: float = 3.0) -> Path:
    """Write the checkpoint of an iteration, with the states of optimizer and random generators; returns its folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "latest_checkpointed_iteration.txt").write_text("1000")
    folder = path / "iter_0001000"
    for stage in range(num_stages):
        for rank in range(num_ranks):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if num_stages > 1 else "")
            state = {
                "args": arguments(num_stages, num_ranks, version),
                "iteration": 1000,
                "model": rank_state(model, stage, rank, num_stages, num_ranks, version),
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]},
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
            if version > 0:
                state["checkpoint_version"] = version
            (folder / name).mkdir(parents=True)
            torch.save(state, folder / name / "model_optim_rng.pt")
    return folder


def change(file: Path, edit: Any) -> None:
    """Load a rank's file, let `edit` change its content, and save it."""
    content = torch.load(file, weights_only=False)
    edit(content)
    torch.save(content, file)


def words(content: dict[str, Any]) -> dict[str, Tensor]:
    """The embedding in the content of a rank's file."""
    return content["model"]["language_model"]["embedding"]["word_embeddings"]
