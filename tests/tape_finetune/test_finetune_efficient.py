"""Recomputation, bfloat16 and learning rates by layer: what they change, and what they must not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_plm.model.transformer import Encoder
from megatron_plm.training.optimizer import build_optimizer, set_learning_rate
from tape_finetune.batching import pack
from tape_finetune.data import Example
from tape_finetune.efficient import layer_lr_scales, recompute_blocks, train_in_bf16
from tape_finetune.heads import LinearHead
from tape_finetune.model import TaskModel, discard_final_norm, transformer

EXAMPLES = [Example("", "MKTAYIAKQRNDVW", None), Example("", "ACDEFGHIKLMNP", None, cropped=True)]


def _model(checkpoint: Path, change: Callable[[Encoder], None] = lambda _: None) -> TaskModel:
    base = transformer(checkpoint)
    head = LinearHead(base.num_features, 2)
    head.initialize(seed=0)
    change(base.encoder)
    return TaskModel(base, head, "residue")


def _outputs(model: TaskModel) -> Tensor:
    packed = pack(EXAMPLES, model.base.tokenizer)
    return model.head(model.features(packed), packed.lengths)


def _gradients(model: TaskModel) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(1)
    _outputs(model).square().sum().backward()
    model.eval()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["checkpoint", "dropout_checkpoint"])
def test_recomputed_blocks_give_the_same_gradients(kind, request):
    path = request.getfixturevalue(kind)
    calls = []
    models = [_model(path), _model(path, lambda encoder: recompute_blocks(encoder, draws="dropout" in kind))]
    for model in models:
        for block in model.base.encoder.blocks.values():
            block.mlp.register_forward_pre_hook(lambda *_, model=model: calls.append(model))
    plain, recomputed = map(_gradients, models)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert [calls.count(model) for model in models] == [2, 4]


def test_bf16_acts_in_training_and_leaves_float32_weights_gradients_and_scores(checkpoint):
    plain, model = _model(checkpoint), _model(checkpoint, train_in_bf16)
    dtypes = []
    for block in model.base.encoder.blocks.values():
        block.mlp.up.register_forward_pre_hook(lambda module, inputs: dtypes.append((inputs[0].dtype, module.training)))
    assert torch.equal(_outputs(plain), _outputs(model))
    expected, found = _gradients(plain), _gradients(model)
    assert dtypes == [(torch.float32, False)] * 2 + [(torch.bfloat16, True)] * 2
    for name, gradient in found.items():
        assert gradient.dtype == dict(model.named_parameters())[name].dtype == torch.float32
        # bfloat16 has 8 bits: a rounding is up to 0.4 %, and there are a few tens of them on the way
        assert (gradient - expected[name]).norm() <= 0.05 * expected[name].norm() + 1e-4, name
    assert not torch.equal(
        found["base.encoder.blocks.0.mlp.up.weight"], expected["base.encoder.blocks.0.mlp.up.weight"]
    )


def test_bf16_and_recomputation_go_together(checkpoint):
    def both(encoder: Encoder) -> None:
        train_in_bf16(encoder)
        recompute_blocks(encoder, draws=False)

    alone, together = (_gradients(_model(checkpoint, change)) for change in (train_in_bf16, both))
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_the_learning_rate_falls_from_the_top_block_down(checkpoint):
    model = _model(checkpoint)
    scales = layer_lr_scales(model.base.encoder, 0.5)
    optimizer = build_optimizer(model.parameters(), lr=1.0, weight_decay=0.0, eps=1e-30, lr_scales=scales)
    set_learning_rate(optimizer, 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _gradients(model)
    optimizer.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    # The first step of Adam moves what has a gradient by the learning rate.
    assert moved["head.output.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["base.encoder.final_norm.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["base.encoder.blocks.1.mlp.up.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["base.encoder.blocks.0.mlp.up.weight"] == pytest.approx(5e-4, rel=1e-3)
    assert moved["base.encoder.blocks.0.attention_norm.bias"] == pytest.approx(5e-4, rel=1e-3)
    assert moved["base.encoder.embedding.tokens.weight"] == pytest.approx(2.5e-4, rel=1e-3)


def test_without_its_norm_the_encoder_gives_the_last_blocks_output(checkpoint):
    model, kept = _model(checkpoint), []
    model.base.encoder.blocks["1"].register_forward_hook(lambda _, __, output: kept.append(output[0]))
    packed = pack(EXAMPLES, model.base.tokenizer)
    with_norm = model.features(packed)
    discard_final_norm(model.base)
    assert torch.equal(model.features(packed), kept[0][packed.residue_index])
    assert not torch.allclose(model.features(packed), with_norm)


def test_a_model_that_ends_without_a_norm_has_none_to_discard(checkpoint):
    base = transformer(checkpoint)
    base.options = dataclasses.replace(base.options, norm_placement="post")
    with pytest.raises(Exception, match="--compat proteinlm: discards the norm behind the last block"):
        discard_final_norm(base)
