"""What the downstream scores say, and what they cannot: sentences on who is ahead, remarks and footnotes."""

import math
from collections.abc import Iterable

from megatron_plm.report.results import ENOUGH_TO_RANK, Result, Score, Task
from megatron_plm.report.wording import scored

RANKS_NOTHING = "ranks nothing"
# the longest note that is shown whole beside a model's name
_BADGE_LENGTH = 20
# for every other metric a larger value is better
_LOWER_IS_BETTER = ("mse",)


def badge(note: str) -> str:
    """Return a note in a word or two, for beside a name: whole if it is short."""
    return note if len(note) <= _BADGE_LENGTH else "see note"


def footnotes(task: Task) -> list[str]:
    """Return what must be known of a task's scores: splits that rank nothing, what the validation split was used
    for, and the notes that a badge shortens, each once, with the models that it holds for."""
    small = [f"{split} ({_examples(task.num_examples(split))})" for split in task.splits() if not task.ranks(split)]
    lines = []
    if small:
        lines.append(
            f"{', '.join(small)}: with fewer than {ENOUGH_TO_RANK} examples, scores show that the path works and "
            "rank nothing."
        )
    if "valid" in task.splits():
        lines.append("valid: the best epoch was chosen on this split, so its scores tend to be too good.")
    labels: dict[str, list[str]] = {}
    for result in task.results:
        if result.note and badge(result.note) != result.note:
            labels.setdefault(result.note, []).append(result.label)
    return lines + [
        f"{'All models' if note == task.shared_note else ', '.join(named)}: {note}." for note, named in labels.items()
    ]


def _examples(count: int) -> str:
    return f"{count:,} example{'s' if count != 1 else ''}"


def verdicts(task: Task) -> list[str]:
    """Return one sentence or more a pretrained model and headline split with enough examples to rank: its primary
    score and its baselines', and who is ahead where the intervals tell."""
    tested = [result for result in task.results if result.from_pretrained is not None]
    splits = [split for split in task.headline_splits() if task.ranks(split)]
    return [_verdict(task, result, split) for result in tested for split in splits if split in result.splits]


def _verdict(task: Task, tested: Result, split: str) -> str:
    """Return the sentences for one pretrained model on one split."""
    metric = tested.primary_metric
    mine = tested.splits[split].metrics[metric]
    name = f"{tested.label} ({badge(tested.note)})" if tested.note else tested.label
    if not math.isfinite(mine.value):
        return f"On {split}, the {metric} of {name} is undefined."
    sentence = f"On {split}, {name} reaches {metric} {scored(mine)}"
    baselines = {
        result.label: result.splits[split].metrics[metric]
        for result in task.results
        if result.from_pretrained is None and split in result.splits and metric in result.splits[split].metrics
    }
    if not baselines:
        return f"{sentence}; no baseline was given."
    listed = ", ".join(f"{label} {scored(score)}" for label, score in baselines.items())
    by_outcome: dict[str, list[str]] = {}
    for label, score in baselines.items():
        by_outcome.setdefault(compare(mine, score, metric), []).append(label)
    outcomes = [text.format(_listed(by_outcome[key])) for key, text in _OUTCOMES.items() if key in by_outcome]
    return f"{sentence}, against {listed}. {' '.join(outcomes)}"


_OUTCOMES = {
    "ahead": "It is ahead of {}: the intervals don't overlap.",
    "behind": "It is behind {}: the intervals don't overlap.",
    "overlap": "Its interval overlaps that of {}: the intervals alone do not settle which is better.",
    "undefined": "With {} there is no comparison: an interval is undefined.",
}


def compare(mine: Score, other: Score, metric: str) -> str:
    """Return where `mine` stands to `other` by their intervals: ahead, behind, overlap or undefined."""
    if not all(math.isfinite(end) for end in (mine.low, mine.high, other.low, other.high)):
        return "undefined"
    if mine.low <= other.high and other.low <= mine.high:
        return "overlap"
    return "ahead" if (mine.low > other.high) != (metric in _LOWER_IS_BETTER) else "behind"


def _listed(labels: Iterable[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    *first, last = labels
    return f"{', '.join(first)} and {last}" if first else last
