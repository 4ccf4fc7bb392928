"""The command that turns structure files into TAPE's records: secondary structure and C-alpha coordinates."""

import argparse
import contextlib
import glob
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file, write_errors_told
from megatron_plm.invocation import typeable
from tape_finetune.dssp import SS3_OF_SS8
from tape_finetune.progress import track
from tape_finetune.structure_splits import assign_splits, parse_splits
from tape_finetune.structures import SUFFIXES, Chain, UnreadableStructure, read_chains

_NAMES_SHOWN = 5


def main(argv: Sequence[str]) -> int:
    """Run the command; see --help. Returns 0, raises UserError."""
    arguments = _parser().parse(argv)
    splits = parse_splits(arguments.splits)
    if not 0 < arguments.min_resolved <= 1:
        raise UserError(f"--min-resolved {arguments.min_resolved:g}: expected a share above 0 and at most 1")
    if arguments.max_length is not None and arguments.max_length < arguments.min_length:
        raise UserError(f"--max-length {arguments.max_length}: is below --min-length {arguments.min_length}")
    folders = [Path(arguments.output_dir, _TASKS[task][0]) for task in _TASKS if arguments.task in (task, "both")]
    earlier = [path for folder in folders for path in sorted(folder.glob(f"{folder.name}_*.jsonl*"))]
    if earlier and not arguments.force:
        raise UserError(f"{earlier[0]} exists already; give another --output-dir, or --force to replace all its splits")
    files = _input_files(arguments.input)
    skipped = _Skipped()
    chains = _with_unique_ids(_select(_read_all(files, skipped), arguments, skipped))
    if not chains:
        raise UserError(f"--input: no usable chain in {len(files)} file(s): {skipped.in_one_line()}")
    split_of = assign_splits([chain.primary for chain in chains], splits)

    datasets: dict[Path, list[dict[str, Any]]] = {}
    for task, (folder, record, observed) in _TASKS.items():
        if arguments.task not in (task, "both"):
            continue
        usable = [observed(chain) >= arguments.min_resolved for chain in chains]
        for chain, use in zip(chains, usable, strict=True):
            if not use:
                skipped.add(f"too few residues with a full backbone, left out of {task}", chain.id)
        for split in splits:
            path = Path(arguments.output_dir, folder, f"{folder}_{split}.jsonl.gz")
            chosen = zip(chains, split_of, usable, strict=True)
            datasets[path] = [record(chain) for chain, own, use in chosen if use and own == split]
            if not datasets[path]:
                raise UserError(
                    f"--splits: no chain of {split!r} has a full backbone, which {task} needs; "
                    "choose one task with --task or give more structures"
                )
    _write(datasets)
    # Splits of other names would hold chains that now are in these: in train, say.
    for path in earlier:
        if path not in datasets:
            path.unlink()

    print(f"{len(files)} files read, {len(chains)} chains kept")
    for line in skipped.lines():
        print(f"  skipped: {line}")
    for path, records in datasets.items():
        num_residues = sum(record["protein_length"] for record in records)
        print(f"wrote {path}: {len(records)} proteins, {num_residues:,} residues")
    if {"train", "valid"} <= splits.keys():
        task = "contact_prediction" if arguments.task == "contact_prediction" else "secondary_structure"
        command = typeable("tape-train", ["onehot", task, "--data_dir", arguments.output_dir])
    else:
        # Without both there is nothing to train on; a model from elsewhere can be scored with --data_dir.
        command = typeable("tape-eval", ["--help"])
    print(f"next: {command}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="structures_to_tape",
        description="Turn PDB and mmCIF files (plain or .gz) into TAPE's records for secondary structure and "
        "contact prediction.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or quoted globs")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="gets secondary_structure/ and proteinnet/")
    parser.add_argument(
        "--splits",
        default="train=0.8,valid=0.1,test=0.1",
        metavar="NAME=SHARE,...",
        help="names and shares; similar chains stay in one split (default: %(default)s)",
    )
    parser.add_argument("--task", choices=[*_TASKS, "both"], default="both", help="which records (default: both)")
    parser.add_argument("--min-length", type=int, default=20, metavar="N", help="shortest chain (default: 20)")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest chain (default: no limit)")
    parser.add_argument(
        "--min-resolved",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="smallest share of residues with coordinates (default: 0.5)",
    )
    parser.add_argument(
        "--keep-identical",
        action="store_true",
        help="keep every chain; by default the best-resolved of those with the same sequence",
    )
    parser.add_argument("--force", action="store_true", help="replace all splits of an earlier run in --output-dir")
    return parser


class _Skipped:
    """What was left out, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def lines(self) -> Iterator[str]:
        for reason, names in self._names.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            yield f"{len(names)} {reason} ({', '.join(names[:_NAMES_SHOWN])}{more})"

    def in_one_line(self) -> str:
        return "; ".join(self.lines())


def _input_files(patterns: Iterable[str]) -> list[Path]:
    """Files as named, folders searched in depth for structure files, globs expanded; each once, sorted."""
    files: set[Path] = set()
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        if not matches:
            raise UserError(f"--input {pattern}: no such file or folder, and no file matches it as a glob")
        for match in map(Path, matches):
            found = [path for path in match.rglob("*") if _is_structure(path)] if match.is_dir() else [match]
            if not found:
                endings = ", ".join(SUFFIXES)
                raise UserError(f"--input {match}: the folder holds no structure file ({endings}, each also with .gz)")
            files.update(found)
    return sorted(files)


def _is_structure(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES) and path.is_file()


def _read_all(files: Sequence[Path], skipped: _Skipped) -> Iterator[Chain]:
    """Yield all chains; a file without any is an error if it is the only one, else counted."""
    for path in track(files, "reading structures"):
        try:
            chains = read_chains(path)
            if not chains:
                raise UnreadableStructure(f"{path}: holds no protein chain")
        except UnreadableStructure as error:
            if len(files) == 1:
                raise
            skipped.add(str(error).removeprefix(f"{path}: "), path.name)
        else:
            yield from chains


def _select(chains: Iterable[Chain], arguments: argparse.Namespace, skipped: _Skipped) -> list[Chain]:
    """Apply the limits and, unless told otherwise, keep the best-resolved chain of each sequence."""
    kept: list[Chain] = []
    place_of: dict[str, int] = {}
    for chain in chains:
        length = len(chain.primary)
        if length < arguments.min_length:
            skipped.add(f"shorter than {arguments.min_length} residues", chain.id)
        elif arguments.max_length is not None and length > arguments.max_length:
            skipped.add(f"longer than {arguments.max_length} residues", chain.id)
        elif chain.has_alpha.mean() < arguments.min_resolved:
            skipped.add(f"less than {arguments.min_resolved:g} of the residues resolved", chain.id)
        elif arguments.keep_identical or chain.primary not in place_of:
            place_of[chain.primary] = len(kept)
            kept.append(chain)
        else:
            place = place_of[chain.primary]
            worse, better = sorted((chain, kept[place]), key=lambda one: int(one.has_alpha.sum()))
            skipped.add("same sequence as a chain that is kept", worse.id)
            kept[place] = better
    return kept


def _with_unique_ids(chains: Iterable[Chain]) -> list[Chain]:
    """Files in different folders may have one name: the second `model_A` becomes `model_A#2`."""
    seen: Counter[str] = Counter()
    unique = []
    for chain in chains:
        seen[chain.id] += 1
        number = seen[chain.id]
        unique.append(chain if number == 1 else replace(chain, id=f"{chain.id}#{number}"))
    return unique


def _secondary_structure_record(chain: Chain) -> dict[str, Any]:
    return {
        "id": chain.id,
        "primary": chain.primary,
        "protein_length": len(chain.primary),
        "ss3": SS3_OF_SS8[chain.ss8].tolist(),
        "ss8": chain.ss8.tolist(),
        "valid_mask": chain.has_backbone.astype(int).tolist(),
    }


def _contact_record(chain: Chain) -> dict[str, Any]:
    return {
        "id": chain.id,
        "primary": chain.primary,
        "protein_length": len(chain.primary),
        "tertiary": [
            [round(x, 2) + 0.0 for x in position]  # + 0.0: no -0.0
            for position in chain.alpha.tolist()
        ],
        "valid_mask": chain.has_alpha.astype(int).tolist(),
    }


# task: (folder of the data in TAPE, record of a chain, share of residues the task can use)
_TASKS: dict[str, tuple[str, Callable[[Chain], dict[str, Any]], Callable[[Chain], float]]] = {
    "secondary_structure": (
        "secondary_structure",
        _secondary_structure_record,
        lambda chain: float(chain.has_backbone.mean()),
    ),
    "contact_prediction": ("proteinnet", _contact_record, lambda chain: float(chain.has_alpha.mean())),
}


def _write(datasets: Mapping[Path, Sequence[Mapping[str, Any]]]) -> None:
    """Write all under temporary names and rename them at the end; the bytes depend on the records alone.

    Raises UserError where a file cannot be written; none is there then.
    """
    with contextlib.ExitStack() as stack:
        for path, records in datasets.items():
            with write_errors_told(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = stack.enter_context(atomic_file(path))
                # Neither name nor time in the gzip header.
                with open(aside, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
                    for record in records:
                        file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
