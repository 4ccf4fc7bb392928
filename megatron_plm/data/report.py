"""What the preprocessing commands print when they have finished."""

from collections.abc import Iterator, Sequence

from megatron_plm.data.pipeline import Summary, Written
from megatron_plm.data.rearrange import Selection
from megatron_plm.files import encodable
from megatron_plm.tokenizers import Tokenizer

_WIDTH = 17


def print_lines(lines: Iterator[tuple[str, str]]) -> None:
    """Print what each line is about, and what it says, in two columns."""
    for name, text in lines:
        print(f"{name:<{_WIDTH}}{text}")


def dataset_lines(datasets: Sequence[Written], tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """What the datasets hold."""
    word = "residues" if tokenizer.one_letter_a_token else "tokens"
    if len(datasets) == 1:
        (dataset,) = datasets
        yield "sequences", f"{dataset.num_sequences:,}"
        yield word, f"{dataset.num_residues:,}"
        yield "lengths", _lengths(dataset)
        return
    for dataset in datasets:
        held = f"{dataset.num_sequences:,} sequences, {dataset.num_residues:,} {word}, lengths {_lengths(dataset)}"
        yield dataset.split or "", held


def selection_lines(summary: Summary, selection: Selection) -> Iterator[tuple[str, str]]:
    """What was left out, and how the rest was arranged; nothing where nothing was asked for."""
    counts = summary.counts
    left_out = [
        *([f"{counts.num_shorter:,} shorter than {selection.min_length:,}"] if selection.min_length else []),
        *([f"{counts.num_longer:,} longer than {selection.max_length:,}"] if selection.max_length else []),
        *([f"{counts.num_duplicates:,} repeated"] if selection.dedup else []),
    ]
    if left_out:
        yield "left out", f"{', '.join(left_out)}, of {counts.num_read:,} sequences"
    if selection.clusters is not None and counts.clusters is not None:
        missing = f"{counts.clusters.num_members_missing:,} of {counts.clusters.num_members:,} members"
        yield (
            "clusters",
            f"{counts.clusters.num_clusters:,}; {missing} in {encodable(selection.clusters)} are not in the input",
        )
    if selection.splits is not None:
        by = "letters" if selection.clusters is None else "cluster"
        shares = ", ".join(f"{name} {fraction}" for name, fraction in selection.splits.fractions.items())
        yield "split", f"by {by}: {shares}"
    if selection.shuffle_seed is not None:
        yield "shuffled", f"with seed {selection.shuffle_seed}"


def input_lines(summary: Summary, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """What was read, and how fast."""
    unknown = "none"
    if summary.unknown_letters:
        count = sum(summary.unknown_letters.values())
        letters = ", ".join(f"{letter} {n:,}" for letter, n in summary.unknown_letters.items())
        share = f"{100 * count / summary.num_letters:.2g} %"
        unknown = f"{count:,} ({share}), written as {tokenizer.tokens[tokenizer.unk_id]}: {letters}"
    yield "unknown letters", unknown
    if summary.num_stops:
        yield "final stops", f"{summary.num_stops:,} sequences ended in *, which is dropped"
    megabytes = summary.num_bytes / 1e6
    yield "time", f"{summary.seconds:.2f} s, {megabytes / summary.seconds:,.0f} MB/s of {megabytes:,.1f} MB of text"


def file_lines(datasets: Sequence[Written]) -> Iterator[tuple[str, str]]:
    """The files that were written."""
    for number, dataset in enumerate(datasets):
        paths = dataset.paths
        yield "" if number else "wrote", f"{paths.bin}, {paths.idx}, {paths.json}"


def _lengths(dataset: Written) -> str:
    return f"{dataset.min_length:,} to {dataset.max_length:,}, mean {dataset.mean_length:,.1f}"
