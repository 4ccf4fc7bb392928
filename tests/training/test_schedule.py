"""The learning rate, by hand."""

import itertools

import pytest

from megatron_plm.training.schedule import learning_rate


def rates(style, *, warmup=4, total=12, peak=8.0, minimum=2.0):
    return [
        learning_rate(step, peak=peak, minimum=minimum, warmup=warmup, total=total, style=style)
        for step in range(total + 3)
    ]


def test_linear_decay_by_hand():
    warm, decay = [2, 4, 6, 8], [8, 7.25, 6.5, 5.75, 5, 4.25, 3.5, 2.75]
    assert rates("linear") == pytest.approx([*warm, *decay, 2, 2, 2])


def test_cosine_decay_by_hand():
    # 2 + 6 · (1 + cos(π·k/8)) / 2 for k = 0 … 8
    decay = [8, 7.7716386, 7.1213203, 6.1480503, 5, 3.8519497, 2.8786797, 2.2283614]
    assert rates("cosine") == pytest.approx([2, 4, 6, 8, *decay, 2, 2, 2])


def test_constant_stays_at_the_peak():
    assert rates("constant") == pytest.approx([2, 4, 6, *[8] * 12])


@pytest.mark.parametrize("style", ["linear", "cosine", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(style):
    assert rates(style, warmup=0)[0] == 8


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_warm_up_longer_than_the_run_never_gets_to_the_peak(style):
    assert rates(style, warmup=24)[:12] == pytest.approx([8 * (step + 1) / 24 for step in range(12)])


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_rate_falls_from_step_to_step_and_stays_within_its_limits(style):
    after = rates(style, total=50)[3:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert (max(after), min(after)) == (8, 2)
