"""The report's numbers, and its sentences on the pretraining: what was trained, what came out, how far that goes."""

import math
from collections.abc import Sequence

from megatron_plm.report.records import Run
from megatron_plm.report.results import Score, Task

# 500,000 updates of 2 million tokens, the budget of ESM-2's published models (Lin et al. 2023,
# doi:10.1126/science.ade2574, supplement)
ESM2_TOKENS = 500_000 * 2_000_000
# below this part of ESM-2's budget no score says anything about the method
_TOO_SMALL = 0.01


def number(value: float, digits: int = 3) -> str:
    """Return a value with `digits` decimals, `undefined` for not-a-number."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "undefined"


def short_number(value: float) -> str:
    """Return a value to four significant digits, so that 17.93 and 0.0004 are both readable."""
    if not math.isfinite(value):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def large_count(count: int) -> str:
    """Return a count in words to three significant digits: 912, 45,300, 7.51 million, 2.1 billion."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def duration(seconds: float) -> str:
    """Return a time in the two largest units that it fills: 42 s, 3 min 20 s, 5 h 2 min, 2 d 3 h."""
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"


def scored(score: Score) -> str:
    """Return `value [low, high]` with three decimals."""
    return f"{number(score.value)} [{number(score.low)}, {number(score.high)}]"


def what_was_trained(run: Run) -> str:
    """Return one or two sentences: the model, the proteins it read, for how long, and how the run ended."""
    start = run.starts[-1]
    model = (
        f"A protein language model with {large_count(start.num_parameters)} parameters was trained to fill "
        f"in hidden amino acids of {start.train_sequences:,} proteins "
        f"({large_count(start.train_residues)} residues)."
    )
    if not run.train:
        return f"{model} No training step has been recorded yet, so there is nothing to judge."
    # every protein is read with one token before and one behind it
    passes = run.consumed_tokens / max(1, start.train_residues + 2 * start.train_sequences)
    seen = f"{passes:.1f}" if passes >= 1 else f"{passes:.2g}"
    machine = "1 process" if start.world_size == 1 else f"{start.world_size} processes"
    return (
        f"{model} It took {run.train[-1].step:,} steps in {duration(run.seconds)} on {machine} and read "
        f"{large_count(run.consumed_tokens)} tokens, each protein about {seen} times. {how_it_ended(run)}"
    )


def how_it_ended(run: Run) -> str:
    """Return one sentence on the end of the last start."""
    if run.end is None:
        return "No end was recorded: the run is still going on or was killed."
    if run.end.status == "finished":
        return "The run finished as planned."
    return f"The run did not finish: it {_ENDINGS.get(run.end.status, run.end.status)} at step {run.end.step:,}."


_ENDINGS = {"interrupted": "was interrupted", "failed": "failed"}


def reduction(run: Run) -> float | None:
    """Return by which part (0.02 is 2 %) the last validation perplexity lies below the unigram baseline's."""
    if not run.valid or not math.isfinite(run.valid[-1].perplexity):
        return None
    return 1 - run.valid[-1].perplexity / run.valid[-1].unigram_perplexity


def against_baseline(run: Run) -> str:
    """Return `5.6 % below`, `0.3 % above` or `equal to`, to be followed by `the unigram baseline`."""
    part = reduction(run)
    if part is None:
        return "not comparable with"
    percent = f"{abs(part) * 100:.1f}"
    if percent == "0.0":
        return "equal to"
    return f"{percent} % {'below' if part > 0 else 'above'}"


def what_came_out(run: Run) -> str:
    """Return the validation perplexity against the unigram baseline in words."""
    if not run.valid:
        return "No validation was recorded, so nothing can be said of proteins outside the training set."
    last = run.valid[-1]
    part = reduction(run)
    if part is None:
        return f"At step {last.step:,} the validation perplexity was not a number: the training diverged."
    compared = (
        f"On held-out proteins the model hesitates, at each hidden position, as if between "
        f"{number(last.perplexity, 2)} equally likely amino acids (its perplexity). Guessing from how common "
        f"each amino acid is gives {number(last.unigram_perplexity, 2)} (the unigram baseline), so the model "
        f"lies {against_baseline(run)} the baseline"
    )
    if part <= 0:
        return f"{compared}: it has not learned more than the amino acids' frequencies."
    return (
        f"{compared}. It names the hidden amino acid correctly in {last.accuracy * 100:.1f} % of "
        f"{last.num_labels:,} cases."
    )


def diverged(run: Run) -> str | None:
    """Return one sentence where training losses are not numbers, else None."""
    bad = [record.step for record in run.train if not math.isfinite(record.loss)]
    if not bad:
        return None
    return (
        f"The training loss is not a number in {len(bad):,} of {len(run.train):,} records, first at step "
        f"{bad[0]:,}: the training diverged. Try a smaller learning rate or a longer warm-up."
    )


def caveat(run: Run, tasks: Sequence[Task]) -> str:
    """Return what the size and time of the run allow to conclude."""
    share = run.consumed_tokens / ESM2_TOKENS
    sentences = []
    if share < _TOO_SMALL:
        read = "has read none yet"
        if share > 0:
            part = large_count(int(float(f"{1 / share:.2g}")))
            read = f"read {large_count(run.consumed_tokens)}, about one part in {part}"
        sentences = [
            "A model of this size and training time proves the path, not the science: the page shows that the "
            "steps from raw sequences to this report work, and its numbers say nothing about what protein "
            f"language models can do. ESM-2's published models read {large_count(ESM2_TOKENS)} tokens; "
            f"this run {read}."
        ]
    if tasks:
        sentences.append(
            "The intervals of the scores cover the choice of examples, not the luck of one training seed; a "
            "claim needs several seeds."
        )
    return " ".join(sentences)
