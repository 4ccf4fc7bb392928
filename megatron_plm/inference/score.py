"""Scores by a masked language model, without any training: the command `score`, one subcommand a subject."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.inference.resumable import RESUMES
from megatron_plm.memory import keep_freed_memory

# subject: (module with add_flags and run; one line of help; what --output names)
SUBJECTS = {
    "perplexity": ("megatron_plm.inference.perplexity", "how well the model predicts each protein", "CSV file"),
    "variants": ("megatron_plm.inference.variant_scores", "what mutations do to a protein", "CSV file"),
    "contacts": ("megatron_plm.inference.contacts", "which residues touch, from attention", "folder"),
}


def main(argv: Sequence[str]) -> None:
    """Score as `argv` says and print what was written."""
    keep_freed_memory()
    parser = ArgumentParser(prog="score", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    typed = next((word for word in argv if word in SUBJECTS), None)
    subject: Any = None
    for name, (module, text, kind) in SUBJECTS.items():
        flags = subjects.add_parser(name, help=f"{text} ({kind})")
        if name == typed:
            subject = importlib.import_module(module)
            subject.add_flags(flags)
            flags.add_argument("--output", required=True, type=Path, metavar="PATH", help=f"{kind} to write{RESUMES}")
            flags.add_argument("--force", action="store_true", help="replace an existing output")
    options = parser.parse(argv)
    subject.run(options)
