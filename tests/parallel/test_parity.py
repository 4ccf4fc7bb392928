"""Every kind of layout trains as one process does: the cases of `tools/benchmark.py parity`, on a small model."""

from dataclasses import replace

import pytest

from megatron_plm.benchmark.parity import BARS, compare
from megatron_plm.benchmark.parity_cases import ALONE, CASES, EVERY_MODEL, SHAPE

# As long as what is measured, and smaller: the time goes into passes of messages, block by block.
SMALL = [*SHAPE.split(), "--num-layers=3", "--hidden-size=40", "--ffn-hidden-size=80", "--seq-length=64", "--lr=3e-3"]
STEPS = 20


def small(case):
    """The case for three blocks: four stages have to be told how to share them. (test_layouts_go_on.py has five.)"""
    four_stages = any(word in case.words for word in ("interleaved", "zbv")) or "PP4" in case.name
    return replace(case, flags=f"{case.flags} --pipeline-layout 1,1,1,0") if four_stages else case


TESTED = [small(case) for case in CASES if not case.again]


@pytest.fixture(scope="module")
def found(pair_data):
    shared = [*SMALL, f"--train-iters={STEPS}", f"--data-path={pair_data.train}"]
    return compare(TESTED, shared, STEPS, lambda _: None)


def test_no_kind_of_layout_is_left_to_the_benchmark():
    assert {case.name for case in TESTED} >= {*EVERY_MODEL, *(f"TAPE: {name}" for name in EVERY_MODEL)}
    assert {case.name for case in CASES} >= {
        f"{model}: {name}" for model in ("TAPE", "AMPLIFY") for name in EVERY_MODEL
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ALONE)
def test_one_process_learned_so_that_equal_losses_say_something(found, model):
    losses = found[ALONE[model].name]["loss"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.name)
def test_a_layout_trains_as_one_process_does(found, case):
    differences = found[case.name]["differences"]
    assert len(found[case.name]["loss"]) == STEPS
    for name, bar in BARS.items():
        assert differences[name] <= bar, name
