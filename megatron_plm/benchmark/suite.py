"""Several measurements, one after the other, each in a process of its own and within a time: `suite cpu`, `suite gpu`.

Into one folder go the figures of each (`NAME.json`), what each printed (`logs/NAME.txt`), and two files that hold
everything: `summary.json` and `summary.md`. The exit code is 0 where every step ran and every bar was reached, else 1.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_plm.arguments import ArgumentParser
from megatron_plm.benchmark.checks import Checks, check_lines
from megatron_plm.benchmark.flags import seconds
from megatron_plm.benchmark.suite_steps import REPOSITORY, SuiteStep, cpu_steps, gpu_steps
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file
from megatron_plm.machine import describe_machine

_MARK = ".megatron_plm_suite"  # stands in the folders that may be emptied
_SECONDS = {"cpu": 590.0, "gpu": 460.0}  # with starting make and building, ten and eight minutes


def main(argv: Sequence[str]) -> int:
    """Run a suite; returns its exit code. Raises UserError for what the user can mend."""
    options = _options(argv)
    if options.suite == "gpu" and not options.quick and not torch.cuda.is_available():
        raise UserError("suite gpu: torch sees no GPU here; --quick tries all steps on the CPU")
    folder = options.output_dir.absolute()
    steps = (cpu_steps if options.suite == "cpu" else gpu_steps)(folder, quick=options.quick)
    if options.only:
        steps = _chosen(steps, options.only)
    _make_empty(folder)
    end = time.monotonic() + (options.seconds or _SECONDS[options.suite])
    done = []
    for number, step in enumerate(steps, 1):
        left = end - time.monotonic()
        most = min(step.seconds, max(left, 0))
        print(f"[{number}/{len(steps)}] {step.name}: about {step.expected:.0f} s, {most:.0f} at most", flush=True)
        done.append(run_step(step, folder, min(step.seconds, left)))
        last = f": {done[-1]['last_line']}" if done[-1]["status"] == "failed" else ""
        print(f"    {done[-1]['status']} after {done[-1]['seconds']:.0f} s{last}", flush=True)
    result = {
        "subject": f"suite {options.suite}",
        "machine": describe_machine(),
        "steps": done,
        **collect(done, folder),
    }
    text = page(result, folder)
    for name, content in (("summary.json", json.dumps(result, indent=2) + "\n"), ("summary.md", text)):
        with atomic_file(folder / name) as aside:
            aside.write_text(content, encoding="utf-8")
    print("\n" + "\n".join(closing_lines(result)))
    print(f"wrote {folder / 'summary.md'} and {folder / 'summary.json'}")
    return 0 if is_good(result) else 1


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tools/benchmark.py suite", description=__doc__)
    parser.add_argument("suite", choices=["cpu", "gpu"])
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="new, or of an earlier suite")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps, and the dataset that they need")
    parser.add_argument("--seconds", type=seconds, default=None, help=f"for all steps (default: {_SECONDS})")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: see that all works")
    return parser.parse(argv)


def _make_empty(folder: Path) -> None:
    """Make the folder; what an earlier suite wrote goes, and a folder that is something else is refused."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).is_file():
            raise UserError(f"--output-dir {folder}: holds something else than figures; name a new folder")
        shutil.rmtree(folder)
    try:
        for name in ("logs", "data"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be made ({error.strerror}); name another") from None


def _chosen(steps: Sequence[SuiteStep], names: Sequence[str]) -> list[SuiteStep]:
    known = [step.name for step in steps]
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such step; there are {', '.join(known)}")
    return [step for step in steps if step.name in (*names, "dataset")]


def run_step(step: SuiteStep, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a step, ending it and all that it started after so many seconds; its status is ok, failed or out of time."""
    log = folder / "logs" / f"{step.name}.txt"
    record: dict[str, Any] = {
        "name": step.name, "command": list(step.words), "is_judged": step.is_judged, "seconds": 0.0, "last_line": "",
    }  # fmt: skip
    if seconds <= 0:
        return record | {"status": "out of time"}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_python_path()), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            step.words, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=REPOSITORY,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    status = "out of time" if code is None else "ok" if code == 0 else "failed"
    record |= {"seconds": time.monotonic() - start, "last_line": lines[-1] if lines else "", "exit_code": code}
    return record | {"status": status}


def _python_path() -> list[str]:
    return [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]


def collect(done: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """All figures that the steps wrote, all bars of those that are judged, and what these missed otherwise."""
    results, checks, missed = {}, Checks(), []
    for step in done:
        path = folder / f"{step['name']}.json"
        if path.is_file():
            result = results[step["name"]] = json.loads(path.read_text(encoding="utf-8"))
            if not step["is_judged"]:
                continue
            own = result.get("checks", {})
            checks |= {f"{step['name']}: {name}": each for name, each in own.items()}
            missed += [f"{step['name']}: {name}" for name in result["missed"] if name not in own]
    return {"results": results, "checks": checks, "missed_otherwise": missed}


def is_good(result: dict[str, Any]) -> bool:
    """Whether every step ran and every bar was reached."""
    ran = all(step["status"] == "ok" for step in result["steps"])
    return ran and not result["missed_otherwise"] and all(each["met"] for each in result["checks"].values())


def closing_lines(result: dict[str, Any]) -> list[str]:
    """All ratios beside their bars, and which steps did not end well."""
    lines = check_lines(result["checks"]) if result["checks"] else ["no bar was measured"]
    lines += [f"MISSED: {name}" for name in result["missed_otherwise"]]
    bad = [step for step in result["steps"] if step["status"] != "ok"]
    return lines + [f"{step['name']}: {step['status']}; see logs/{step['name']}.txt" for step in bad]


def page(result: dict[str, Any], folder: Path) -> str:
    """Everything for people, in Markdown."""
    machine = result["machine"]
    where = f"{machine['gpu']}, " if machine["gpu"] else ""
    lines = [
        f"# Measured: {result['subject']}",
        "",
        f"{machine['time']}, commit {machine['commit']}: {where}{machine['processor']}, {machine['cores']} cores, "
        f"{machine['versions']}",
        "",
        "| step | | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {step['name']} | {step['status']} | {step['seconds']:.0f} |" for step in result["steps"]]
    lines += ["", "```", *closing_lines(result), "```", ""]
    for step in result["steps"]:
        log = folder / "logs" / f"{step['name']}.txt"
        if log.is_file() and step["name"] != "dataset":
            text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            lines += [f"## {step['name']}", "", "```", *text[-80:], "```", ""]
    return "\n".join(lines)
