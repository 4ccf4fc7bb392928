"""`convert_checkpoint`: any format to any other, through the native form in memory.

Beside the checkpoint it writes conversion.json, which says how it came about; no reader of a checkpoint looks at it.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_plm.arguments import ArgumentParser
from megatron_plm.checkpoint_format import STATE_FILE
from megatron_plm.convert.config_json import CONFIG_JSON, write_json
from megatron_plm.convert.pretrained import FORMATS, detect_format, read_checkpoint
from megatron_plm.convert.lazy import meta_of
from megatron_plm.convert.weights import DTYPES, INVERSE_FREQUENCIES
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_directory
from megatron_plm.invocation import command_line

_VERB = "convert-checkpoint"
CONVERSION_FILE = "conversion.json"
_EXAMPLE_STRUCTURES = Path("examples/data/structures")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="convert_checkpoint",
        description="Convert a checkpoint between formats. Weights only: the optimizer's state is not carried.",
    )
    parser.add_argument("--from", dest="source", required=True, choices=FORMATS, help="format of the input")
    parser.add_argument("--to", dest="target", required=True, choices=FORMATS, help="format of the output")
    parser.add_argument("--input", required=True, type=Path, metavar="DIR", help="checkpoint, or a run directory")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="type of the written weights")
    parser.add_argument("--force", action="store_true", help="replace an output that is a checkpoint directory")
    return parser


def main(argv: Sequence[str]) -> int:
    """Convert as `argv` says and print what was written, what is not carried and the next command."""
    arguments = build_parser().parse(argv)
    source, output = arguments.input, arguments.output
    _check_output(source, output, force=arguments.force)
    found = detect_format(source)
    if found != arguments.source:
        raise UserError(f"{source}: holds a {found} checkpoint, not {arguments.source}; give --from {found}")
    if arguments.target == "native" and arguments.dtype != "float32":
        raise UserError(f"--dtype {arguments.dtype}: native checkpoints hold float32 weights, leave --dtype out")
    weights = read_checkpoint(source, found)
    with atomic_directory(output, force=arguments.force) as aside:
        lost = (*weights.notes, *FORMATS[arguments.target].write(weights, aside, arguments.dtype))
        write_json(
            aside / CONVERSION_FILE,
            {
                "command": command_line(_VERB, argv),
                "from": found,
                "to": arguments.target,
                "input": str(source),
            },
        )
    parameters = sum(t.numel() for name, t in meta_of(weights.tensors).items() if name != INVERSE_FREQUENCIES)
    print(f"wrote {output}: {arguments.target}, {parameters:,} parameters, {arguments.dtype}")
    for note in lost:
        print(f"not carried: {note}")
    letters = weights.tokenizer.one_letter_a_token
    print(f"next: {next_command(arguments.target, output) if letters else command_line('pretrain', ['--help'])}")
    return 0


def next_command(target: str, output: Path) -> str:
    """A command that uses a checkpoint of format `target` at `output`, and can be typed as it stands."""
    if target == "huggingface":
        code = (
            "from transformers import AutoModelForMaskedLM as M, AutoTokenizer as T; "
            f"d = {json.dumps(str(output))}; "
            'print(M.from_pretrained(d)(**T.from_pretrained(d)("MKTAYIAKQR", return_tensors="pt")).logits.shape)'
        )
        return f"python -c {shlex.quote(code)}"
    if not _EXAMPLE_STRUCTURES.is_dir():
        return command_line("tape-train", ["--help"])
    flags = ["--from_pretrained", output, "--data_dir", _EXAMPLE_STRUCTURES]
    return command_line("tape-train", ["transformer", "secondary_structure", *flags])


def _check_output(source: Path, output: Path, *, force: bool) -> None:
    """Before any work: refuse to overwrite, and with `force` to delete what is no converted checkpoint."""
    if not output.exists():
        return
    if not force:
        raise UserError(f"{output} exists already; give another --output, or --force to replace it")
    if not any((output / name).is_file() for name in (STATE_FILE, CONFIG_JSON)):
        raise UserError(f"{output} is no checkpoint directory, so --force does not delete it; give another --output")
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(f"{output} holds the input {source}, so --force does not delete it; give another --output")
