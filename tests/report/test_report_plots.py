"""The loss axis: made for the later steps, and said so, where the first ones would flatten the rest."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import report_sample as sample

from megatron_plm.report.plots import readable_range
from megatron_plm.report.records import Run, read_run

CUT = "The axis is made for the later steps"


def _run(path: Path, losses: Sequence[float], *more: dict) -> Run:
    """A run of these training losses, one every ten steps."""
    records = [sample.train(10 * index, loss) for index, loss in enumerate(losses, start=1)]
    return read_run(sample.write_run(path / "run", [sample.start(), *records, *more]))


def test_the_axis_holds_every_loss_after_the_first_tenth_of_the_steps(tmp_path: Path) -> None:
    losses = [3.3, 2.9, 2.75, 2.7, 2.78, 2.71, 2.69, 2.7, 2.68, 2.67] + [2.66] * 10
    run = _run(tmp_path, losses, sample.valid(200, loss=2.65))
    limits = readable_range(run)
    assert limits is not None
    low, high = limits
    # 200 steps: the first two records are of the first tenth
    assert low < 2.65
    assert 2.78 < high < 2.9
    # the later losses take most of the axis
    assert (2.78 - 2.65) / (high - low) > 0.8


@pytest.mark.parametrize(
    "losses",
    [
        [2.9] * 20,
        [2.9],
        [3.0, 2.9, *[2.8 - 0.05 * step for step in range(18)]],
        [2.0, *[2.0 + 0.1 * step for step in range(19)]],
        [math.nan] * 20,
        [3.3, *[math.nan] * 19],
    ],
    ids=["flat", "one", "steady", "rising", "nothing", "diverged"],
)
def test_the_axis_is_left_alone_where_the_first_steps_take_no_more_than_half(
    losses: list[float], tmp_path: Path
) -> None:
    assert readable_range(_run(tmp_path, losses)) is None


def test_a_jump_in_later_steps_is_never_cut(tmp_path: Path) -> None:
    limits = readable_range(_run(tmp_path, [9.0, *[2.7] * 10, 5.0, *[2.7] * 8]))
    assert limits is not None
    assert limits[1] > 5.0


def test_the_caption_says_where_the_axis_is_cut_and_only_there(report: Callable[..., str]) -> None:
    records = sample.realistic_records()
    highest = max(record["loss"] for record in records if record["kind"] == "train")
    assert f"{CUT}; the losses of the first ones, up to {highest:.2f}, lie above it." in report(records)
    assert CUT not in report([sample.start(), *[sample.train(step) for step in range(1, 20)]])
