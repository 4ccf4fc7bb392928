"""Every layout against one process: the same model, data and steps; losses, gradient norms and final weights compared.

Each side is training as `launch/pretrain.sh` does it, in fp32 on CPU processes joined by gloo. The processes are
started once for each number of them, and train one layout after the other. Only the order of additions may differ.
"""

import argparse
import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_plm.benchmark.flags import Size, add_size, count
from megatron_plm.benchmark.parity_cases import ALONE, CASES, SHAPE, Case
from megatron_plm.benchmark.spawned import become_process, meet
from megatron_plm.errors import UserError

# Relative to one process: Adam carries differences of the last bit along, so what can be asked of the weights, and of
# gradients late in a run, is less than of the loss.
BARS = {"loss": 1e-5, "grad_norm": 1e-4, "weights": 1e-4}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="dataset of preprocess_data")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the layouts whose names begin so")
    add_size(parser, "--steps", count, Size(20, 3), "steps of each run")


def require_peer() -> None:
    """The peer is one process of our own."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Train all layouts, and one process, for `options.steps` steps from the same data."""
    cases = [case for case in CASES if not options.only or any(case.name.startswith(word) for word in options.only)]
    if not cases:
        raise UserError(
            f"--only {' '.join(options.only)}: no such layout; there are {', '.join(c.name for c in CASES)}"
        )
    cases = [case for case in cases if _runs_here(case, say)]
    shared = [*shlex.split(SHAPE), "--train-iters", str(options.steps), "--data-path", options.data_path]
    return {"cases": compare(cases, shared, options.steps, say), "bars": BARS}


def _runs_here(case: Case, say: Callable[[str], None]) -> bool:
    """Whether torch is new enough for the case."""
    from megatron_plm.config.load import load_config
    from megatron_plm.parallel.pipeline import check_schedule

    try:
        check_schedule(load_config([*case.words, "--data-path", "none"])[0].parallel)
    except UserError as error:
        say(f"{case.name}: left out, {error}")
        return False
    return True


def compare(cases: Sequence[Case], shared: Sequence[str], steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the cases, and in one process each model of theirs; returns each one's figures and how far they are from
    those of its model in one process."""
    import torch

    cases = [*(ALONE[model] for model in dict.fromkeys(case.model for case in cases)), *cases]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-parity-") as scratch:

        def weights(case: Case) -> Any:
            return torch.load(Path(scratch) / case.name / "weights.pt", weights_only=True)

        for processes in sorted({case.processes for case in cases}):
            mine = [case for case in cases if case.processes == processes]
            _run(mine, shared, steps, Path(scratch), processes)
            for case in mine:
                folder = Path(scratch) / case.name
                found[case.name] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
                say(f"{case.name}: loss {found[case.name]['loss'][-1]:.6f}")
        expected = {model: weights(ALONE[model]) for model in {case.model for case in cases}}
        for case in cases:
            figures, reference = found[case.name], found[ALONE[case.model].name]
            ours, theirs = weights(case), expected[case.model]
            assert ours.keys() == theirs.keys()
            figures["differences"] = {
                **{key: _largest(figures[key], reference[key]) for key in ("loss", "grad_norm")},
                "weights": max(relative_difference(ours[name], weight) for name, weight in theirs.items()),
            }
            figures["flags"] = case.flags
            figures["model"] = case.model
            figures["processes"] = case.processes
    return found


def missed(result: dict[str, Any]) -> list[str]:
    """The layouts that differ by more than the bars."""
    return [
        f"{name}: {key}"
        for name, figures in result["cases"].items()
        for key, bar in result["bars"].items()
        if not figures["differences"][key] <= bar
    ]


def table(result: dict[str, Any]) -> str:
    """The result for people: the largest relative difference from one process over all steps."""
    lines = [f"{'layout':<34}{'processes':>10}{'loss':>10}{'grad norm':>11}{'weights':>10}{'seconds':>9}"]
    for name, figures in result["cases"].items():
        loss, grad_norm, weights = (figures["differences"][key] for key in BARS)
        lines.append(
            f"{name:<34}{figures['processes']:>10}{loss:>10.1e}{grad_norm:>11.1e}{weights:>10.1e}"
            f"{figures['seconds']:>9.1f}"
        )
    bars = result["bars"]
    lines.append(f"{'bar':<44}{bars['loss']:>10.0e}{bars['grad_norm']:>11.0e}{bars['weights']:>10.0e}")
    lines += [f"MISSED: {name}" for name in missed(result)]
    return "\n".join(lines)


def _largest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    assert len(ours) == len(theirs)
    if not all(map(math.isfinite, ours)):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def relative_difference(ours: Any, theirs: Any) -> float:
    """‖a − b‖ / ‖b‖ of two tensors; infinite where one holds what is no number."""
    found = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    return found if math.isfinite(found) else math.inf


def _run(cases: Sequence[Case], shared: Sequence[str], steps: int, folder: Path, processes: int) -> None:
    from torch.multiprocessing.spawn import spawn

    spawn(_process, args=(processes, list(cases), list(shared), steps, folder), nprocs=processes)


def _process(rank: int, processes: int, cases: list[Case], shared: list[str], steps: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    become_process(rank, processes)
    for case in cases:
        meet(rank, folder / f"port {case.name}")
        figures, weights = train_case([*shared, *case.words], steps)
        if rank == 0:
            (folder / case.name).mkdir()
            (folder / case.name / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
            torch.save(weights, folder / case.name / "weights.pt")
    assert not dist.is_initialized()


def train_case(argv: Sequence[str], steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train in this process and the others of the layout; returns losses, gradient norms and seconds, and on the first
    process the weights as a whole."""
    import torch

    from megatron_plm.config.load import load_config
    from megatron_plm.config.problems import problems
    from megatron_plm.parallel.mesh import joined_world, world_size
    from megatron_plm.training.loop import train_step
    from megatron_plm.training.state import build_run, open_datasets

    config, _ = load_config(argv)
    found = problems(config, world_size=world_size())
    if found:
        raise UserError("; ".join(found))
    torch.compiler.reset()  # or the last case's graphs decide what this one's are made for
    with joined_world(config.parallel) as world:
        run = build_run(config, world, open_datasets(config))
        figures: dict[str, Any] = {"loss": [], "grad_norm": []}
        started = time.perf_counter()
        for step in run.train_loader.steps(run.progress.cursor):
            metrics = train_step(run, step)
            run.progress.step += 1
            (loss_sum,) = world.sum(metrics.loss_sum.item())
            figures["loss"].append(loss_sum / metrics.num_labels)
            figures["grad_norm"].append(metrics.grad_norm.item())
            if run.progress.step == steps:
                break
        figures["seconds"] = time.perf_counter() - started
        return figures, _whole_weights(run)


def _whole_weights(run: Any) -> dict[str, Any]:
    """All weights of the model, on the first process; collective."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    held = run.model.originals
    whole = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in held.items()}
    if run.world.mesh is None:
        return whole
    stages: list[Any] = [None] * run.world.size
    dist.all_gather_object(stages, whole)
    return {name: weight for stage in stages for name, weight in stage.items()}
