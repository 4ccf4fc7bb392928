"""The sums over a trace for people: a page in Markdown, and a few words for the terminal."""

from collections.abc import Sequence

from megatron_plm.training.trace_summary import OUTSIDE, Summary

_LONGEST_SHAPES = 60  # characters


def summary_words(summary: Summary) -> str:
    """The largest parts in one line."""
    classes = sorted(summary.classes.items(), key=lambda pair: -pair[1])
    parts = [f"{name} {_share(value, summary)}" for name, value in classes if value > 0.005 * summary.window]
    parts.append(f"{'GPU idle' if summary.on_gpu else OUTSIDE} {_share(summary.idle, summary)}")
    return f"{_milliseconds(summary.window / len(summary.steps))} a step: " + ", ".join(parts)


def summary_page(summary: Summary, title: str, facts: list[str]) -> str:
    """One page: where the time went, by phase, by class of op, by op; communication; gaps."""
    whose = "the GPU's" if summary.on_gpu else "the main thread's"
    each = ", ".join(_milliseconds(step) for step in summary.steps)
    lines = [f"# {title}", "", *facts, f"Steps, on the host: {each}. Shares are of {whose} time of all of them."]
    lines += ["", f"Waiting for the loader: {_milliseconds(summary.waiting)} of the host's time.", ""]
    lines += _table(("class of op", "ms a step", "share"), _rows(summary.classes, summary))
    idle = "GPU idle" if summary.on_gpu else OUTSIDE
    lines += [f"| {idle} | {_per_step(summary.idle, summary)} | {_share(summary.idle, summary)} |", ""]
    lines += _table(("phase", "ms a step", "share"), _rows(summary.phases, summary))
    if summary.on_gpu:
        lines += ["", "Kernels that run at once count twice in both tables."]
    else:
        lines += ["", "The phases hold the time outside of ops too."]
    lines += ["", _communication(summary), "", _gaps(summary), ""]
    rows = [
        (f"`{op.name}`", _cut(op.shapes), f"{op.calls / len(summary.steps):,.0f}", *_amounts(op.microseconds, summary))
        for op in summary.top
    ]
    lines += _table(("op", "shapes that took most of it", "calls a step", "ms a step", "share"), rows)
    return "\n".join(lines) + "\n"


def _communication(summary: Summary) -> str:
    if not summary.communication:
        return "No communication."
    return (
        f"Communication: {_per_step(summary.communication, summary)} ms a step, of which "
        f"{_per_step(summary.exposed, summary)} ms ({_share(summary.exposed, summary)} of the step) exposed: no "
        "compute ran beside it."
    )


def _gaps(summary: Summary) -> str:
    what = "The GPU was idle" if summary.on_gpu else "The main thread was in no op"
    longest = "; ".join(f"{_milliseconds(gap)} before `{name}`" for gap, name in summary.gaps)
    return f"{what} for {_share(summary.idle, summary)} of the time" + (f". Longest: {longest}." if longest else ".")


def _rows(sums: dict[str, float], summary: Summary) -> list[tuple[str, ...]]:
    return [(name, *_amounts(value, summary)) for name, value in sums.items()]


def _amounts(microseconds: float, summary: Summary) -> tuple[str, str]:
    return _per_step(microseconds, summary), _share(microseconds, summary)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [_line(head), _line(("---",) * len(head)), *map(_line, rows)]


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHAPES else text[: _LONGEST_SHAPES - 2] + " …"


def _per_step(microseconds: float, summary: Summary) -> str:
    return f"{microseconds / 1e3 / len(summary.steps):,.2f}"


def _share(microseconds: float, summary: Summary) -> str:
    return f"{microseconds / summary.window:.1%}".replace("%", " %")


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:,.2f} ms"
