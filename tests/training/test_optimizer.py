"""AdamW's groups, and clipping against torch's own."""

import pytest
import torch
from torch import nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer
from megatron_plm.training.optimizer import build_optimizer, clip_gradients, set_learning_rate


def build():
    torch.manual_seed(0)
    return MaskedLanguageModel(ModelOptions(num_layers=1, hidden_size=16, num_attention_heads=2), get_tokenizer("esm2"))


def with_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_matrices_decay_and_biases_and_norms_do_not():
    model = build()
    decayed, kept = build_optimizer(model.parameters(), lr=1e-3, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(p)] for p in decayed["params"]}
    assert matrices == {
        "encoder.embedding.tokens.weight",
        *(f"encoder.blocks.0.{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")),
        "head.dense.weight",
    }
    assert matrices | {names[id(p)] for p in kept["params"]} == set(names.values())


def test_frozen_parameters_are_left_out():
    model = build()
    model.encoder.requires_grad_(False)
    groups = build_optimizer(model.parameters(), lr=1e-3, weight_decay=0.1).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for p in model.head.parameters()
    )
    model.head.dense.weight.requires_grad_(False)
    (only,) = build_optimizer(model.parameters(), lr=1e-3, weight_decay=0.1).param_groups
    assert only["weight_decay"] == 0.0


def test_a_step_is_adamw_by_hand():
    """Loshchilov & Hutter 2019, algorithm 2, for the first step, where both moments are the gradient's after bias
    correction."""
    model = with_gradients(build())
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    optimizer = build_optimizer(model.parameters(), lr=9.0, weight_decay=0.5, betas=(0.9, 0.98), eps=1e-3)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    for name, parameter in model.named_parameters():
        value, gradient = before[name]
        decay = 0.5 if parameter.dim() > 1 else 0.0
        expected = value - 0.01 * (gradient / (gradient.abs() + 1e-3) + decay * value)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs(max_norm):
    ours, theirs = with_gradients(build()), with_gradients(build())
    norm = clip_gradients(ours.parameters(), max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_zero_measures_and_clips_nothing():
    model, untouched = with_gradients(build()), with_gradients(build())
    norm = clip_gradients(model.parameters(), 0.0)
    assert norm.item() == pytest.approx(sum(p.grad.double().square().sum().item() for p in model.parameters()) ** 0.5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


def test_parameters_without_a_gradient_are_passed_over():
    model = with_gradients(build())
    model.head.bias.grad = None
    assert torch.isfinite(clip_gradients(model.parameters(), 1.0))
    assert model.head.bias.grad is None
