"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and a progress line on the terminal."""

import json
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_plm.files import write_errors_told
from megatron_plm.training.device import DeviceValues
from megatron_plm.training.guard import check_finite
from megatron_plm.training.run_directory import METRICS_FILE, TENSORBOARD, run_directory
from megatron_plm.training.state import Progress, Run

if TYPE_CHECKING:
    from megatron_plm.training.loop import StepMetrics


@dataclass
class _Interval:
    """What has gathered since the last line."""

    started: float = field(default_factory=time.perf_counter)
    steps: "list[StepMetrics]" = field(default_factory=list)


@dataclass
class _Line:
    """A line of training metrics whose values are on their way to the host."""

    values: DeviceValues
    started: float
    num_steps: int
    num_labels: int
    record: dict[str, Any]


class RunLog:
    """Writes on the main process only; the others take part in the sums.

    A GPU's values are read a step late, so that it always has a step to go on with.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._start = time.perf_counter()
        self._interval = _Interval()
        self._late: _Line | None = None
        directory = run_directory(run.config)
        self._file = None
        self._tensorboard = None
        self._progress_bar = None
        if not run.world.is_main:
            return
        if directory:
            self._file = _open_to_append(directory / METRICS_FILE)
            self._tensorboard = _tensorboard_writer(directory / TENSORBOARD, run.progress.step)
        if sys.stdout.isatty() and sys.stderr.isatty() and find_spec("rich"):
            self._progress_bar = _ProgressBar(run.config.training.train_iters, run.progress.step)

    def start(self, description: dict[str, Any]) -> None:
        """Record what runs, before the first step."""
        self._write({"kind": "start", **description})

    def train(self, progress: Progress, metrics: "StepMetrics", *, due: bool, at_once: bool) -> None:
        """Take the metrics of one step; where a line is `due`, write one for the steps since the last.

        A GPU's is written with the next step, unless `at_once`: the GPU has that to do while this one's values come.
        Collective when writing. Raises UserError where the loss or the gradient is not finite.
        """
        self._interval.steps.append(metrics)
        self._write_late_line()
        if not due:
            return
        steps, options = self._interval.steps, self._run.config
        tokens = sum(step.num_tokens for step in steps)
        row_tokens = len(steps) * options.training.global_batch_size * options.data.seq_length
        self._late = _Line(
            values=DeviceValues([*(step.loss_sum for step in steps), metrics.grad_norm]),
            started=self._interval.started,
            num_steps=len(steps),
            num_labels=sum(step.num_labels for step in steps),
            record={
                "step": progress.step,
                "loss": None,  # not known yet; here for the order
                "lr": metrics.lr,
                "grad_norm": None,
                "tokens": tokens,
                "consumed_tokens": progress.consumed_tokens,
                "fill": tokens / row_tokens,
                "cropped": sum(step.num_cropped for step in steps),  # proteins
                "epochs": self._run.train_loader.epochs(progress.cursor),  # of each dataset
            },
        )
        self._interval = _Interval()
        if at_once or not _reads_late(self._run.world.device):
            self._write_late_line()

    def _write_late_line(self) -> None:
        if self._late is None:
            return
        line, self._late = self._late, None
        *loss_sums, grad_norm = line.values.read()
        if line.values.on_device:  # the host may have been ahead: the device's time counts
            self._interval.started = line.values.seconds
        record = line.record
        (loss_total,) = self._run.world.sum(sum(loss_sums))
        loss = loss_total / max(1, line.num_labels)
        check_finite(record["step"], loss, grad_norm)
        took = line.values.seconds - line.started
        record |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens_per_second": record["tokens"] / took,
            "elapsed_seconds": line.values.seconds - self._start,
        }
        seconds_left = took / line.num_steps * (self._run.config.training.train_iters - record["step"])
        self._write({"kind": "train", **record})
        self._scalars("train", record, ("loss", "lr", "grad_norm", "tokens_per_second", "fill"))
        self._show(
            record["step"],
            f"loss {loss:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"ETA {_duration(seconds_left)}",
        )

    def valid(self, step: int, record: dict[str, float]) -> None:
        """Write the result of one evaluation; the time it took counts in no throughput."""
        self._write({"kind": "valid", "step": step, **record})
        self._scalars("valid", {"step": step, **record}, ("loss", "perplexity", "accuracy"))
        self.say(
            f"step {step}  validation loss {record['loss']:.4f}  perplexity {record['perplexity']:.3f} "
            f"(unigram {record['unigram_perplexity']:.3f})  accuracy {record['accuracy']:.4f}"
        )
        self.went_on()

    def went_on(self) -> None:
        """Note that training goes on only now: the time since the last line counts in no throughput."""
        self._interval.started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Count so many seconds of the last ones in no throughput."""
        self._interval.started += seconds
        if self._late is not None and self._late.values.on_device:  # its time is still running
            self._late.started += seconds

    def end(self, step: int, status: str) -> None:
        """Write the last line and close."""
        self._write(
            {
                "kind": "end",
                "step": step,
                "status": status,
                "elapsed_seconds": time.perf_counter() - self._start,
            }
        )
        if self._progress_bar:
            self._progress_bar.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._file:
            self._file.close()

    def say(self, line: str) -> None:
        """Print a line on the main process, above the progress bar if there is one."""
        if not self._run.world.is_main:
            return
        if self._progress_bar:
            self._progress_bar.print(line)
        else:
            print(line, flush=True)

    def _show(self, step: int, text: str) -> None:
        if self._progress_bar:
            self._progress_bar.update(step, text)
        else:
            self.say(f"step {step}/{self._run.config.training.train_iters}  {text}")

    def _write(self, record: dict[str, Any]) -> None:
        if self._file:
            with write_errors_told(Path(self._file.name)):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()

    def _scalars(self, group: str, record: dict[str, Any], names: tuple[str, ...]) -> None:
        if self._tensorboard:
            for name in names:
                self._tensorboard.add_scalar(f"{group}/{name}", record[name], record["step"])


class _ProgressBar:
    """A bar on the terminal with the latest metrics behind it."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, text="")
        self._bar.start()

    def update(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, text=text)

    def print(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def _open_to_append(path: Path) -> Any:
    """Open metrics.jsonl to append; half a last line, left by a kill, is cut off first."""
    with write_errors_told(path):
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
        return open(path, "a", encoding="utf-8")


def _tensorboard_writer(directory: Path, step: int) -> Any:
    """Open TensorBoard's files from `step` on: what an earlier start wrote beyond it is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard files are not written: pip install tensorboard to have them", file=sys.stderr)
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)


def _reads_late(device: torch.device) -> bool:
    return device.type == "cuda"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
