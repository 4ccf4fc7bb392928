"""Training speed against transformers' EsmForMaskedLM: same shape, proteins, optimizer, threads and machine.

Counted are useful tokens a second: tokens of proteins with their <cls> and <eos>, never padding. All sides choose
15 % of the residues. The peer runs as its users run it: rows of one protein each, padded to the longest of the batch
(`padded`: random batches; `bucketed`: batches of similar length), or packed where transformers can (train_peer.py);
the head on every position. On a CPU the sides take turns in fp32; on a GPU they come one after the other, in bf16, so
that each one's peak memory is its own, and one that fails loses no other; there ours runs by other packages' kernels
too, where they are installed.

MFU: useful tokens a second, times the operations that the model needs to learn from one (plan.speed.token_flops, over
the lengths of the dataset's proteins), over the GPU's dense peak (plan/hardware.py).
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_plm.benchmark.checks import Checks, check, missed_checks
from megatron_plm.benchmark.device import (
    NUM_WORKERS,
    add_device_flags,
    chosen_device,
    chosen_dtype,
    free_memory,
    gpu_here,
    peak_gpu_memory,
    preset_config,
    quick_values,
    waiting_for,
)
from megatron_plm.benchmark.flags import count
from megatron_plm.benchmark.peer import require_peer as require_transformers
from megatron_plm.benchmark.processes import run_watched
from megatron_plm.benchmark.rounds import (
    Step,
    add_round_flags,
    fastest_size,
    ratio_checks,
    ratios,
    timed_in_turn,
)
from megatron_plm.benchmark.train_peer import packed_attention_name, packed_step, padded_step
from megatron_plm.benchmark.train_sides import OURS, OWN, SIDES, is_default, require_sides, values_of
from megatron_plm.benchmark.train_table import table
from megatron_plm.config.options import Config
from megatron_plm.config.presets import PRESETS
from megatron_plm.errors import UserError
from megatron_plm.kernels.accelerators import TORCH, attention_by
from megatron_plm.parallel.mesh import World, joined_world
from megatron_plm.plan.speed import token_flops
from megatron_plm.training.device import on_device
from megatron_plm.training.loop import train_step
from megatron_plm.training.state import Datasets, build_run, open_datasets

__all__ = ["add_flags", "measure", "missed", "require_peer", "table"]

# Of issue 8: ratios at two shapes on a CPU, MFU in per cent of an H200.
BARS, _BAR_PRESETS = {"padded": 2.5, "bucketed": 1.5}, ("esm2-8m", "esm2-35m")
MFU_BARS = {"esm2-650m": 45.0, "esm2-3b": 52.0}
_ROWS = {"cpu": 4, "cuda": 32}
_SIZES = {"cpu": [4, 8, 16], "cuda": [16, 32, 64]}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="dataset to train on")
    text = "model shapes of all sides, one after the other (default: esm2-8m)"
    parser.add_argument("--presets", default=["esm2-8m"], nargs="+", choices=list(PRESETS), metavar="NAME", help=text)
    text = f"of {', '.join(SIDES)} (default: all that are here, on a CPU without compiled and fused)"
    parser.add_argument("--sides", default=None, nargs="+", choices=list(SIDES), metavar="SIDE", help=text)
    parser.add_argument("--seq-length", type=count, default=1024, help="tokens of a row; the peer crops to it")
    text = "packed rows of one micro-batch; fewer where a GPU lacks memory (default: 4, on a GPU 32)"
    parser.add_argument("--rows", type=count, default=None, help=text)
    text = "of one optimizer step of ours, a peer's has one (default: 1)"
    parser.add_argument("--micro-batches", type=count, default=1, metavar="N", help=text)
    text = "proteins; the padded sides run with the fastest of these, 1 pads nothing (default: "
    cpu, gpu = (" ".join(map(str, sizes)) for sizes in _SIZES.values())
    text += f"{cpu}; on a GPU {gpu}; with --quick the first two)"
    parser.add_argument("--peer-batch-sizes", type=count, nargs="+", default=None, metavar="N", help=text)
    add_round_flags(parser)
    add_device_flags(parser)
    text = "tell the peak memory on a CPU too: each side again in a process of its own, whose memory is watched"
    parser.add_argument("--memory", action="store_true", help=text)
    parser.add_argument("--seed", type=int, default=1)


def require_peer() -> None:
    """Which peer is needed depends on --sides: `measure` looks for it."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Time all sides of each preset for `options.rounds` rounds, telling `say` of each.

    Returns tokens a second of each side and round, and the ratios round by round, so that a machine whose speed drifts
    slows both sides of a ratio. Raises UserError, before anything is measured, for options that describe no model.
    """
    device = chosen_device(options)
    dtype = chosen_dtype(options, device)
    sides = options.sides or [side for side in SIDES if is_default(side, device, dtype)]
    require_sides(sides, device)
    if any(side not in OURS for side in sides):
        require_transformers()
    rows = options.rows or _ROWS[device.type]
    configs = {
        preset: _config(preset, rows, options, bf16=dtype == torch.bfloat16, num_workers=NUM_WORKERS[device.type])
        for preset in options.presets
    }
    # FSDP2, which carries the policy of bf16, needs a group even of one.
    with joined_world(use_gpu=device.type == "cuda", force_group=dtype == torch.bfloat16) as world:
        found = {}
        for preset, config in configs.items():
            found[preset] = _Preset(preset, config, world, options, say).measure(sides)
    result = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "presets": found}
    return {**result, "checks": _checks(found, device)}


def missed(result: dict[str, Any]) -> list[str]:
    """The bars that were not reached, and the sides that failed."""
    failed = [f"{preset} {side}" for preset, figures in result["presets"].items() for side in figures["failed"]]
    return [*missed_checks(result), *failed]


def _config(
    preset: str, rows: int, options: argparse.Namespace, *, bf16: bool, num_workers: int = 0, side: str = "ours"
) -> Config:
    micro_batches = options.micro_batches if side in OURS else 1
    return preset_config(
        preset, data_path=(options.data_path,), seq_length=options.seq_length, micro_batch_size=rows,
        global_batch_size=rows * micro_batches, num_workers=num_workers, seed=options.seed, bf16=bf16,
        **values_of(side),
    )  # fmt: skip


class _Preset:
    """All sides at one shape."""

    def __init__(
        self, preset: str, config: Config, world: World, options: argparse.Namespace, say: Callable[[str], None]
    ) -> None:
        self._preset, self._config, self._world, self._options = preset, config, world, options
        self._say, self._wait = say, waiting_for(world.device)
        self._datasets = open_datasets(config)
        self._sizes: dict[str, int] = {}  # of a side's batches: rows, or proteins

    def measure(self, sides: Sequence[str]) -> dict[str, Any]:
        options, device = self._options, self._world.device
        flops, gpu = self._token_flops(), gpu_here(device)
        peak_flops = (gpu.bf16_flops if self._config.training.bf16 else gpu.fp32_flops) if gpu else None
        speeds: dict[str, list[float]] = {}
        memory: dict[str, int | None] = {}
        failed: dict[str, str] = {}
        if device.type == "cpu":
            steps = {side: self._step(side) for side in sides}
            speeds = timed_in_turn(steps, options.rounds, options.seconds, self._say)
            memory = {side: self._memory_of_a_process(side) if options.memory else None for side in sides}
        else:
            for side in sides:
                try:
                    speeds[side], memory[side] = self._alone(side)
                except Exception as error:  # of a compiler or a package: it loses no other side's figures
                    failed[side] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                    self._say(f"{self._preset}, {side} failed: {failed[side]}")
                else:
                    share = f"{100 * statistics.median(speeds[side]) * flops / peak_flops:.1f} %" if peak_flops else "?"
                    self._say(f"{self._preset}, {side}: MFU {share}")
                free_memory(device)
        found = {
            "failed": failed,
            "micro_batches": options.micro_batches,
            "tokens_per_second": speeds,
            "batch_sizes": self._sizes,
            "tried_sizes": self._tried_sizes(),
            "ratios": ratios(speeds, BARS if device.type == "cpu" and self._preset in _BAR_PRESETS else {}),
            "flops_per_token": flops,
            "peak_flops": peak_flops,
            "mfu": {side: statistics.median(each) * flops / peak_flops if peak_flops else None
                    for side, each in speeds.items()},
            "peak_memory": memory,
        }  # fmt: skip
        return found | ({"packed_attention": packed_attention_name(device)} if "packed" in sides else {})

    def _alone(self, side: str) -> tuple[list[float], int | None]:
        """Speeds of a side that has the GPU for itself, and the most memory that its steps take."""
        options = self._options
        attention_by(TORCH)  # a peer is not to run on what the side before it chose
        step = self._step(side)
        with peak_gpu_memory(self._world.device) as peak:  # not of the sizes that were tried before
            speeds = timed_in_turn({side: step}, options.rounds, options.seconds, self._say, self._wait)
        return speeds[side], peak["bytes"]

    def _step(self, side: str) -> Step:
        if side in OURS:
            return self._fitting(lambda rows: _our_step(self._with_rows(rows, side), self._world, self._datasets), side)
        if side == "packed":
            return self._fitting(self._packed_step, side)
        make = functools.partial(
            padded_step, self._config, self._datasets.train.datasets[0], self._datasets.tokenizer, side,
            options=self._options, device=self._world.device,
        )  # fmt: skip
        self._sizes[side], step = fastest_size(
            SIDES[side], self._tried_sizes(), make, self._options.seconds / 2, self._say, self._wait
        )
        return step

    def _with_rows(self, rows: int, side: str) -> Config:
        config = self._config
        return _config(
            self._preset, rows, self._options, bf16=config.training.bf16, side=side,
            num_workers=config.data.num_workers,
        )  # fmt: skip

    def _packed_step(self, rows: int) -> Step:
        return packed_step(self._with_rows(rows, "packed"), self._datasets, self._world.device)

    def _fitting(self, step_of: Callable[[int], Step], side: str) -> Step:
        """A step of as many rows as fit: half as many as before each time that the GPU lacks memory."""
        rows = self._config.training.micro_batch_size
        while True:
            step: Step | None = None
            try:
                step = step_of(rows)
                step()
                self._wait()
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise UserError(f"--presets {self._preset}: one row does not fit this GPU's memory") from None
            else:
                self._sizes[side] = rows
                return step
            step = None  # its model is as large as the next one's
            self._say(f"{self._preset}, {side}: {rows} rows don't fit; {rows // 2} are tried")
            rows //= 2
            free_memory(self._world.device)

    def _tried_sizes(self) -> list[int]:
        sizes = _SIZES[self._world.device.type]
        return self._options.peer_batch_sizes or (sizes[:2] if self._options.quick else sizes)

    def _token_flops(self) -> float:
        """Over the proteins of the dataset, cropped to a row: each token attends to those of its protein."""
        lengths = np.minimum(self._datasets.train.datasets[0].lengths + 2.0, self._options.seq_length)
        attended = float((lengths**2).sum() / lengths.sum())
        return token_flops(self._config, self._datasets.tokenizer.vocab_size, attended)

    def _memory_of_a_process(self, side: str) -> int | None:
        options = self._options
        words = ["train", "--data-path", options.data_path, "--presets", self._preset, "--sides", side,
                 "--seq-length", options.seq_length, "--device", "cpu", "--rounds", 1, "--seconds", 0.01,
                 "--rows", self._config.training.micro_batch_size, "--micro-batches", options.micro_batches,
                 "--peer-batch-sizes", self._sizes[side],
                 "--seed", options.seed]  # fmt: skip
        if options.dtype:
            words += ["--dtype", options.dtype]
        threads = torch.get_num_threads()
        _, peak = run_watched("megatron_plm.benchmark.command", words, cores=threads, threads=threads, name=side)
        return peak


def _our_step(config: Config, world: World, datasets: Datasets) -> Step:
    if config.training.compile:
        torch.compiler.reset()  # or graphs of the last shape decide that this one's are made for shapes that change
    run = build_run(config, world, datasets, fill=quick_values)
    steps = on_device(run.train_loader.steps(run.progress.cursor), world.device)
    return lambda: train_step(run, next(steps)).num_tokens


def _checks(found: dict[str, dict[str, Any]], device: torch.device) -> Checks:
    checks: Checks = {}
    for preset, figures in found.items():
        of_ratios = ratio_checks(figures["ratios"], SIDES, f"training, {preset}")
        checks |= {f"{preset} {side}": each for side, each in of_ratios.items()}
        shares = [figures["mfu"].get(side) for side in OWN]
        known = [share for share in shares if share is not None]
        if known and preset in MFU_BARS and "H200" in torch.cuda.get_device_name(device):
            what = f"training, {preset}: MFU on one H200"
            checks[f"{preset} mfu"] = check(what, 100 * max(known), MFU_BARS[preset], unit="%")
    return checks
