"""Heads against plain formulas, and their gradients against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
    head.standardize.fit(_features() + 1)
    return head


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


@pytest.mark.parametrize("head", [ContactHead, LinearContactHead])
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
