"""What the tests of the readers share: small files of every format, and the scanners run on text in memory."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zstandard

from megatron_plm.data import _native
from megatron_plm.data.readers import SequenceReader, blocks, open_inputs
from megatron_plm.tokenizers import get_tokenizer

ESM2 = get_tokenizer("esm2")
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZOJlagv*-.1|"

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
SEQUENCES = ["MKTAYIAKQRQISF", "MKVLAG", "ACDEFGHIKLMNPQRSTVWY"]
NAMES = ["P1", "P2", "P3"]
_ROWS = list(zip(NAMES, SEQUENCES, strict=True))
TEXTS = {
    "fasta": "".join(f">{name} some\n{sequence[:5]}\n{sequence[5:]}\n" for name, sequence in _ROWS),
    "jsonl": "".join(json.dumps({"id": name, "sequence": sequence}) + "\n" for name, sequence in _ROWS),
    "csv": "id,sequence\n" + "".join(f"{name},{sequence}\n" for name, sequence in _ROWS),
    "tsv": "id\tsequence\n" + "".join(f"{name}\t{sequence}\n" for name, sequence in _ROWS),
    "text": "".join(sequence + "\n" for sequence in SEQUENCES),
}
EXTENSIONS = {"text": "txt"}


def read(*patterns: object, reader: SequenceReader | None = None, **options: Any) -> list[str]:
    sequences = []
    for batch in (reader or SequenceReader(ESM2)).read(open_inputs([str(pattern) for pattern in patterns], **options)):
        assert batch.tokens.dtype == np.uint8
        assert batch.lengths.dtype == np.int32
        assert batch.lengths.sum() == len(batch.tokens)
        assert len(batch.lengths)
        parts = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
        sequences += [ESM2.decode(part) for part in parts]
    return sequences


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


class InMemory:
    """What blocks_of_records needs of a BlockReader."""

    label = "input"

    def __init__(self, text: bytes) -> None:
        self._left = text

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


@dataclass
class Result:
    """What all blocks held; `fault` is (newlines before it, message)."""

    sequences: list[bytes] = field(default_factory=list)
    names: list[list[int]] = field(default_factory=list)
    byte_counts: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.uint64))
    num_stops: int = 0
    fault: tuple[int, str] | None = None


def cut(text: bytes, block_size: int, find_end: blocks.FindEnd) -> list[memoryview]:
    with mock.patch.object(blocks, "BLOCK_SIZE", block_size):
        return list(blocks.blocks_of_records(InMemory(text), find_end, 1 << 28, "too long"))  # type: ignore[arg-type]


def scan_blocks(pieces: Sequence[Any], scan: Callable[..., Any], *, strict: bool = False) -> Result:
    """Scan blocks from the last to the first, as threads may, and join what they hold."""
    alphabet = _native.Alphabet(ESM2.lookup_table(fold_case=True), ESM2.unk_id, strict)
    scanned = []
    for piece in reversed(pieces):
        out = np.full(len(piece) + 8, 255, dtype=np.uint8)
        block = scan(alphabet, piece, out=out)
        assert out[len(piece) :].tolist() == [255] * 8, "wrote past the block's size"
        scanned.append((block, out[: block.num_tokens].tobytes()))
    result = Result()
    num_lines = 0
    for block, tokens in reversed(scanned):
        if block.fault is not None:
            result.fault = (num_lines + block.fault[0], block.fault[1])
            return result
        num_lines += block.num_lines
        ends = np.cumsum(block.lengths)
        assert (ends[-1] if len(ends) else 0) == len(tokens)
        result.sequences += [tokens[end - n : end] for end, n in zip(ends, block.lengths, strict=True)]
        result.names += block.names.tolist()
        result.byte_counts += block.byte_counts
        result.num_stops += block.num_stops
    return result


def encode(sequences: Sequence[bytes]) -> list[bytes]:
    """Token ids by Tokenizer.encode, of sequences that may end in a stop."""
    return [ESM2.encode(sequence.removesuffix(b"*").decode()).tobytes() for sequence in sequences]


def hash_of(name: bytes) -> list[int]:
    return _native.hash_names(name, np.array([0, len(name)], dtype=np.int64))[0].tolist()
