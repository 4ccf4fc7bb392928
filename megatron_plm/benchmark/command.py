"""The benchmark command: one subcommand a subject; each prints a table and can write JSON."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.config.presets import PRESETS
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file
from megatron_plm.machine import describe_machine


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; returns 0, or 1 where `--check` was given and a bar was missed."""
    parser = ArgumentParser(prog="tools/benchmark.py", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    train = subjects.add_parser("train", help="training on this machine against transformers' EsmForMaskedLM")
    train.add_argument("--data-path", required=True, metavar="PREFIX", help="dataset to train on")
    train.add_argument("--preset", default="esm2-8m", choices=list(PRESETS), help="model shape of both sides")
    train.add_argument("--seq-length", type=_count, default=1024, help="tokens of a row; the peer crops to it")
    train.add_argument("--rows", type=_count, default=4, help="packed rows of one of our optimizer steps")
    train.add_argument(
        "--peer-batch-sizes",
        type=_count,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        help="the peer runs with the fastest of these",
    )
    train.add_argument("--rounds", type=_count, default=5, help="rounds; each measures every side once, in turn")
    train.add_argument("--seconds", type=_seconds, default=10.0, help="time of each side in one round")
    train.add_argument("--seed", type=int, default=1)
    train.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    train.add_argument("--check", action="store_true", help="exit with 1 where a ratio is below its bar")
    options = parser.parse(argv)
    _require_peer()
    if options.output:
        _check_output(options.output)

    from megatron_plm.benchmark.train import measure, table

    result = {
        "subject": "train",
        "machine": describe_machine(),
        "options": _plain(options),
        **measure(options, lambda line: print(line, file=sys.stderr, flush=True)),
    }
    print(table(result))
    if options.output:
        with atomic_file(options.output) as aside:
            aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.output}")
    missed = [name for name, ratio in result["ratios"].items() if ratio["median"] < ratio["bar"]]
    return 1 if options.check and missed else 0


def _count(text: str) -> int:
    """A flag's whole number, 1 or more."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    """A flag's time: a finite number above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _require_peer() -> None:
    """Raise UserError unless the peer's package is there."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the benchmark's peer needs {error.name}; install it with: pip install 'megatron-plm[huggingface]'"
        ) from None


def _check_output(path: Path) -> None:
    """Raise UserError where the figures could not be written, before minutes go into measuring them."""
    if os.path.isdir(path):
        raise UserError(f"--output {path}: is a folder; give the name of a file")
    if not os.path.isdir(path.parent):
        raise UserError(f"--output {path}: there is no folder {path.parent}; make it, or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: cannot be written; choose a folder with write permission")


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
