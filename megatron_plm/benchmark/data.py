"""Preprocessing against megatron-core's IndexedDatasetBuilder, and the loader on one thread.

Sides, in turn in every round, each in a process of its own: tools/preprocess_data.py with one worker, kept to one
core, and with two; the builder with `add_document` and with `add_item`, each behind a Python dict as tokenizer, on one
core and on the beginning of the same file (their speed doesn't depend on the size); the loader on one core at two row
lengths, on what one worker wrote. Two workers may be as fast as the disk: one more side writes as many bytes as they
do, and nothing else; its speed is told in MB of FASTA as well. The input is repeated to the size asked for and read
from a warm cache; MB are 10^6 bytes of FASTA.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_plm.benchmark.checks import Checks, check, check_lines, missed_checks
from megatron_plm.benchmark.flags import Size, add_size, count, seconds
from megatron_plm.benchmark.processes import run_side
from megatron_plm.data.formats import BlockReader
from megatron_plm.data.indexed import dataset_paths
from megatron_plm.data.output_folder import remove
from megatron_plm.errors import UserError

SEQ_LENGTHS = (1024, 2176)
_MODULE = "megatron_plm.benchmark.data_side"
_PEERS = ("add_document", "add_item")
_OURS = ("one_worker", "two_workers", "disk")
_PREPROCESSING = (*_OURS, *_PEERS)

# check: (what it is, bar, whether the value must be at least that; else at most)
BARS = {
    "one_worker": ("preprocessing on one core, MB/s", 200, True),
    "against_peer": ("one core against the faster builder", 15, True),
    "second_worker": ("two workers against one", 1.7, True),
    "peak_memory": ("anonymous memory of preprocessing, MB", 300, False),
    **{f"loader_{n}": (f"loader, rows of {n:,}, million tokens/s", 5, True) for n in SEQ_LENGTHS},
    **{f"fill_{n}": (f"fill of rows of {n:,}, %", 98, True) for n in SEQ_LENGTHS},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--input", required=True, metavar="FASTA", help="proteins: plain or compressed FASTA")
    add_size(parser, "--megabytes", count, Size(1024, 32), "the input is repeated to at least so many MB")
    add_size(parser, "--peer-megabytes", count, Size(64, 4), "of which the builder gets the first so many")
    text = "measure without megatron-core's builder, for machines where that isn't installed"
    parser.add_argument("--no-peer", action="store_true", help=text)
    add_size(parser, "--rounds", count, Size(3, 2), "rounds; each measures every side once, in turn")
    add_size(parser, "--seconds", seconds, Size(5.0, 1.0), "time of the loader at each row length in one round")


def require_peer() -> None:
    """Whether the peer is needed is for --no-peer to say: `measure` looks for it."""


def _require_peer() -> None:
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        raise UserError(
            "the benchmark's peer needs megatron-core; install it with: pip install --no-deps megatron-core==0.16.1"
        )


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all sides in turn for `options.rounds` rounds, telling `say` of each.

    Scratch files, about 3.5 bytes for every byte of `options.megabytes`, go to the folder for temporary files (TMPDIR).
    """
    if not options.no_peer:
        _require_peer()
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as name:
        folder = Path(name)
        num_bytes = repeat_fasta(options.input, folder / "all.fasta", options.megabytes * 10**6)
        peer_bytes = copy_records(folder / "all.fasta", folder / "peer.fasta", options.peer_megabytes * 10**6)
        say(f"input repeated to {num_bytes / 1e6:,.0f} MB; the builder reads the first {peer_bytes / 1e6:,.0f} MB")
        one, two, disk, peer = (folder / part for part in ("one", "two", "disk", "peer"))
        sides: dict[str, tuple[int, Sequence[object]]] = {
            "one_worker": (1, ["ours", folder / "all.fasta", one, 1]),
            "two_workers": (2, ["ours", folder / "all.fasta", two, 2]),
            "disk": (2, ["disk", f"{one}.bin", disk]),
            "add_document": (1, ["add_document", folder / "peer.fasta", peer]),
            "add_item": (1, ["add_item", folder / "peer.fasta", peer]),
            **{f"loader_{n}": (1, ["loader", one, n, options.seconds]) for n in SEQ_LENGTHS},
        }
        if options.no_peer:
            sides = {side: each for side, each in sides.items() if side not in _PEERS}
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(1, options.rounds + 1):
            rounds.append({})
            for side, (cores, arguments) in sides.items():
                if arguments[0] == "loader":  # datasets are written past the page cache, and read from a warm one
                    _read_through(Path(f"{one}.bin"))
                if side in _OURS:  # a new dataset: to free the disk of an old one takes time too
                    remove(dataset_paths(str(arguments[2])))
                found = rounds[-1][side] = run_side(_MODULE, arguments, cores=cores)
                if side in _PREPROCESSING:
                    size = num_bytes if side in _OURS else peer_bytes
                    found["megabytes_per_second"] = size / 1e6 / found["seconds"]
            shown = ", ".join(f"{side} {_shown(found)}" for side, found in rounds[-1].items())
            say(f"round {number} of {options.rounds}: {shown}")
        same = _sums(one) == _sums(two)
    return {
        "bytes": {"ours": num_bytes, "peer": peer_bytes},
        "rounds": rounds,
        "two_workers_write_the_same": same,
        "checks": _checks(rounds),
    }


def missed(result: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    missed = missed_checks(result)
    return missed if result["two_workers_write_the_same"] else [*missed, "two_workers_write_the_same"]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    rounds, sizes = result["rounds"], result["bytes"]
    lines = [f"{'':<42}{'median':>10}{'min':>10}{'max':>10}"]
    for side, label in _LABELS.items():
        if side not in rounds[0]:
            continue
        key = "megabytes_per_second" if side in _PREPROCESSING else "tokens_per_second"
        values = [found[side][key] / (1 if side in _PREPROCESSING else 1e6) for found in rounds]
        lines.append(f"{label:<42}{statistics.median(values):>10.1f}{min(values):>10.1f}{max(values):>10.1f}")
    for n in SEQ_LENGTHS:
        values = [found[f"loader_{n}"]["first_batch_seconds"] for found in rounds]
        lines.append(
            f"{f'open and first batch, rows of {n:,}, s':<42}"
            f"{statistics.median(values):>10.3f}{min(values):>10.3f}{max(values):>10.3f}"
        )
    lines += ["", *check_lines(result["checks"])]
    if not result["two_workers_write_the_same"]:
        lines.append("MISSED: one worker and two wrote different files")
    lines.append(
        f"{sizes['ours'] / 1e6:,.0f} MB of FASTA; the builder on the first {sizes['peer'] / 1e6:,.0f} MB of it"
    )
    machine = result["machine"]
    lines.append(f"{machine['processor']}, {machine['cores']} cores, {machine['versions']}")
    return "\n".join(lines)


_LABELS = {
    "one_worker": "preprocess_data, 1 worker, MB/s",
    "two_workers": "preprocess_data, 2 workers, MB/s",
    "disk": "the disk, MB/s of FASTA",
    "add_document": "megatron-core, add_document, MB/s",
    "add_item": "megatron-core, add_item, MB/s",
    **{f"loader_{n}": f"loader, rows of {n:,}, million tokens/s" for n in SEQ_LENGTHS},
}


def repeat_fasta(source: str, path: Path, num_bytes: int) -> int:
    """Write the text of a FASTA file to `path`, again and again, to at least `num_bytes`; returns their number."""
    with path.open("wb") as file:
        while file.tell() < num_bytes:
            last = b""
            for block in BlockReader(source):
                file.write(block)
                last = block[-1:] or last
            if last != b"\n":
                file.write(b"\n")
        return file.tell()


def copy_records(source: Path, path: Path, num_bytes: int) -> int:
    """Copy whole records from the beginning of a FASTA file until `num_bytes` are reached; returns their number."""
    with source.open("rb") as text, path.open("wb") as file:
        for line in text:
            if line.startswith(b">") and file.tell() >= num_bytes:
                break
            file.write(line)
        return file.tell()


def _checks(rounds: Sequence[dict[str, dict[str, Any]]]) -> Checks:
    """Value and bar of each of `BARS`: medians over the rounds, of ratios round by round; of memory the maximum."""

    def speed(found: dict[str, dict[str, Any]], side: str) -> float:
        return found[side]["megabytes_per_second"]

    def median(value: Callable[[dict[str, dict[str, Any]]], float]) -> float:
        return statistics.median(map(value, rounds))

    peaks = [found[side]["peak_memory"] for found in rounds for side in ("one_worker", "two_workers")]
    values: dict[str, float | None] = {
        "one_worker": median(lambda found: speed(found, "one_worker")),
        "second_worker": median(lambda found: speed(found, "two_workers") / speed(found, "one_worker")),
        "peak_memory": None if None in peaks else max(peaks) / 1e6,
    }
    if "add_document" in rounds[0]:
        values["against_peer"] = median(
            lambda found: speed(found, "one_worker") / max(speed(found, side) for side in _PEERS)
        )
    for n in SEQ_LENGTHS:
        side = f"loader_{n}"
        values[side] = statistics.median(found[side]["tokens_per_second"] / 1e6 for found in rounds)
        values[f"fill_{n}"] = 100 * statistics.median(found[side]["fill"] for found in rounds)
    return {
        name: check(what, values[name], bar, at_least=at_least)
        for name, (what, bar, at_least) in BARS.items()
        if name in values
    }


def _read_through(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def _shown(found: dict[str, Any]) -> str:
    if "megabytes_per_second" in found:
        return f"{found['megabytes_per_second']:,.1f} MB/s"
    return f"{found['tokens_per_second'] / 1e6:,.1f} M tokens/s"


def _sums(prefix: Path) -> dict[str, str]:
    return json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["sha256"]
