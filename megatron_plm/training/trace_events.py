"""A Chrome trace as torch's profiler writes it: which event stands in which, and arithmetic with intervals.

Times are microseconds.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Interval = tuple[float, float]

_DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
_HOST_CATEGORIES = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}


@dataclass(eq=False)
class Event:
    """Something that took time, on a thread of the host or on a device, and what of the host it stands in.

    Attributes:
        track: thread of the host; device and stream.
        shapes: of the tensors that an op was given.
        parent: the innermost event of the same thread around this one; of a device's event, the host's that began it.
        inner: the intervals of those that stand directly in this one.
    """

    name: str
    category: str
    start: float
    end: float
    track: tuple[object, ...]
    shapes: str = ""
    correlation: int | None = None
    parent: "Event | None" = None
    inner: list[Interval] = field(default_factory=list)

    @property
    def duration(self) -> float:
        return self.end - self.start

    def chain(self) -> "Iterator[Event]":
        """This event, the one around it, and so on outwards."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.parent

    def own_intervals(self) -> list[Interval]:
        """When this event was the innermost of its thread."""
        return minus([(self.start, self.end)], union(self.inner))


@dataclass(frozen=True)
class Trace:
    """The events of one process, in the order of their starts, each with its parent."""

    host: list[Event]
    device: list[Event]


def read_trace(path: Path) -> Trace:
    """Read a trace, compressed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return parse_trace(json.load(file)["traceEvents"])


def parse_trace(entries: Sequence[dict[str, Any]]) -> Trace:
    """The events among the entries of a trace."""
    host: list[Event] = []
    device: list[Event] = []
    for entry in entries:
        category = entry.get("cat")
        if entry.get("ph") != "X" or category not in _HOST_CATEGORIES | _DEVICE_CATEGORIES:
            continue
        details = entry.get("args", {})
        of_device = category in _DEVICE_CATEGORIES
        track = (details.get("device"), details.get("stream")) if of_device else (entry.get("pid"), entry.get("tid"))
        start = float(entry["ts"])
        event = Event(
            name=entry["name"],
            category=category,
            start=start,
            end=start + float(entry["dur"]),
            track=track,
            shapes=" ".join(str(shape) for shape in details.get("Input Dims", ()) if shape),
            correlation=details.get("correlation"),
        )
        (device if of_device else host).append(event)
    host.sort(key=lambda event: (event.start, -event.end))
    device.sort(key=lambda event: event.start)
    _nest(host)
    beginnings = {event.correlation: event for event in host if event.correlation}
    for event in device:
        event.parent = beginnings.get(event.correlation) if event.correlation else None
    return Trace(host, device)


def _nest(events: Iterable[Event]) -> None:
    """Give each event, in the order of starts, its parent; one that outlasts its parent by rounding is cut."""
    stacks: dict[tuple[object, ...], list[Event]] = {}
    for event in events:
        stack = stacks.setdefault(event.track, [])
        while stack and stack[-1].end <= event.start:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            event.end = min(event.end, stack[-1].end)
            stack[-1].inner.append((event.start, event.end))
        stack.append(event)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, in order, without overlaps."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def minus(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What of `one` is not in `other`; both as `union` gives them."""
    left: list[Interval] = []
    index = 0
    for start, end in one:
        while index < len(other) and other[index][1] <= start:
            index += 1
        place = index
        while place < len(other) and other[place][0] < end:
            if other[place][0] > start:
                left.append((start, other[place][0]))
            start = max(start, other[place][1])
            place += 1
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    """The sum of the intervals' lengths."""
    return sum(end - start for start, end in intervals)
