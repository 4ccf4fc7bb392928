"""The flags by which commands are given sequences."""

import argparse
import sys

from megatron_plm.data.readers import FORMATS, Input, open_inputs
from megatron_plm.errors import UserError


def add_input_flags(parser: argparse.ArgumentParser, *, names: bool) -> argparse._ArgumentGroup:
    """Add them as a group, which is returned; with `names` also those that say where the records' names stand."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, 'patterns*' of files, or - for standard input; plain, .gz, .zst, .bz2 or .xz",
    )
    group.add_argument("--format", metavar="NAME", help=f"one of {', '.join(FORMATS)} (default: told by the content)")
    group.add_argument("--json-key", default="sequence", metavar="KEY", help="JSONL: the sequence (default: sequence)")
    if names:
        group.add_argument("--json-name-key", default="id", metavar="KEY", help="JSONL: its name (default: id)")
    group.add_argument(
        "--column", default="sequence", metavar="NAME", help="CSV, TSV, Parquet: the sequence's (default: sequence)"
    )
    if names:
        group.add_argument(
            "--name-column", default="id", metavar="NAME", help="CSV, TSV, Parquet: the name's (default: id)"
        )
    group.add_argument(
        "--skip-lines", type=int, default=0, metavar="N", help="CSV, TSV: lines above the column names (default: 0)"
    )
    return group


def inputs_of(options: argparse.Namespace) -> list[Input]:
    """Open what the flags name, and print the notes about it; raises UserError, see open_inputs."""
    if options.skip_lines < 0:
        raise UserError(f"--skip-lines must be 0 or more, not {options.skip_lines}")
    given = vars(options)
    fields = ("format", "json_key", "json_name_key", "column", "name_column", "skip_lines")
    inputs = open_inputs(options.input, **{name: given[name] for name in fields if name in given})
    for note in (note for source in inputs for note in source.notes):
        print(f"note: {note}", file=sys.stderr)
    return inputs
