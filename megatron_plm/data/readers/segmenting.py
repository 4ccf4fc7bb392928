"""From letters to pieces: what follows the scan of a block where the tokenizer's tokens are several letters."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from megatron_plm.data.readers.scans import Job, Scanned
from megatron_plm.tokenizers import PieceTokenizer


def segmented(jobs: Iterator[Job], tokenizer: PieceTokenizer) -> Iterator[Job]:
    """Yield the jobs with scans that end in pieces: the thread that scans a block also cuts its proteins."""
    for job in jobs:
        yield replace(job, scan=partial(_scan, job.scan, tokenizer))


def _scan(scan: Callable[[], Scanned], tokenizer: PieceTokenizer) -> Scanned:
    scanned = scan()
    # What stands before a fault is of no use, and may end inside a record.
    if scanned.fault is not None:
        return scanned
    tokens, lengths = tokenizer.segment(scanned.tokens, scanned.lengths)
    return replace(scanned, tokens=tokens, lengths=lengths)
