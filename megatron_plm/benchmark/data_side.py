"""One side of the data benchmark, in a process of its own: `python -m megatron_plm.benchmark.data_side SIDE …`.

The last line of its output is a JSON object. Imports come before the clock starts; whoever starts this process chooses
its cores and watches its memory.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_plm.errors import run_command
from megatron_plm.tokenizers import get_tokenizer

_ROWS = 16  # of a global batch of the loader


class _Clock:
    """Time, and time of processors, since it was made."""

    def __init__(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), _cpu_seconds()

    def read(self) -> dict[str, float]:
        """Both, in seconds."""
        return {"seconds": time.perf_counter() - self._start, "cpu_seconds": _cpu_seconds() - self._cpu_start}


def ours(fasta: str, prefix: str, workers: str) -> dict[str, Any]:
    """tools/preprocess_data.py on a FASTA file."""
    return preprocess(
        "--input", fasta, "--output-prefix", prefix, "--tokenizer", "esm2", "--workers", workers, "--force"
    )


def preprocess(*flags: str) -> dict[str, Any]:
    """tools/preprocess_data.py with any flags."""
    from megatron_plm.data.preprocess import main

    clock = _Clock()
    main(flags)
    return clock.read()


def disk(tokens: str, prefix: str) -> dict[str, Any]:
    """As many bytes as the file of tokens has, by the writer of datasets, from memory that is there already."""
    from megatron_plm.data.streamed_file import StreamedFile

    block = bytearray(b"\x05") * (1 << 23)
    left = Path(tokens).stat().st_size
    clock = _Clock()
    file = StreamedFile(Path(f"{prefix}.bin"))
    try:
        while left:
            count = min(left, len(block))
            file.write(memoryview(block)[:count])
            left -= count
        file.finish()
    finally:
        file.close()
    return clock.read()


def add_document(fasta: str, prefix: str) -> dict[str, Any]:
    """megatron-core's builder, a document a protein."""

    def add(builder: Any, tokens: list[int]) -> None:
        builder.add_document(tokens, [len(tokens)])

    return _peer(fasta, prefix, add)


def add_item(fasta: str, prefix: str) -> dict[str, Any]:
    """megatron-core's builder, an item and an end of the document a protein."""
    import torch

    def add(builder: Any, tokens: list[int]) -> None:
        builder.add_item(torch.tensor(tokens))
        builder.end_document()

    return _peer(fasta, prefix, add)


class _Vocabulary(dict[str, int]):
    """Token ids by letter; letters that it lacks are unknown."""

    def __missing__(self, letter: str) -> int:
        return get_tokenizer("esm2").unk_id


def _peer(fasta: str, prefix: str, add: Callable[[Any, list[int]], None]) -> dict[str, Any]:
    with contextlib.redirect_stdout(sys.stderr):
        import numpy as np

        builder_class = import_module("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder

    tokenizer = get_tokenizer("esm2")
    vocabulary = _Vocabulary({letter: i for i, letter in enumerate(tokenizer.tokens) if len(letter) == 1})
    token_of = vocabulary.__getitem__
    clock = _Clock()
    builder = builder_class(f"{prefix}.bin", dtype=np.uint8)
    for sequence in _sequences(fasta):
        add(builder, list(map(token_of, sequence.upper())))
    builder.finalize(f"{prefix}.idx")
    return clock.read()


def _sequences(fasta: str) -> Iterator[str]:
    lines: list[str] = []
    with Path(fasta).open(encoding="ascii") as file:
        for line in file:
            if line[0] != ">":
                lines.append(line.rstrip())
            elif lines:
                yield "".join(lines)
                lines = []
    yield "".join(lines)


def loader(prefix: str, seq_length: str, seconds: str) -> dict[str, Any]:
    """Packed and masked batches on this thread: opening and the first batch, then tokens a second and fill."""
    from megatron_plm.config.options import DataOptions
    from megatron_plm.data.indexed import IndexedDataset
    from megatron_plm.data.loader import Loader

    begin = time.perf_counter()
    batches = Loader(
        [IndexedDataset(prefix)],
        [1.0],
        DataOptions(seq_length=int(seq_length), num_workers=0),
        get_tokenizer("esm2"),
        micro_batch_size=_ROWS,
        global_batch_size=_ROWS,
        seed=1,
        name="train",
    )
    steps = batches.steps(batches.start())
    next(steps)
    start = time.perf_counter()
    tokens = places = 0
    while (elapsed := time.perf_counter() - start) < float(seconds):
        for batch in next(steps).micro_batches:
            tokens += batch.num_tokens
            places += batch.tokens.numel()
    return {"first_batch_seconds": start - begin, "tokens_per_second": tokens / elapsed, "fill": tokens / places}


def _cpu_seconds() -> float:
    """User and system time of this process and of the children it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    side.__name__: side for side in (ours, preprocess, disk, add_document, add_item, loader)
}


def _main(argv: list[str]) -> None:
    print(json.dumps(SIDES[argv[0]](*argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: _main(list(argv))))
