"""`--profile`: a trace of a few steps, and a page that sums it up, in the run directory.

    profile/step_00000011/          the first traced step
      rank_0.trace.json.gz          Chrome's format: ui.perfetto.dev opens it
      rank_0.md                     the page
      rank_0.memory.pickle          with --record-memory-history: pytorch.org/memory_viz opens it

Tracing changes no value of the run. Outside of the traced steps, and of the one before them, which warms the tracer up,
it costs nothing.
"""

import gzip
import shutil
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, record_function

from megatron_plm.config.options import Config
from megatron_plm.config.problems import ALL_RANKS
from megatron_plm.data.loader import Step
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file, write_errors_told
from megatron_plm.training.metrics import RunLog
from megatron_plm.training.run_directory import run_directory
from megatron_plm.training.state import Run
from megatron_plm.training.trace_events import read_trace
from megatron_plm.training.trace_page import summary_page, summary_words
from megatron_plm.training.trace_summary import DATA, summarize

PROFILES = "profile"
_STEPS_BEFORE, _STEPS_TRACED = 10, 2  # Megatron's defaults
_MEMORY_EVENTS = 1_000_000


def traced_steps(config: Config, done: int) -> range:
    """The steps to trace, counted from 0, of a run that has `done` steps behind it; none without --profile.

    Raises UserError where the run has no such steps to come, or not one before them.
    """
    options = config.training
    if not options.profile:
        return range(0)
    start, end = options.profile_step_start, options.profile_step_end
    if start is None:
        start = done + min(_STEPS_BEFORE, max(1, options.train_iters - done - _STEPS_TRACED))
        start = start if end is None else max(done + 1, min(start, end - 1))
    if end is None:
        end = min(start + _STEPS_TRACED, options.train_iters)
    if not done < start < end <= options.train_iters:
        raise UserError(
            f"--profile: steps {start} to {end} are to be traced, of a run that makes steps {done} to "
            f"{options.train_iters}; --profile-step-start must be above {done}, as a step before warms the tracer up, "
            f"and --profile-step-end above that and at most {options.train_iters}"
        )
    return range(start, end)


def check_memory_history(config: Config, device: torch.device) -> None:
    """Raise UserError where a snapshot of memory is asked for and there is no GPU."""
    if config.training.record_memory_history and device.type != "cuda":
        raise UserError("--record-memory-history records the memory of a GPU, and this run is on the CPU; leave it out")


class Tracer:
    """Traces this process's share of the steps that --profile names."""

    def __init__(self, run: Run, log: RunLog) -> None:
        options, rank = run.config.training, run.world.rank
        ranks = (options.profile_ranks or "0").split(",")
        chosen = ranks == [ALL_RANKS] or str(rank) in ranks
        self._run, self._log = run, log
        self._steps = traced_steps(run.config, run.progress.step) if chosen else range(0)
        self._done = run.progress.step
        self._profiler: Any = None

    def __enter__(self) -> Self:
        return self

    def waited_for(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps; the waiting for each is marked in the trace."""
        while True:
            if self._steps and self._done == self._steps.start - 1:
                self._begin()
            with record_function(DATA):
                step = next(steps)
            yield step

    def after_step(self) -> None:
        """Note that a step is done; writes everything behind the last that is traced."""
        self._done += 1
        if self._profiler is None:
            return
        self._profiler.step()
        if self._done == self._steps.start and self._run.config.training.record_memory_history:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        if self._done == self._steps.stop:
            self._write()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._profiler is not None:
            self._stop()
        if error is None and self._steps and self._done < self._steps.stop:
            self._log.say("no trace was written: the run ended before the steps that --profile names")

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._run.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=len(self._steps), repeat=1),
            record_shapes=True,
        )
        self._profiler.start()

    def _write(self) -> None:
        started = time.perf_counter()
        directory = run_directory(self._run.config)
        assert directory is not None, "--profile without --save is refused"
        folder = directory / PROFILES / f"step_{self._steps.start + 1:08d}"
        name = f"rank_{self._run.world.rank}"
        with write_errors_told(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if self._run.config.training.record_memory_history:
            with atomic_file(folder / f"{name}.memory.pickle") as aside:
                torch.cuda.memory._dump_snapshot(str(aside))
        profiler = self._profiler
        self._stop()
        trace = folder / f"{name}.trace.json.gz"
        with atomic_file(trace) as aside:
            plain = aside.with_suffix(".json")
            try:
                profiler.export_chrome_trace(str(plain))
                summary = summarize(read_trace(plain))
                with open(plain, "rb") as source, gzip.open(aside, "wb", compresslevel=6) as target:
                    shutil.copyfileobj(source, target)
            finally:
                plain.unlink(missing_ok=True)
        with atomic_file(folder / f"{name}.md") as aside:
            aside.write_text(summary_page(summary, *self._heading()), encoding="utf-8")
        self._log.say(f"profile of {_numbered(self._steps)}: {summary_words(summary)}\nwrote {folder / name}.md")
        self._log.leave_out(time.perf_counter() - started)

    def _stop(self) -> None:
        self._profiler.stop()
        self._profiler = None
        if self._run.config.training.record_memory_history:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _heading(self) -> tuple[str, list[str]]:
        world, options = self._run.world, self._run.config
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        facts = [
            f"Process {world.rank} of {world.size}, {device}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}; {self._run.model.num_parameters:,} parameters, "
            f"{options.training.global_batch_size} rows of {options.data.seq_length} tokens a step, in micro-batches "
            f"of {options.training.micro_batch_size}.",
        ]
        return f"Profile of {_numbered(self._steps)}", facts


def _numbered(steps: range) -> str:
    """Steps as the log counts them, from 1."""
    return f"step {steps.stop}" if len(steps) == 1 else f"steps {steps.start + 1} to {steps.stop}"
