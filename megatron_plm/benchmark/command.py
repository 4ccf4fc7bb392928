"""The benchmark command: one subcommand a subject; each prints a table and can write JSON."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.config.presets import PRESETS
from megatron_plm.files import atomic_file
from megatron_plm.machine import describe_machine


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; returns 0, or 1 where `--check` was given and a bar was missed."""
    parser = ArgumentParser(prog="tools/benchmark.py", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    train = subjects.add_parser("train", help="training on this machine against transformers' EsmForMaskedLM")
    train.add_argument("--data-path", required=True, metavar="PREFIX", help="dataset to train on")
    train.add_argument("--preset", default="esm2-8m", choices=list(PRESETS), help="model shape of both sides")
    train.add_argument("--seq-length", type=int, default=1024, help="tokens of a row; the peer crops to it")
    train.add_argument("--rows", type=int, default=4, help="packed rows of one of our optimizer steps")
    train.add_argument(
        "--peer-batch-sizes",
        type=int,
        nargs="+",
        default=[4, 8, 16],
        help="the peer runs with the fastest of these",
    )
    train.add_argument("--rounds", type=int, default=5, help="rounds; each measures every side once, in turn")
    train.add_argument("--seconds", type=float, default=10.0, help="time of each side in one round")
    train.add_argument("--seed", type=int, default=1)
    train.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    train.add_argument("--check", action="store_true", help="exit with 1 where a ratio is below its bar")
    options = parser.parse(argv)

    from megatron_plm.benchmark.train import measure, table

    result = {
        "subject": "train",
        "machine": describe_machine(),
        "options": _plain(options),
        **measure(options),
    }
    print(table(result))
    if options.output:
        with atomic_file(options.output) as aside:
            aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.output}")
    missed = [name for name, ratio in result["ratios"].items() if ratio["median"] < ratio["bar"]]
    return 1 if options.check and missed else 0


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
