"""Where the time of the traced steps went: sums over a trace, and a page about them.

Of a GPU's trace the time is the GPU's: that of its kernels, by what of the host began them. Elsewhere it is the main
thread's, each moment counted for the innermost op. Communication is exposed where no compute runs beside it.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_plm.training.trace_events import Event, Interval, Trace, length, minus, union

# Names of the ranges that the training loop marks.
DATA, PASSES, OPTIMIZER = "megatron_plm: data", "megatron_plm: passes", "megatron_plm: optimizer"
_STEP = "ProfilerStep#"  # torch's own, around each traced step
_BACKWARD = re.compile("autograd::engine::evaluate_function|FSDP::.*backward")

PHASES = ("waiting for data", "forward", "backward", "optimizer", "the rest")
OUTSIDE = "outside of ops"
COMMUNICATION = "communication"
_MATRIX, _ATTENTION = "matrix products", "attention"
_ELEMENTWISE, _OTHERS = "norms and elementwise", "copies and others"
CLASSES = (_MATRIX, _ATTENTION, _ELEMENTWISE, "optimizer", COMMUNICATION, _OTHERS)

# What stands in one of these belongs to it; the first that fits decides.
_OUTER_CLASSES = (
    (COMMUNICATION, re.compile("nccl|^gloo:|c10d", re.IGNORECASE)),
    (_ATTENTION, re.compile("scaled_dot_product|flash|fmha|varlen_attn|attention", re.IGNORECASE)),
    ("optimizer", re.compile("adam|multi_tensor", re.IGNORECASE)),
    (
        _MATRIX,
        re.compile(
            r"::(mm|addmm|bmm|addbmm|baddbmm|linear|matmul|_linear_pointwise)(_|$)"
            "|gemm|nvjet|cublas|cutlass|triton_tem",
            re.IGNORECASE,
        ),
    ),
)
_ELEMENTWISE_OPS = re.compile(
    r"norm|gelu|silu|swiglu|softmax|dropout|rotary|rotate|cross_entropy|nll_loss|masked_fill|elementwise|reduce|triton_"
    r"|::_?(add|sub|rsub|mul|div|neg|abs|sum|mean|amax|cos|sin|exp|log|sqrt|rsqrt|pow|square|reciprocal|clamp|clamp_min"
    r"|where|eq|ne|lt|le|gt|ge|bitwise_\w+|__\w+__|scatter_add|foreach_\w+)_?$",
    re.IGNORECASE,
)
_COPIES = re.compile(
    "copy|memcpy|memset|::(cat|stack|clone|contiguous|to|zero_|fill_|index|gather|embedding)", re.IGNORECASE
)
_WRAPPERS = re.compile("autograd::|GeneratedBackwardFor_")  # the latter stands around an op of our own, forward too
_NUM_TOP = 15
_NUM_GAPS = 5


@dataclass(frozen=True)
class Op:
    """Calls of one op, and the shapes of those tensors that it took the most time for."""

    name: str
    shapes: str
    calls: int
    microseconds: float


@dataclass(frozen=True)
class Summary:
    """Microseconds over all traced steps.

    Attributes:
        on_gpu: whether the time is the GPU's, else the main thread's.
        window: from the first traced step's start to the last one's end; on a GPU, from the first kernel to the last.
        steps: of each step, on the host.
        phases, classes: by `PHASES` and `CLASSES`; sums, so that what runs at once on a GPU counts twice.
        communication, exposed: time with communication, and of it without compute.
        gaps: when the GPU was idle, or the main thread in no op; each with what came next, longest first.
        waiting: the host's time of waiting for data.
    """

    on_gpu: bool
    window: float
    steps: list[float]
    phases: dict[str, float]
    classes: dict[str, float]
    communication: float
    exposed: float
    idle: float
    gaps: list[tuple[float, str]]
    waiting: float
    top: list[Op]


def summarize(trace: Trace) -> Summary:
    """Sum up a trace. Raises ValueError where it holds no traced step."""
    steps = [event for event in trace.host if event.name.startswith(_STEP)]
    if not steps:
        raise ValueError("the trace holds no step")
    main, (first, last) = steps[0].track, (steps[0].start, steps[-1].end)
    on_host = [event for event in trace.host if event.start >= first and event.end <= last]
    on_main = [event for event in on_host if event.track == main]
    begun = [event for event in trace.device if event.parent and first <= event.parent.start <= last]
    pieces = _of_device(begun) if begun else _of_host(on_main)
    busy = [interval for event, own in pieces if _is_op(event) for interval in own]
    if begun:
        first, last = min(event.start for event in begun), max(event.end for event in begun)
        communication = _intervals(begun, of_communication=True)
    else:
        # Messages go in threads of their own, and the main one waits in its op or beside it.
        communication = _intervals([event for event in on_host if _is_op(event)], of_communication=True)
    compute = union(
        interval for event, own in pieces if _is_op(event) and op_class(event) != COMMUNICATION for interval in own
    )
    gaps = minus([(first, last)], union(busy))
    starts = sorted(((own[0][0], event) for event, own in pieces if own and _is_op(event)), key=lambda pair: pair[0])
    return Summary(
        on_gpu=bool(begun),
        window=last - first,
        steps=[event.duration for event in steps],
        phases=_sums(pieces, phase, PHASES),
        classes=_sums([(e, own) for e, own in pieces if _is_op(e)], op_class, CLASSES),
        communication=length(communication),
        exposed=length(minus(communication, compute)),
        idle=length(gaps),
        gaps=_named_gaps(gaps, starts),
        waiting=sum(event.duration for event in on_main if event.name == DATA),
        top=_top(pieces),
    )


Pieces = list[tuple[Event, list[Interval]]]


def _of_device(events: Iterable[Event]) -> Pieces:
    return [(event, [(event.start, event.end)]) for event in events]


def _of_host(events: Iterable[Event]) -> Pieces:
    return [(event, event.own_intervals()) for event in events]


def _is_op(event: Event) -> bool:
    """Whether an event is work: no range that someone marked, but for a message of gloo, which is one."""
    return event.category != "user_annotation" or event.name.startswith("gloo:")


def _intervals(events: Iterable[Event], *, of_communication: bool) -> list[Interval]:
    return union((event.start, event.end) for event in events if (op_class(event) == COMMUNICATION) == of_communication)


def phase(event: Event) -> str:
    """The part of a step that an event belongs to, by what it stands in."""
    for around in event.chain():
        if around.name == DATA:
            return "waiting for data"
        if around.name == OPTIMIZER:
            return "optimizer"
        if _BACKWARD.match(around.name):
            return "backward"
        if around.name == PASSES:
            return "forward"
    return "the rest"


def op_class(event: Event) -> str:
    """The class of an op or a kernel: by itself or by the nearest op around it that says."""
    if event.category in ("gpu_memcpy", "gpu_memset"):
        return _OTHERS
    fallback = None
    for around in event.chain():
        if around.category == "user_annotation" and not around.name.startswith("gloo:"):
            continue
        if around.name.startswith("autograd::") or "Backward" in around.name:
            continue  # an op's name in that of its gradient, in which other ops stand too
        for name, pattern in _OUTER_CLASSES:
            if pattern.search(around.name):
                return name
        if fallback is None and _ELEMENTWISE_OPS.search(around.name):
            fallback = _ELEMENTWISE
        elif fallback is None and _COPIES.search(around.name):
            fallback = _OTHERS
    return fallback or _OTHERS


def _sums(pieces: Pieces, key: Callable[[Event], str], names: tuple[str, ...]) -> dict[str, float]:
    sums = dict.fromkeys(names, 0.0)
    for event, own in pieces:
        sums[key(event)] += length(own)
    return sums


def _named_gaps(gaps: list[Interval], starts: list[tuple[float, Event]]) -> list[tuple[float, str]]:
    """The longest gaps, each with the op that ended it."""
    longest = sorted(gaps, key=lambda gap: gap[0] - gap[1])[:_NUM_GAPS]
    following = {gap: next((_op(e).name for start, e in starts if start >= gap[1]), "the end") for gap in longest}
    return [(end - start, following[start, end]) for start, end in longest]


def _op(event: Event) -> Event:
    """The op of the host that an event is, or is a kernel of; where there is none, the event."""
    ops = (around for around in event.chain() if around.category == "cpu_op" and not _WRAPPERS.match(around.name))
    return next(ops, event)


def _top(pieces: Pieces) -> list[Op]:
    """The ops that took the most time, a call being an op of the host, however many kernels it has."""
    calls: dict[str, set[int]] = defaultdict(set)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event, own in pieces:
        if _is_op(event):
            op = _op(event)
            calls[op.name].add(id(op))
            sums[op.name][op.shapes] += length(own)
    totals = {name: sum(by_shapes.values()) for name, by_shapes in sums.items()}
    largest = sorted(totals, key=lambda name: -totals[name])[:_NUM_TOP]
    return [Op(name, max(sums[name], key=sums[name].__getitem__), len(calls[name]), totals[name]) for name in largest]
