"""The benchmark command: one subcommand a subject; each prints a table and can write JSON."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.benchmark.flags import choose_sizes
from megatron_plm.errors import UserError, run_command
from megatron_plm.files import atomic_file
from megatron_plm.machine import describe_machine

# subject: (module with add_flags, require_peer, measure, table and missed; one line of help)
SUBJECTS = {
    "train": ("megatron_plm.benchmark.train", "training on this machine against transformers' EsmForMaskedLM"),
    "embed": ("megatron_plm.benchmark.embed", "embedding on this machine against transformers' EsmModel"),
    "attention": ("megatron_plm.benchmark.attention", "the model's attention against other ways to compute it"),
    "checkpoint": ("megatron_plm.benchmark.checkpoint", "saving and loading a run against torch.save"),
    "data": ("megatron_plm.benchmark.data", "preprocessing against megatron-core's builder, and the loader"),
    "kernels": ("megatron_plm.benchmark.kernels", "each fused op against eager PyTorch and torch.compile"),
    "parity": ("megatron_plm.benchmark.parity", "every layout against one process"),
    "scaling": ("megatron_plm.benchmark.scaling", "weak scaling over processes"),
    "convert": ("megatron_plm.benchmark.convert", "memory and speed of checkpoint conversions"),
    "finetune": ("megatron_plm.benchmark.finetune", "memory, time and score of the ways to fine-tune"),
    "recipes": ("megatron_plm.benchmark.recipes", "preprocessing of stand-ins for UniRef, Pfam, BFD and OAS"),
}
_SUITE = "suite"


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; returns 0, or 1 where `--check` was given and a bar was missed."""
    if argv[:1] == [_SUITE]:
        return importlib.import_module("megatron_plm.benchmark.suite").main(argv[1:])
    parser = ArgumentParser(prog="tools/benchmark.py", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    subject: Any = None
    subjects.add_parser(_SUITE, help="several of these, one after the other, and all their bars in one table")
    for name, (module, text) in SUBJECTS.items():
        flags = subjects.add_parser(name, help=text)
        if argv and argv[0] == name:
            subject = importlib.import_module(module)
            subject.add_flags(flags)
            flags.add_argument("--quick", action="store_true", help="smaller sizes: see that all works, in a minute")
            flags.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
            flags.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    options = parser.parse(argv)
    choose_sizes(options)
    subject.require_peer()
    if options.output:
        _check_output(options.output)
    result = {
        "subject": options.subject,
        "machine": describe_machine(),
        "options": _plain(options),
        **subject.measure(options, lambda line: print(line, file=sys.stderr, flush=True)),
    }
    missed = result["missed"] = subject.missed(result)
    print(subject.table(result))
    if options.output:
        with atomic_file(options.output) as aside:
            aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.output}")
    return 1 if options.check and missed else 0


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


if __name__ == "__main__":
    sys.exit(run_command(main))
