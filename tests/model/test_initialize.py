"""Initial weights are a function of parameter name and seed, with the documented sizes."""

import dataclasses
import math

import pytest
import torch
from packing import SHAPE, TOKENIZER
from scipy import stats

from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel

WIDE = dataclasses.replace(SHAPE, hidden_size=192, num_layers=2)


def weights(options=SHAPE, seed=1):
    model = MaskedLanguageModel(options, TOKENIZER)
    initialize(model, options, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_every_parameter_is_set_whatever_torch_drew_before():
    torch.manual_seed(1)
    first = weights()
    torch.manual_seed(2)
    second = weights()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=name)


def test_seeds_and_names_have_values_of_their_own():
    first, other = weights(seed=1), weights(seed=2)
    matrices = {name: value for name, value in first.items() if value.dim() == 2}
    assert all((value != other[name]).float().mean() > 0.99 for name, value in matrices.items())
    one, two = (matrices[f"encoder.blocks.{i}.mlp.up.weight"] for i in (0, 1))
    assert (one != two).float().mean() > 0.99


def test_added_layers_change_nothing_but_the_residual_scaling():
    shallow, deep = weights(SHAPE), weights(dataclasses.replace(SHAPE, num_layers=12))
    assert shallow.keys() < deep.keys()
    scaled = 0
    for name, value in shallow.items():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            torch.testing.assert_close(value * math.sqrt(3 / 12), deep[name])
            scaled += 1
        else:
            torch.testing.assert_close(value, deep[name], rtol=0, atol=0, msg=name)
    assert scaled == 2 * 3


def test_a_part_of_the_model_alone_does_not_matter_only_names_do():
    """A head of another vocabulary or a removed module leaves the others as they are."""
    narrow = weights(dataclasses.replace(SHAPE, ffn_hidden_size=64))
    same = [name for name, value in narrow.items() if "mlp" not in name or value.dim() == 1]
    whole = weights()
    assert len(same) > 20
    for name in same:
        if narrow[name].shape == whole[name].shape:
            torch.testing.assert_close(narrow[name], whole[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_matrices_are_normal_with_the_asked_deviation(std):
    options = dataclasses.replace(WIDE, init_method_std=std)
    for name, value in weights(options).items():
        if value.dim() == 1:
            continue
        expected = std / 2 if name.endswith(("attention.out.weight", "mlp.down.weight")) else std  # 2 = √(2 · 2 layers)
        # The deviation of n samples scatters by 1/√(2n), the mean by 1/√n; five times that.
        assert value.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * value.numel())), name
        assert abs(value.mean().item()) < 5 * expected / math.sqrt(value.numel()), name
        assert stats.kstest(value.flatten().numpy()[:20000] / expected, "norm").pvalue > 1e-4, name


def test_biases_are_zero_and_norms_one():
    ones = set()
    for name, value in weights().items():
        if value.dim() == 1:
            assert value.unique().tolist() == [1.0 if name.endswith("norm.weight") else 0.0], name
            ones |= {name} if value[0] == 1 else set()
    assert len(ones) == 2 * SHAPE.num_layers + 2, "two in a block, the final one and the head's"
