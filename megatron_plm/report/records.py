"""Reading a pretraining run directory: config.toml and metrics.jsonl, every record checked.

metrics.jsonl holds one JSON object a line, its "kind" being `start`, `train`, `valid` or `end`; the
dataclasses here name the other keys. A resumed run appends another `start` and may repeat steps.
"""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from megatron_plm.errors import JSON_ERRORS, UserError, json_fault, suggestion
from megatron_plm.report.schema import parse_object, read_bytes, read_text

_RUN_WAY_OUT = "give --pretraining the directory that launch/pretrain.sh wrote"


@dataclass(frozen=True)
class Start:
    """One start or resume of the run. `time` is ISO 8601; `train_residues` excludes special tokens.

    `step` is the step it begins at, 0 for a new run; logs of earlier versions lack it.
    """

    command: str
    time: str
    versions: dict[str, str]
    machine: str
    world_size: int
    num_parameters: int
    seed: int
    train_sequences: int
    train_residues: int
    step: int | None = None


@dataclass(frozen=True)
class Train:
    """Training progress up to `step`: `loss` in nats per labelled token, `fill` from 0 to 1.

    `elapsed_seconds` counts from the `start` record above it.
    """

    step: int
    loss: float
    lr: float
    tokens: int
    consumed_tokens: int
    fill: float
    tokens_per_second: float
    elapsed_seconds: float


@dataclass(frozen=True)
class Valid:
    """One pass over the validation split: `loss` in nats per label, `accuracy` from 0 to 1 (top-1).

    `loss` is the mean over all labels. All else counts only those hidden behind <mask>, `num_labels` of them, and
    not the labels left in place or replaced by another letter; so `perplexity` is not exp(`loss`).
    """

    step: int
    loss: float
    perplexity: float
    accuracy: float
    unigram_perplexity: float
    num_labels: int


@dataclass(frozen=True)
class End:
    """How a start ended: `status` is finished, interrupted or failed."""

    step: int
    status: str
    elapsed_seconds: float


_KINDS = {"start": Start, "train": Train, "valid": Valid, "end": End}


@dataclass(frozen=True)
class Run:
    """A pretraining run as its directory tells it.

    `train` and `valid` are ordered by step, one record a step (the last written); `end` is the last start's,
    None where the run still goes on or was killed. `seconds` adds up all starts; `num_repeated_steps` counts
    the training records that a later start made out of date; `truncated` says that the last line was cut off.
    """

    path: Path
    config: str
    starts: tuple[Start, ...]
    train: tuple[Train, ...]
    valid: tuple[Valid, ...]
    end: End | None
    seconds: float
    num_repeated_steps: int
    truncated: bool

    @property
    def consumed_tokens(self) -> int:
        """Tokens that the optimizer has seen, 0 before the first step."""
        return self.train[-1].consumed_tokens if self.train else 0


def read_run(path: Path) -> Run:
    """Read a run directory; raise UserError naming file, line and key of the first thing missing or wrong."""
    if not path.is_dir():
        raise UserError(f"--pretraining {path} is not a directory; {_RUN_WAY_OUT}")
    config = read_text(path / "config.toml", _RUN_WAY_OUT)
    try:
        tomllib.loads(config)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path / 'config.toml'}: not valid TOML ({error}); {_RUN_WAY_OUT}") from None
    metrics_path = path / "metrics.jsonl"
    history = _History()
    truncated = False
    # only \n ends a record: splitlines() would also cut at separators that a JSON string may hold
    lines = read_bytes(metrics_path, _RUN_WAY_OUT).split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{metrics_path}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except JSON_ERRORS as error:
            if number == len(lines):  # no newline follows: the process was killed while it wrote this line
                truncated = True
                break
            raise UserError(f"{where}: not valid JSON ({json_fault(error)}); repair or remove the line") from None
        history.add(_parse_record(value, where), where)
    if not history.starts:
        raise UserError(f"{metrics_path}: holds no start record; wait until the run has started, then try again")
    return Run(
        path=path,
        config=config,
        starts=tuple(history.starts),
        train=history.train.ordered(),
        valid=history.valid.ordered(),
        end=history.end,
        seconds=sum(history.seconds),
        num_repeated_steps=history.train.num_replaced,
        truncated=truncated,
    )


def _parse_record(value: object, where: str) -> object:
    """Return the typed record of one parsed line."""
    if not isinstance(value, dict) or "kind" not in value:
        raise UserError(f'{where}: expected a JSON object with the key "kind"; repair or remove the line')
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise UserError(f"{where}: unknown kind {kind!r}, known are {known}{suggestion(str(kind), _KINDS)}")
    record: object = parse_object(_KINDS[kind], value, where)
    # a comparison that not-a-number fails too
    if isinstance(record, Valid) and not record.unigram_perplexity >= 1:
        raise UserError(f"{where}: unigram_perplexity is {record.unigram_perplexity}, not 1 or more")
    return record


class _Stepped(Protocol):
    @property
    def step(self) -> int: ...


Step = TypeVar("Step", bound=_Stepped)


@dataclass
class _Curve(Generic[Step]):
    """Records by step, of which a later one replaces an earlier one."""

    by_step: dict[int, Step] = field(default_factory=dict)
    num_replaced: int = 0

    def add(self, record: Step) -> None:
        self.num_replaced += record.step in self.by_step
        self.by_step[record.step] = record

    def drop_after(self, step: int) -> None:
        stale = [known for known in self.by_step if known > step]
        for known in stale:
            del self.by_step[known]
        self.num_replaced += len(stale)

    def ordered(self) -> tuple[Step, ...]:
        return tuple(self.by_step[step] for step in sorted(self.by_step))


@dataclass
class _History:
    """What the lines read so far add up to."""

    starts: list[Start] = field(default_factory=list)
    train: _Curve[Train] = field(default_factory=_Curve)
    valid: _Curve[Valid] = field(default_factory=_Curve)
    end: End | None = None
    seconds: list[float] = field(default_factory=list)
    begins_at_next: bool = False  # the last start doesn't say its step: the next record must tell

    def add(self, record: object, where: str) -> None:
        """Take in the next record; raise UserError where one comes before any start."""
        if isinstance(record, Start):
            self.starts.append(record)
            self.seconds.append(0.0)
            self.end, self.begins_at_next = None, record.step is None
            if record.step is not None:
                self._drop_after(record.step)
            return
        if not self.starts:
            raise UserError(f"{where}: a record stands before the first start record; the file's head is missing")
        if isinstance(record, Train | Valid) and self.begins_at_next:
            self._drop_after(record.step)
            self.begins_at_next = False
        if isinstance(record, Train):
            self.train.add(record)
            self.seconds[-1] = record.elapsed_seconds
        elif isinstance(record, Valid):
            self.valid.add(record)
        elif isinstance(record, End):
            self.end = record
            self.seconds[-1] = record.elapsed_seconds

    def _drop_after(self, step: int) -> None:
        """Drop what earlier starts wrote beyond the step: it belongs to a continuation that was given up."""
        self.train.drop_after(step)
        self.valid.drop_after(step)
