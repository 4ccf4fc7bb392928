"""The loss is a plain sum of surprisals in nats."""

import numpy as np
import torch
from scipy.special import logsumexp

from megatron_plm.data.loader import IGNORED_LABEL
from megatron_plm.model.heads import summed_cross_entropy


def random_logits(seed=0, shape=(3, 7, 33)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4


def test_summed_cross_entropy_is_the_sum_of_surprisals():
    logits = random_logits()
    labels = torch.randint(0, 33, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[0, 2:] = labels[2, 0] = IGNORED_LABEL
    exact = logits.numpy().astype(np.float64)
    expected = sum(
        logsumexp(exact[row, m]) - exact[row, m, label]
        for row in range(3)
        for m, label in enumerate(labels[row].tolist())
        if label >= 0
    )
    np.testing.assert_allclose(float(summed_cross_entropy(logits, labels)), expected, rtol=1e-6)


def test_it_adds_up_over_micro_batches():
    logits, labels = random_logits(), torch.arange(21).view(3, 7)
    parts = sum(summed_cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(3))
    torch.testing.assert_close(parts, summed_cross_entropy(logits, labels))


def test_no_labels_are_a_loss_of_zero_without_gradient():
    logits = random_logits().requires_grad_()
    loss = summed_cross_entropy(logits, torch.full((3, 7), IGNORED_LABEL))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_bfloat16_logits_are_summed_in_float32():
    logits = random_logits(shape=(8, 512, 33)).bfloat16()
    labels = torch.randint(0, 33, (8, 512), generator=torch.Generator().manual_seed(1))
    loss = summed_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), summed_cross_entropy(logits.double(), labels).double(), rtol=1e-5, atol=0)
