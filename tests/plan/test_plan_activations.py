"""Every kind of model: what autograd keeps of a forward pass, and what elementwise kernels move, as the plan counts."""

import contextlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from saved_tensors import saved_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_plm.kernels.linear
from megatron_plm.config.options import Config, DataOptions, ModelOptions, ParallelOptions, TrainingOptions
from megatron_plm.model.attention import Sequences
from megatron_plm.model.heads import summed_cross_entropy
from megatron_plm.model.layers import RotaryEmbedding, token_keys
from megatron_plm.model.transformer import Block
from megatron_plm.parallel.apply import build_model
from megatron_plm.parallel.mesh import arranged_world, joined_world
from megatron_plm.plan.check import pretended_rank
from megatron_plm.plan.memory import (
    FP32,
    block_activation_bytes,
    embedding_activation_bytes,
    final_activation_bytes,
    head_activation_bytes,
)
from megatron_plm.plan.passes import KERNELS_OF_DROPOUT, _traffic
from megatron_plm.tokenizers import get_tokenizer

VOCAB, B, L, M = 33, 2, 64, 10
PLAIN = ModelOptions(num_layers=2, hidden_size=96, num_attention_heads=6, ffn_hidden_size=192)
LEARNED = {"position_embedding_type": "learned_absolute", "max_position_embeddings": L, "token_dropout": False}
OPTIONS = {
    "ESM-2": {},
    "learned positions": LEARNED,
    "RMSNorm": {"normalization": "RMSNorm"},
    "no biases": {"add_bias_linear": False},
    "GELU by tanh": {"activation": "gelu_tanh"},
    "SwiGLU": {"activation": "swiglu"},
    "post-LN": {"norm_placement": "post"},
    "embedding norm": {"embedding_layernorm": True},
    "no transform": {"head_transform": False},
    "untied": {"untie_embeddings_and_output_weights": True},
    "dropout": {"hidden_dropout": 0.1},
    "TAPE": {**LEARNED, "norm_placement": "post", "embedding_layernorm": True, "hidden_dropout": 0.1},
    "AMPLIFY": {
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "add_bias_linear": False,
        "head_transform": False,
        "untie_embeddings_and_output_weights": True,
    },
}
LAYOUTS = {
    "one process": ParallelOptions(),
    "TP2": ParallelOptions(tensor_model_parallel_size=2),
    "TP2+SP": ParallelOptions(tensor_model_parallel_size=2, sequence_parallel=True),
}


@contextlib.contextmanager
def built(config: Config):
    """The model of `config` as the engine builds it for one process, of a group that carries nothing."""
    with contextlib.ExitStack() as stack:
        if config.parallel == ParallelOptions():
            world = stack.enter_context(joined_world())
        else:
            stack.enter_context(pretended_rank(0, 2))
            world = arranged_world(config.parallel, torch.device("cpu"))
        (model,) = build_model(config, get_tokenizer("esm2"), world).parts
        yield model.train()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_saves_exactly_what_the_formulae_count(name, layout):
    model, parallel = replace(PLAIN, **OPTIONS[name]), LAYOUTS[layout]
    config = Config(
        model=model,
        data=DataOptions(seq_length=L),
        training=TrainingOptions(micro_batch_size=B, global_batch_size=B),
        parallel=parallel,
    )
    tokens, ids = torch.full((B, L), 5), torch.ones(B, M, dtype=torch.int64)
    positions, index = torch.arange(L).repeat(B, 1), torch.arange(M).repeat(B, 1)
    cuts = torch.tensor([0, 40, L, B * L], dtype=torch.int32)
    with built(config) as module:
        saved = saved_bytes(
            lambda: summed_cross_entropy(
                module(tokens, positions, torch.ones_like(tokens), cuts, index, torch.arange(B)), ids
            ),
            [*module.parameters(), tokens, positions, index, ids],
        )
    rotary = 2 * model.head_dim * FP32 if model.position_embedding_type == "rope" else 0
    of_tokens = model.num_layers * block_activation_bytes(config) + rotary + embedding_activation_bytes(config)
    of_tokens += final_activation_bytes(config)
    of_labels = head_activation_bytes(config) + FP32 * VOCAB
    assert saved - uncounted(model, parallel) == B * L * of_tokens + B * M * of_labels


def uncounted(model: ModelOptions, parallel: ParallelOptions) -> float:
    """Bytes of this model's forward pass that are too few for the plan, or that only a CPU keeps."""
    one = model.normalization == "RMSNorm"
    scale = FP32 if model.token_dropout else 1  # a factor or a flag for each token's vector
    found = B * L * scale + FP32  # and the sum of the labels' weights
    if model.head_transform:
        found += B * M * (1 if one else 2) * FP32  # the head's norm
    if one:  # which has no kernel of its own on a CPU, and keeps what it normalized without the factors
        between = 2 if parallel.sequence_parallel else 1
        norms = 2 * model.num_layers + (model.norm_placement == "pre")
        found += B * L * model.hidden_size * FP32 * norms / between
        found += B * M * model.hidden_size * FP32 * model.head_transform
    return found


class Moved(TorchDispatchMode):
    """Bytes that kernels read and write, but for matrix products and attention."""

    UNMOVED = ("view", "expand", "transpose", "select", "split", "unbind", "squeeze", "detach", "alias", "empty", "mm",
               "attention")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Counter()
        self.kernels = 0

    def __torch_dispatch__(self, op, _types, arguments=(), named=None):
        result = op(*arguments, **(named or {}))
        name = op._schema.name.removeprefix("aten::")
        is_way = any(name.strip("_").startswith(word) for word in ("t.", "slice")) and not name.endswith("backward")
        if name == "t" or is_way or (any(word in name for word in self.UNMOVED) and not name.endswith("backward")):
            return result
        tensors = [x for x in tree_leaves((arguments, named, result)) if isinstance(x, Tensor) and x.numel() > 1000]
        self.bytes[name] += sum(stored_numbers(x) * x.element_size() for x in tensors)
        self.kernels += bool(tensors)
        return result


def stored_numbers(x: Tensor) -> int:
    """Numbers of `x` without the repetitions that `expand` makes."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


def moved_by(model: ModelOptions) -> list[Moved]:
    """What a block's elementwise kernels move for B · L tokens, forward and backward."""
    block = Block(model).train()
    x_BLD = torch.randn(B, L, model.hidden_size, requires_grad=True)
    rotary = None
    if model.position_embedding_type == "rope":
        rotary = RotaryEmbedding(model.head_dim)(torch.arange(L).expand(B, L), torch.float32)
    cuts = torch.tensor([0, L, B * L], dtype=torch.int32)
    keys = token_keys(torch.arange(B), L)
    gradient = torch.randn_like(x_BLD)
    with Moved() as forward:
        y_BLD = block(x_BLD, rotary, Sequences.from_cu_seqlens(cuts, L, torch.float32), keys)
    with Moved() as backward:
        y_BLD.backward(gradient)
    return [forward, backward]


# Differences, as what all models have in common is cut into other kernels on a CPU than on a GPU.
@pytest.mark.parametrize("name", ["learned positions", "no biases", "GELU by tanh", "SwiGLU", "post-LN", "dropout"])
def test_an_option_moves_as_many_bytes_more_or_less_as_the_plan_counts(name, monkeypatch):
    monkeypatch.setattr(megatron_plm.kernels.linear, "_HAS_ONEDNN", False)  # the dispatcher sees nothing of its sums
    model, D, F = replace(PLAIN, **OPTIONS[name]), PLAIN.hidden_size, PLAIN.ffn_size
    measured = zip(moved_by(model), moved_by(PLAIN), strict=True)
    counted = zip(_traffic(model), _traffic(PLAIN), strict=True)
    for (ours, plain), (option, without), kernels in zip(measured, counted, KERNELS_OF_DROPOUT, strict=True):
        whole, inner, wide, drawn = (a - b for a, b in zip(option, without, strict=True))
        more = (ours.bytes.total() - plain.bytes.total()) / (B * L)
        # The tables of cosines and sines are small beside what they turn.
        assert more == pytest.approx(FP32 * ((whole + inner) * D + wide * F) + drawn * D, abs=0.4 * FP32 * D)
        if name == "dropout":
            assert ours.kernels - plain.kernels == kernels
