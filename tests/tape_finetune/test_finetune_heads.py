"""Heads against plain formulas, and their gradients against finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tape_peer import import_tape
from torch import Tensor, nn

from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.errors import UserError
from megatron_plm.inference.contacts import contact_map
from megatron_plm.inference.runner import Runner
from megatron_plm.model.heads import ContactHead as EsmContactHead
from tape_finetune.batching import pack
from tape_finetune.data import Example
from tape_finetune.heads import (
    ContactHead,
    ConvHead,
    Head,
    LinearContactHead,
    LinearHead,
    MLPHead,
    Standardize,
    mean_over_residues,
)
from tape_finetune.model import TaskModel, build_head, transformer
from tape_finetune.pair_heads import AttentionContactHead, ResidualContactHead
from tape_finetune.tape_heads import TapeConvHead, TapePooledHead

LENGTHS = [5, 1, 9, 2]


def _features(width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(LENGTHS), width, generator=generator, dtype=torch.float64)


def _ready(head: Head) -> Head:
    head = head.double()
    head.initialize(seed=3)
    for name, parameter in head.named_parameters():
        if parameter.dim() == 1:  # biases start at 0, which would hide them
            parameter.data += 0.1 * len(name)
    if head.standardized:
        head.standardize.fit(_features() + 1)
    return head.eval()


def test_convolution_never_reaches_into_another_protein():
    head, features = _ready(ConvHead(6, 3, hidden_size=7)), _features()
    one_by_one = []
    for x_LD in head.standardize(features).split(LENGTHS):
        hidden = F.relu(F.conv1d(x_LD.T[None], head.hidden.weight, head.hidden.bias, padding=2))
        one_by_one.append(F.conv1d(hidden, head.output.weight, head.output.bias, padding=1)[0].T)
    torch.testing.assert_close(head(features, LENGTHS), torch.cat(one_by_one), rtol=1e-12, atol=1e-12)


def test_contact_head_is_the_symmetrised_mlp_of_product_and_difference():
    head, features = _ready(ContactHead(6, 1, width=4, hidden_size=5)), _features()
    expected = []
    for x_LD in head.project(head.standardize(features)).split(LENGTHS):
        product = x_LD[:, None] * x_LD[None]
        difference = x_LD[:, None] - x_LD[None]
        logits_LL = head.output(F.relu(head.product(product) + head.difference(difference)))[..., 0]
        expected.append(((logits_LL + logits_LL.T) / 2).flatten())
    torch.testing.assert_close(head(features, LENGTHS), torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_differences_matter_in_the_contact_head_and_cancel_in_tapes_linear_one():
    features = _features()
    head = _ready(ContactHead(6, 1, width=4, hidden_size=5))
    with_differences = head(features, LENGTHS)
    head.difference.weight.data.zero_()
    assert not torch.allclose(head(features, LENGTHS), with_differences)

    linear = _ready(LinearContactHead(6))
    difference_weight = torch.arange(6.0, dtype=torch.float64)
    expected = []
    for x_LD in linear.standardize(features).split(LENGTHS):
        product, difference = x_LD[:, None] * x_LD[None], x_LD[:, None] - x_LD[None]
        logits_LL = product @ linear.output.weight[0] + difference @ difference_weight + linear.output.bias
        expected.append(((logits_LL + logits_LL.T) / 2).flatten())
    torch.testing.assert_close(linear(features, LENGTHS), torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "head",
    [
        LinearHead(6, 2),
        MLPHead(6, 2, hidden_size=4),
        ConvHead(6, 2, hidden_size=4),
        ContactHead(6, 1, width=3, hidden_size=4),
        LinearContactHead(6),
        ResidualContactHead(6, 1, channels=2, num_blocks=1),
        AttentionContactHead(6),
        TapeConvHead(6, 2, hidden_size=4),
        TapePooledHead(6, 2, hidden_size=4),
    ],
    ids=lambda head: type(head).__name__,
)
def test_gradients_are_those_of_finite_differences(head):
    head = _ready(head)
    parameters = tuple(head.parameters())

    def run(features: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in head.named_parameters()), values, strict=True))
        return torch.func.functional_call(head, named, (features, LENGTHS))

    assert torch.autograd.gradcheck(run, (_features().requires_grad_(), *parameters))


@pytest.mark.parametrize("head", [ContactHead, LinearContactHead, ResidualContactHead, AttentionContactHead])
def test_contact_heads_have_one_output(head):
    with pytest.raises(AssertionError, match="one logit"):
        head(6, 2)


def test_mean_over_residues_is_each_proteins_own_and_has_its_gradient():
    features = _features().requires_grad_()
    expected = torch.stack([x_LD.mean(0) for x_LD in features.split(LENGTHS)])
    torch.testing.assert_close(mean_over_residues(features, LENGTHS), expected)
    assert torch.autograd.gradcheck(lambda x: mean_over_residues(x, LENGTHS), (features,))


def test_standardized_features_have_mean_zero_and_no_blown_up_rarity():
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 1e-3, 0.0]) + 9
    layer = Standardize(4)
    layer.fit(x)
    scaled = layer(x)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    assert scaled.std(0).max() == pytest.approx(1, abs=0.01)
    assert scaled.std(0)[2] < 1e-3
    constant = Standardize(4)
    constant.fit(torch.ones(10, 4))
    assert torch.equal(constant(torch.ones(1, 4)), torch.zeros(1, 4))


def test_first_weights_depend_on_seed_and_name_alone():
    heads = [ConvHead(6, 2, hidden_size=4) for _ in range(3)]
    for head, seed in zip(heads, (1, 1, 2), strict=True):
        head.initialize(seed)
    a, b, c = (head.hidden.weight for head in heads)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_residual_contact_head_is_a_net_over_each_proteins_map_of_pairs():
    head, features = _ready(ResidualContactHead(6, 1, channels=4, num_blocks=2)), _features()
    expected = []
    for x_LD in head.standardize(features).split(LENGTHS):
        product, difference = x_LD[:, None] * x_LD[None], x_LD[:, None] - x_LD[None]
        maps = (head.product(product) + head.difference(difference)).permute(2, 0, 1)[None]
        for block in head.blocks:
            inner = maps
            for norm, conv in ((block.first_norm, block.first), (block.second_norm, block.second)):
                scaled = (inner - inner.mean()) / (inner.var(correction=0) + norm.eps).sqrt()
                scaled = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
                inner = F.conv2d(scaled.relu(), conv.weight, conv.bias, padding=1)
            maps = maps + inner
        logits_LL = (head.output.weight[0, :, 0, 0] @ maps[0].flatten(1) + head.output.bias).view(len(x_LD), -1)
        expected.append(((logits_LL + logits_LL.T) / 2).flatten())
    torch.testing.assert_close(head(features, LENGTHS), torch.cat(expected), rtol=1e-10, atol=1e-10)


def test_attention_head_is_the_contact_head_of_inference(checkpoint):
    base = transformer(checkpoint)
    options = base.options
    esm = EsmContactHead(options)
    model = TaskModel(base, build_head({"attention": AttentionContactHead}, "attention", base, 1), "pair")
    nn.init.normal_(esm.regression.weight)
    model.head.regression.load_state_dict(esm.regression.state_dict())
    runner = Runner(load_pretrained(checkpoint), torch.device("cpu"), torch.float32)
    examples = [Example("", protein, None) for protein in ("MKTAYIAKQRQISFVK", "ACDEFGH")]
    packed = pack(examples, base.tokenizer)
    with torch.no_grad():
        logits = model.outputs(model.features(packed), examples).split([256, 49])
    for example, found in zip(examples, logits, strict=True):
        expected = contact_map(runner, esm, base.tokenizer.encode(example.sequence))
        np.testing.assert_allclose(found.sigmoid().view(expected.shape), expected, rtol=1e-4, atol=1e-5)
    fused = next(iter(base.encoder.blocks.values())).attention.attend
    assert "Maps" not in type(fused).__name__  # put back


def test_attention_head_needs_a_transformer():
    from tape_finetune.model import build_base

    with pytest.raises(UserError, match="--head attention: reads a Transformer's attention"):
        build_head({"attention": AttentionContactHead}, "attention", build_base("onehot", None, 1), 1)


def _tape_heads():
    return import_tape("tape.models.modeling_utils")


def test_tape_heads_are_those_of_tape_proteins():
    """In training too, where the norm's statistics are those of the batch; all proteins have one length, as TAPE's
    would count its padding."""
    x = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    theirs = _tape_heads().SimpleConv(6, 8, 3)
    ours = TapeConvHead(6, 3, hidden_size=8)
    _copy_main(theirs.main, {0: ours.norm, 1: ours.hidden, 4: ours.output})
    for mode in (True, False):
        expected = theirs.train(mode)(x)
        torch.testing.assert_close(ours.train(mode)(x.flatten(0, 1), [9] * 3), expected.flatten(0, 1))
    torch.testing.assert_close(ours.norm.running_var, theirs.main[0].running_var)

    theirs, ours = _tape_heads().SimpleMLP(6, 8, 2), TapePooledHead(6, 2, hidden_size=8)
    _copy_main(theirs.main, {0: ours.hidden, 3: ours.output})
    first = x[:, 0]
    pooled = torch.tanh(F.linear(first, ours.pooler.weight, ours.pooler.bias))
    torch.testing.assert_close(ours(first, [1] * 3), theirs(pooled))


def _copy_main(theirs, ours_by_index):
    """Give their layers our weights, under the names that torch had for normalized weights before."""
    for index, module in ours_by_index.items():
        state = module.state_dict()
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        theirs[index].load_state_dict({names.get(name, name): value for name, value in state.items()})


def test_normalized_weights_begin_as_they_were_drawn():
    head = TapeConvHead(6, 2, hidden_size=4)
    head.initialize(seed=3)
    assert head.hidden.weight.detach().std() == pytest.approx((6 * 5) ** -0.5, rel=0.2)
