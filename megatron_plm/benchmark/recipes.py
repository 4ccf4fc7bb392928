"""The recipes of docs/data.md, timed on stand-ins: real proteins, written the way each collection is.

The collections themselves are downloads of up to hundreds of GB. A stand-in has a collection's format, compression,
kind of headers and length of sequences, made of the given proteins repeated with a changed end, so that few are equal.
Time, memory and disk per GB of decompressed text carry over; what `--dedup` finds doesn't.
"""

import argparse
import gzip
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_plm.benchmark.flags import Size, add_size, count
from megatron_plm.benchmark.processes import run_side
from megatron_plm.data.formats import BlockReader
from megatron_plm.errors import UserError

_MODULE = "megatron_plm.benchmark.data_side"
_POLL_SECONDS = 0.05
_CLUSTER_SIZE = 4  # members of a stand-in's clusters; UniRef90 has about so many in a UniRef50 cluster
_NUM_FILES = 8
_LETTERS = "ACDEFGHIKLMNPQRSTVWY"
_FILLER = ",".join(f"field{number}" for number in range(90))  # of an OAS row, which has about a hundred columns


@dataclass(frozen=True)
class Recipe:
    """A collection's stand-in and its command.

    Attributes:
        pattern: of its files in a folder; with a '*' there are several.
        flags: of preprocess_data behind the input and the output.
        length: residues that sequences are cut to, None: whole.
        head: what a file begins with.
        record: text of the record of this number and sequence.
    """

    pattern: str
    flags: tuple[str, ...]
    length: int | None
    head: str
    record: Callable[[int, str], str]


RECIPES = {
    "UniRef50": Recipe(
        "uniref50.fasta.gz", ("--workers", "2", "--shuffle"), None, "",
        lambda i, s: f">UniRef50_A0A{i:07d} Some protein n=1 Tax=Bacteria TaxID=2 RepID=A0A{i:07d}_9BACT\n{s}\n",
    ),
    "UniRef90 in UniRef50 clusters": Recipe(
        "uniref90.fasta.gz",
        ("--clusters", "clusters.tsv", "--split", "train=0.995,valid=0.005", "--shuffle", "--workers", "2"), None, "",
        lambda i, s: f">UniRef90_A0A{i:07d} Some protein n=1 Tax=Bacteria TaxID=2 RepID=A0A{i:07d}_9BACT\n{s}\n",
    ),
    "Pfam": Recipe(
        "Pfam-A.fasta.gz", ("--dedup", "--min-length", "20", "--shuffle"), 170, "",
        lambda i, s: f">A0A{i:07d}_9BACT/12-{12 + len(s)} A0A{i:07d}.1 PF00001.27;7tm_1;\n{s}\n",
    ),
    "BFD": Recipe(
        "bfd*.fasta.zst", ("--workers", "2", "--dedup", "--shuffle"), 150, "",
        lambda i, s: f">SRR{i:09d}_1\n{s}\n",
    ),
    "OAS": Recipe(
        "oas*.csv.gz",
        ("--skip-lines", "1", "--column", "sequence_alignment_aa", "--workers", "2", "--dedup", "--shuffle"), 120,
        f'"{{""Run"": ""SRR1"", ""Chain"": ""Heavy""}}"\nsequence,{_FILLER},sequence_alignment_aa\n',
        lambda i, s: f"{'ACGT' * 90},{_FILLER}{i},{s}\n",
    ),
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--input", required=True, metavar="FASTA", help="proteins: plain or compressed FASTA")
    add_size(parser, "--megabytes", count, Size(1000, 16), "decompressed text of each stand-in, MB")


def require_peer() -> None:
    """This subject compares with nothing."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Make each stand-in and preprocess it, telling `say` of each.

    Scratch files, up to five bytes for every byte of `options.megabytes`, go to the folder for temporary files
    (TMPDIR).
    """
    proteins = list(_sequences(options.input))
    if not proteins:
        raise UserError(f"--input {options.input}: no sequence in it; give a FASTA file of proteins")
    found = {}
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory(prefix="benchmark-recipes-") as scratch:
            folder = Path(scratch)
            text_bytes, compressed = _stand_in(recipe, proteins, folder, options.megabytes * 10**6)
            flags = [str(folder / flag) if flag == "clusters.tsv" else flag for flag in recipe.flags]
            (folder / "out").mkdir()
            arguments = [
                "preprocess",
                "--input",
                folder / recipe.pattern,
                "--output-prefix",
                folder / "out/set",
                *flags,
            ]
            with _DiskUse(folder / "out") as disk:
                figures = run_side(_MODULE, arguments, cores=2)
            dataset = sum(path.stat().st_size for path in (folder / "out").iterdir())
            found[name] = {
                **figures,
                "text_bytes": text_bytes,
                "compressed_bytes": compressed,
                "dataset_bytes": dataset,
                "peak_disk": max(disk.peak, dataset),
                "flags": list(recipe.flags),
            }
        say(f"{name}: {text_bytes / 1e6 / figures['seconds']:,.0f} MB of text a second")
    return {"recipes": found}


def missed(_: dict[str, Any]) -> list[str]:
    """There are no bars."""
    return []


def table(result: dict[str, Any]) -> str:
    """The result for people: for each GB of decompressed text."""
    lines = [
        f"{'for each GB of text':<32}{'compressed':>12}{'time':>8}{'memory':>10}{'dataset':>10}{'peak disk':>11}",
    ]
    for name, figures in result["recipes"].items():
        scale = 1e9 / figures["text_bytes"]
        memory = "unknown" if figures["peak_memory"] is None else f"{figures['peak_memory'] / 1e6:.0f} MB"
        sizes = [f"{figures[key] * scale / 1e9:.2f} GB" for key in ("compressed_bytes", "dataset_bytes", "peak_disk")]
        seconds = f"{figures['seconds'] * scale:.1f} s"
        lines.append(f"{name:<32}{sizes[0]:>12}{seconds:>8}{memory:>10}{sizes[1]:>10}{sizes[2]:>11}")
    machine = result["machine"]
    lines.append(f"{machine['processor']}, {machine['cores']} cores, {machine['versions']}")
    return "\n".join(lines)


def _stand_in(recipe: Recipe, proteins: Sequence[str], folder: Path, num_bytes: int) -> tuple[int, int]:
    """Write the files; returns their bytes of text and, compressed, on the disk."""
    names = [recipe.pattern.replace("*", str(i)) for i in range(_NUM_FILES if "*" in recipe.pattern else 1)]
    text_bytes = 0
    with ExitStack() as stack:
        files = [stack.enter_context(_compressed(folder / name)) for name in names]
        clusters = stack.enter_context((folder / "clusters.tsv").open("w", encoding="ascii"))
        for file in files:
            text_bytes += file.write(recipe.head.encode())
        # Round by round they end in other letters: the proteins differ, their lengths stay.
        rounds = ((number, protein) for number in itertools.count() for protein in proteins)
        for index, (number, protein) in enumerate(rounds):
            if text_bytes >= num_bytes:
                break
            end = _LETTERS[number // 20 % 20] + _LETTERS[number % 20]
            sequence = protein[: recipe.length][:-2] + end
            text = recipe.record(index, sequence)
            text_bytes += files[index % len(files)].write(text.encode())
            if "--clusters" in recipe.flags:
                first = index - index % _CLUSTER_SIZE
                clusters.write(f"UniRef50_A0A{first:07d}\tUniRef90_A0A{index:07d}\n")
    return text_bytes, sum((folder / name).stat().st_size for name in names)


def _compressed(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "wb", compresslevel=6)  # type: ignore[return-value]
    try:
        import zstandard
    except ImportError:
        raise UserError("this benchmark writes .zst files: run `pip install 'megatron-plm[zst]'`") from None
    return zstandard.open(path, "wb")


def _sequences(fasta: str) -> Iterator[str]:
    lines: list[str] = []
    for line in b"".join(BlockReader(fasta)).decode("latin-1").splitlines():
        if not line.startswith(">"):
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


class _DiskUse:
    """The most that the free space of a folder's file system went down by: files without a name are in no folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free_before = 0
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_DiskUse":
        self._free_before = self._free()
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            self.peak = max(self.peak, self._free_before - self._free())

    def _free(self) -> int:
        status = os.statvfs(self._folder)
        return status.f_bfree * status.f_frsize
