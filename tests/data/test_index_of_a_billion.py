"""Opening an index of 10^9 sequences and building its first batch, in seconds and little memory.

The files are sparse: 20 GB of index and 126 GB of tokens by their size. Values are written, and disk is taken, only
where the first window of the epoch's order looks, which the order tells before: there they are those of a whole dataset
of proteins of 76 to 176 residues. Everywhere else are holes, which a loader that looks there would find out: a length
of 0 is none of these.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import environment

from megatron_plm.config.options import DataOptions
from megatron_plm.data.indexed import HEADER, MAGIC, VERSION, IndexedDataset, dataset_paths
from megatron_plm.data.masking import Masking
from megatron_plm.data.packing import RowStream
from megatron_plm.tokenizers import get_tokenizer

NUM = 10**9
CYCLE = 76 + np.arange(101)  # lengths repeat, so that a pointer is computed from its index alone
SEED = 1

FIRST_BATCH = """
import json, sys, threading, time
import torch
from megatron_plm.config.options import DataOptions
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.loader import Loader
from megatron_plm.tokenizers import get_tokenizer

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], memory())
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
dataset = IndexedDataset(sys.argv[1])
opened = time.perf_counter() - start
loader = Loader([dataset], [1.0], DataOptions(**json.loads(sys.argv[2])), get_tokenizer("esm2"), micro_batch_size=4,
                global_batch_size=8, seed=int(sys.argv[3]), name="train")
step = next(loader.steps(loader.start()))
seconds = time.perf_counter() - start
done.set()
thread.join()
batch = step.micro_batches[0]
print(json.dumps({"opened": opened, "seconds": seconds, "memory": peak[0], "rows": batch.tokens.tolist(),
                  "segments": batch.segment_ids.tolist(), "tokens": batch.num_tokens}))
"""


def length_of(index: np.ndarray) -> np.ndarray:
    return CYCLE[index % len(CYCLE)]


def pointer_of(index: np.ndarray) -> np.ndarray:
    before = np.concatenate([[0], np.cumsum(CYCLE)])
    return index // len(CYCLE) * before[-1] + before[index % len(CYCLE)]


def write(prefix: Path, indices: np.ndarray) -> None:
    """A dataset of NUM sequences with values at `indices`, at the first and at the last."""
    paths = dataset_paths(prefix)
    num_bytes = int(pointer_of(np.array(NUM)))
    paths.bin.touch()
    paths.idx.touch()
    letters = get_tokenizer("esm2").standard_ids
    with paths.idx.open("r+b") as idx, paths.bin.open("r+b") as tokens:
        idx.truncate(HEADER.size + 12 * NUM + 8 * (NUM + 1))
        tokens.truncate(num_bytes)
        idx.write(HEADER.pack(MAGIC, VERSION, 1, NUM, NUM + 1))
        for index in [0, *indices.tolist(), NUM - 1]:
            length, pointer = int(length_of(np.array(index))), int(pointer_of(np.array(index)))
            for place, value in [(4 * index, np.int32(length)), (4 * NUM + 8 * index, np.int64(pointer))]:
                idx.seek(HEADER.size + place)
                idx.write(value.tobytes())
            tokens.seek(pointer)
            tokens.write(np.full(length, letters[index % 20]).tobytes())
        idx.seek(HEADER.size + 12 * NUM + 8 * NUM)
        idx.write(np.int64(NUM).tobytes())
    tokenizer = {"name": "esm2", "sha256": get_tokenizer("esm2").sha256}
    description = {"format": "megatron-plm-dataset", "version": 1, "tokenizer": tokenizer}
    paths.json.write_text(json.dumps({**description, "num_sequences": NUM, "num_residues": num_bytes}))


@pytest.mark.parametrize("shuffle_block_size", [0, 256])
def test_the_first_batch_comes_in_seconds_and_little_memory(shuffle_block_size: int, tmp_path: Path) -> None:
    options = {"seq_length": 1024, "num_workers": 0, "mask_token_share": 0.0, "mask_random_share": 0.0}
    options["shuffle_block_size"] = shuffle_block_size
    prefix = tmp_path / "p"
    try:
        write(prefix, np.empty(0, dtype=np.int64))
    except OSError as error:
        pytest.skip(f"the file system cannot hold sparse files of this size: {error}")
    data_options = DataOptions(**options)
    masking = Masking.from_options(data_options, "mlm")
    stream = RowStream(IndexedDataset(prefix), data_options, masking, seed=SEED, name="train")
    window = np.unique(np.concatenate([row.sequence for row in stream.window_rows(0, 0)]))
    assert len(window) == data_options.packing_window
    assert window.max() > NUM // 2
    write(prefix, window)
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, prefix, json.dumps(options), str(SEED)],
        capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["opened"] < 1
    assert found["seconds"] < 10
    assert found["memory"] < 500e6
    # With nothing masked or replaced, every protein of the rows is one letter, as long as one of the window with it.
    known = {(int(letter), int(length)) for letter, length in zip(window % 20, length_of(window), strict=True)}
    letters = get_tokenizer("esm2").standard_ids.tolist()
    for row, segments in zip(found["rows"], found["segments"], strict=True):
        for number in range(1, max(segments) + 1):
            cls, *protein, eos = [token for token, segment in zip(row, segments, strict=True) if segment == number]
            assert (cls, eos) == (get_tokenizer("esm2").cls_id, get_tokenizer("esm2").eos_id)
            (letter,) = set(protein)
            assert (letters.index(letter), len(protein)) in known
    assert found["tokens"] > 3 * 1024
