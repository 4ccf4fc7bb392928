"""Command lines with TAPE's flags: underscores as TAPE writes them, hyphens as everyone else does."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_plm.errors import UserError

# TAPE's flags that have no meaning here, and what there is instead; docs/finetuning.md has the same table.
TAPE_ONLY = {
    "num_workers": "the labels are read into memory at once; leave it out",
    "fp16": "--bf16 is there for tape_train; scores are computed in float32",
    "model_config_file": "a checkpoint says its own architecture; give --from_pretrained to tape_train",
    "vocab_file": "a checkpoint says its own vocabulary; leave it out",
    "tokenizer": "a checkpoint says its own vocabulary; leave it out",
    "local_rank": "torchrun tells each process its own; start tape_train.py with it and leave this out",
    "nproc_per_node": "it is a flag of torchrun, which starts tape_train.py",
    "log_level": "the output has one level; leave it out",
    "debug": "the output has one level; leave it out",
}


def add_flag(parser: argparse._ActionsContainer, name: str, **options: Any) -> argparse.Action:
    """Add the flag `--name`; an underscore in `name` may be typed as a hyphen."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return parser.add_argument(*spellings, **options)


def refuse(argv: Sequence[str], flags: Mapping[str, str]) -> None:
    """Raise UserError for the first of `flags` in `argv`, with what `flags` says there is instead."""
    for word in argv:
        flag = word.split("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in flags:
            raise UserError(f"{flag}: not supported here, as {flags[name]}")


def plain_name(text: str) -> str:
    """A flag's value that can name a file or folder in another one."""
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"expected a name without slashes, not {text!r}")
    return text


def whole_number(minimum: int) -> Callable[[str], int]:
    """A converter of flag values to whole numbers of at least `minimum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, not {text!r}")
        return value

    return convert


def number(minimum: float, *, above: bool = False) -> Callable[[str], float]:
    """A converter of flag values to finite numbers of at least (or, with `above`, above) `minimum`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < minimum or (above and value == minimum):
            limit = f"above {minimum:g}" if above else f"of at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"expected a number {limit}, not {text!r}")
        return value

    return convert
