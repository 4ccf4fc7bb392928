"""The flags that commands over pretrained models share, and what they mean together."""

import argparse
import glob
import os
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.errors import UserError
from megatron_plm.inference.likelihood import Likelihood
from megatron_plm.inference.runner import Runner

LONGEST = 4096  # tokens of a protein that a model without positions of its own takes at once, if nothing else is said
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
SPECIALS = 2  # <cls> and <eos>


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR",
        help="a checkpoint of any format that convert_checkpoint reads, or a run directory",
    )  # fmt: skip
    group.add_argument("--device", choices=["cpu", "cuda"], help="where to compute (default: cuda if there is one)")
    group.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16, less exactly; on a GPU by flash attention"
    )
    group.add_argument(
        "--max-length", type=int, metavar="N",
        help="tokens of a protein, with <cls> and <eos>, that go through the model at once (default: what its learned "
        f"positions take, {LONGEST} where it has rotary ones)",
    )  # fmt: skip


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """How proteins share rows, and how those that the model does not take at once are cut."""
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--batch-tokens", type=int, metavar="N",
        help=f"tokens of a packed row (default: {_BATCH_TOKENS['cpu']} on the CPU, {_BATCH_TOKENS['cuda']} on a GPU)",
    )  # fmt: skip
    group.add_argument(
        "--overlap", type=int, metavar="N",
        help="tokens that neighbouring windows of a longer protein share (default: a quarter of --max-length)",
    )  # fmt: skip


def add_reading_flags(group: argparse._ActionsContainer) -> None:
    """What is read of records, beside the flags of every command with input."""
    group.add_argument("--numbered", action="store_true", help="call the proteins 1, 2, …: the input has no names")
    group.add_argument("--strict", action="store_true", help="stop at a letter that the model's vocabulary lacks")


def load_runner(options: argparse.Namespace) -> Runner:
    """The model that the flags name, on its device; raises UserError."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave --device out, or install torch's CUDA build")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    return Runner(load_pretrained(options.checkpoint), torch.device(device), dtype)


def longest_length(given: int | None, options: ModelOptions) -> int:
    """Tokens of a protein that the model takes at once; raises UserError where --max-length is beyond its positions."""
    positions = options.max_position_embeddings
    if given is None:
        return positions or LONGEST
    if given <= SPECIALS:
        raise UserError(f"--max-length must be above {SPECIALS}, those of <cls> and <eos>, not {given}")
    if positions is not None and given > positions:
        raise UserError(f"--max-length {given}: the model has learned positions for {positions} tokens; give no more")
    return given


def window_overlap(given: int | None, max_tokens: int) -> int:
    """Tokens that neighbouring windows share; raises UserError where windows would not move on."""
    if given is None:
        return max_tokens // 4
    if not 0 <= given < max_tokens:
        raise UserError(f"--overlap must be 0 to {max_tokens - 1}, below the length of a window, not {given}")
    return given


def row_tokens(given: int | None, max_tokens: int, device: torch.device) -> int:
    """Tokens of a packed row; raises UserError where a protein of `max_tokens` would not fit into it."""
    if given is None:
        return max(_BATCH_TOKENS[device.type], max_tokens)
    if given < max_tokens:
        raise UserError(f"--batch-tokens {given}: one protein may have {max_tokens}; raise it, or lower --max-length")
    return given


def likelihood_of(options: argparse.Namespace, runner: Runner) -> Likelihood:
    """What scores are computed with; raises UserError."""
    longest = longest_length(options.max_length, runner.options)
    batch_tokens = row_tokens(options.batch_tokens, longest, runner.device)
    return Likelihood(runner, longest, window_overlap(options.overlap, longest), batch_tokens)


def check_output(options: argparse.Namespace, *, replaces: Callable[[Path], bool] = Path.is_file) -> None:
    """Before any work: raise UserError where --output cannot be made, or exists.

    With --force it may exist, if `replaces` says that it is such an output, and nothing that is read here.
    """
    path: Path = options.output
    if path.exists() and not options.force:
        raise UserError(f"{path} exists already; give another --output, or --force to replace it")
    if path.exists() and not replaces(path):
        raise UserError(f"--output {path}: is no output of this command, so --force does not delete it; name another")
    if path.exists():
        _refuse_sources(path, options)
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}; make it, or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: cannot be written; choose a folder with write permission")


def _refuse_sources(output: Path, options: argparse.Namespace) -> None:
    """Raise UserError where a flag names `output`, which exists, as what is to be read, or the folder it is in."""
    place = output.parent.resolve() / output.name  # what is replaced is the link, where it is one
    for flag in ("checkpoint", "input", "variants", "wild_type"):
        given = getattr(options, flag, None)
        for pattern in given if isinstance(given, list) else [given] if given else []:
            found = glob.glob(str(pattern), recursive=True) if glob.has_magic(str(pattern)) else []
            for source in map(Path, [str(pattern), *found]):
                if source.exists() and (output.samefile(source) or place.is_relative_to(source.resolve())):
                    which = "is" if output.samefile(source) else "lies in"
                    name = f"--{flag.replace('_', '-')} {pattern}"
                    raise UserError(
                        f"--output {output}: {which} {name}, which is read, so --force does not replace it; name "
                        "another"
                    )
