"""Bad input to every command: one sentence, exit code 2, and everything on the disk is as it was."""

import gzip
import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from pretraining_runs import pretrain
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.cli import VERBS
from megatron_plm.errors import run_command

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"
LATEST = "run/checkpoints/latest"
JUNK = b"\x7fELF\x02\x01\x00\xff" * 50

# What works, in the folder that `good` makes; a case adds flags, and of two equal ones the last counts.
COMMANDS = {
    "preprocess-data": ["--input", "in.fasta", "--output-prefix", "out/p"],
    "pretrain": [
        "--num-layers=1", "--hidden-size=32", "--num-attention-heads=2", "--seq-length=64", "--micro-batch-size=1",
        "--global-batch-size=1", "--train-iters=2", "--lr-warmup-iters=1", "--data-path=data/train", "--save=out/run",
    ],
    "convert-checkpoint": ["--from", "native", "--to", "huggingface", "--input", "run", "--output", "out/hf"],
    "tape-train": [
        "transformer", "csv", "--from_pretrained", "run", "--data_dir", "peptides", "--sequence_column", "sequence",
        "--label_column", "label", "--kind", "classification", "--num_train_epochs", "1", "--output_dir", "out",
    ],
    "embed": ["--checkpoint", "run", "--input", "in.fasta", "--output", "out/embeddings.npz"],
    "score": [
        "variants", "--checkpoint", "run", "--wild-type", "one.fasta", "--variants", "variants.csv",
        "--output", "out/scores.csv",
    ],
    "report": ["--pretraining", "run", "--output", "out/report.html"],
}  # fmt: skip


def run(verb: str, *flags: str) -> int:
    argv = [*COMMANDS[verb], *flags]
    return pretrain(*argv) if verb == "pretrain" else run_command(importlib.import_module(VERBS[verb][0]).main, argv)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good input of every kind, and an empty folder `out`."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "in.fasta").write_bytes(b">P1 first\nMKTAYIAKQR\n>P2\nMKVAALAG\n")
    (folder / "one.fasta").write_bytes(b">P1 first\nMKTAYIAKQR\n")
    (folder / "variants.csv").write_bytes(b"mutant,DMS_score\nM1A,0.5\nK2R:T3S,0.1\n")
    for name in ("data", "peptides", "out"):
        (folder / name).mkdir()
    write_dataset(folder / "data" / "train", pair_proteins(40, seed=1))
    write_dataset(folder / "data" / "tape", pair_proteins(40, seed=1), tokenizer="tape-iupac")
    for split, end in {"train": "AL", "valid": "VI", "test": "FW"}.items():
        rows = [f"MKRKK{end * n},amp\nGGSGED{end * n},other\n" for n in range(1, 5)]
        (folder / "peptides" / f"{split}.csv").write_text("".join(["sequence,label\n", *rows]))
    shutil.copytree(EXAMPLES / "structures" / "secondary_structure", folder / "structures" / "secondary_structure")
    flags = [f"--data-path={folder / 'data' / 'train'}", f"--save={folder / 'run'}"]
    assert run("pretrain", *flags) == 0
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `good`, as the working directory."""
    shutil.copytree(good, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Every file, link and folder below `folder`, hidden ones too, with its bytes or its target."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.usefixtures("place")
def test_what_the_cases_spoil_works_unspoilt(verb: str) -> None:
    assert run(verb) == 0
    assert os.listdir("out")


# --- ways to spoil the input ---


Spoiling = Callable[[], object]


def nothing() -> None:
    """The flags are what is wrong."""


def put(name: str, content: bytes) -> Spoiling:
    return lambda: Path(name).write_bytes(content)


def truncated(name: str) -> Spoiling:
    """A tenth of a file: of a checkpoint, less than its weights, which stand before the optimizer's moments."""
    return lambda: os.truncate(name, os.path.getsize(name) // 10)


def gone(name: str) -> Spoiling:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def emptied(name: str) -> Spoiling:
    """A folder without anything in it."""

    def empty() -> None:
        shutil.rmtree(name)
        Path(name).mkdir()

    return empty


def edited(name: str, old: str, new: str) -> Spoiling:
    def edit() -> None:
        text = Path(name).read_text(encoding="utf-8")
        assert old in text
        Path(name).write_text(text.replace(old, new), encoding="utf-8")

    return edit


class Case(NamedTuple):
    verb: str
    what: str
    spoil: Spoiling
    flags: Sequence[str]
    words: Sequence[str]  # the sentence holds them all: where it is, what is wrong, the way out


def unwritable(verb: str, flag: str, name: str) -> list[Case]:
    """Places where root cannot write either: the kernel makes no folders in /proc, and a file holds none."""
    words = ["cannot", "folder"] if verb == "report" else []
    return [
        Case(verb, "output in /proc", nothing, [flag, f"/proc/megatron-plm{name}"], ["/proc", *words]),
        Case(verb, "output below a file", nothing, [flag, f"in.fasta{name}"], ["in.fasta", *words]),
    ]


GZIPPED = gzip.compress(b">P1\nMKTAYIAKQR\n" * 100)

CASES = [
    Case("preprocess-data", "missing", gone("in.fasta"), [], ["'in.fasta' does not exist"]),
    Case("preprocess-data", "empty", put("in.fasta", b""), [], ["'in.fasta' is empty"]),
    Case("preprocess-data", "binary junk", put("in.fasta", JUNK), [], ["'in.fasta', line 1: expected '>'", "0x7F"]),
    Case(
        "preprocess-data", "no sequence", put("in.fasta", b">P1\nMK\n>P2\n>P3\nMK\n"), [],
        ["'in.fasta', line 3: record 'P2' has no sequence"],
    ),
    Case(
        "preprocess-data", "truncated .gz", put("in.fasta.gz", GZIPPED[:-9]), ["--input", "in.fasta.gz"],
        ["'in.fasta.gz' is truncated: its gzip data stop"],
    ),
    *unwritable("preprocess-data", "--output-prefix", "/p"),
    Case("pretrain", "missing", gone("data"), [], ["data/train.idx' does not exist"]),
    Case("pretrain", "empty", put("data/train.idx", b""), [], ["data/train.idx' is no dataset index"]),
    Case("pretrain", "binary junk", put("data/train.idx", JUNK), [], ["data/train.idx' is no dataset index"]),
    Case("pretrain", "truncated", truncated("data/train.bin"), [], ["data/train.bin'", "make the dataset again"]),
    Case(
        "pretrain", "dataset of another tokenizer than the model's", nothing, ["--data-path=data/tape"],
        ["data/tape", "'tape-iupac'", "'esm2'", "--tokenizer"],
    ),
    Case(
        "pretrain", "validation of another tokenizer than the model's", nothing, ["--valid-data-path=data/tape"],
        ["data/tape", "'tape-iupac'", "'esm2'"],
    ),
    Case(
        "pretrain", "dataset of another tokenizer than the checkpoint's", nothing,
        ["--data-path=data/tape", "--tokenizer=tape-iupac", "--load=run"],
        ["--load", "checkpoint's tokenizer is 'esm2'", "'tape-iupac'"],
    ),
    Case(
        "pretrain", "misspelt key", put("run.toml", b"[model]\nhiden_size = 32\n"), ["--config=run.toml"],
        ["run.toml", "hiden_size", "did you mean 'hidden_size'?"],
    ),
    Case("pretrain", "misspelt flag", nothing, ["--hiden-size=32"], ["--hiden-size", "did you mean '--hidden-size'?"]),
    Case(
        "pretrain", "heads that do not divide the hidden size", nothing, ["--num-attention-heads=5"],
        ["--num-attention-heads", "5", "32"],
    ),
    Case("pretrain", "no checkpoint to load", nothing, ["--load=data"], ["data: no complete checkpoint"]),
    *unwritable("pretrain", "--save", "/run"),
    Case("convert-checkpoint", "missing", gone("run"), [], ["run: does not exist"]),
    Case("convert-checkpoint", "empty", emptied("run"), [], ["run: holds no checkpoint"]),
    Case("convert-checkpoint", "binary junk", put(f"{LATEST}/state.json", JUNK), [], ["state.json"]),
    Case(
        "convert-checkpoint", "truncated", truncated(f"{LATEST}/__0_0.distcp"), [],
        ["step_00000002: the checkpoint is damaged or incomplete"],
    ),
    Case(
        "convert-checkpoint", "misspelt key", edited(f"{LATEST}/config.toml", "hidden_size", "hiden_size"), [],
        ["config.toml", "hiden_size", "did you mean 'hidden_size'?"],
    ),
    *unwritable("convert-checkpoint", "--output", "/hf"),
    Case("tape-train", "missing", gone("peptides"), [], ["peptides: no such folder"]),
    Case(
        "tape-train", "split missing", gone("peptides/train.csv"), [],
        ["peptides holds no split 'train'; those that exist: test, valid"],
    ),
    Case("tape-train", "empty", put("peptides/train.csv", b""), [], ["train.csv: empty"]),
    Case("tape-train", "binary junk", put("peptides/train.csv", JUNK), [], ["train.csv: not UTF-8 text"]),
    Case(
        "tape-train", "no sequence", put("peptides/train.csv", b"sequence,label\nMK,amp\n,amp\nGS,other\n"), [],
        ["train.csv, line 3: the sequence is missing"],
    ),
    Case(
        "tape-train", "junk checkpoint", put(f"{LATEST}/.metadata", JUNK), [],
        ["step_00000002: the checkpoint is damaged or incomplete"],
    ),
    *unwritable("tape-train", "--output_dir", "/results"),
    Case("embed", "missing", gone("in.fasta"), [], ["'in.fasta' does not exist"]),
    Case("embed", "empty", put("in.fasta", b""), [], ["'in.fasta' is empty"]),
    Case("embed", "binary junk", put("in.fasta", JUNK), [], ["'in.fasta', line 1: expected '>'", "0x7F"]),
    Case(
        "embed", "no sequence", put("in.fasta", b">P1\nMK\n>Zo\xc3\xab\n>P3\nMK\n"), [],
        ["'in.fasta', line 3: record 'Zoë' has no sequence"],
    ),
    Case(
        "embed", "truncated .gz", put("in.fasta.gz", GZIPPED[:-9]), ["--input", "in.fasta.gz"],
        ["'in.fasta.gz' is truncated: its gzip data stop"],
    ),
    Case(
        "embed", "unknown letter where all must be known", put("in.fasta", b">P1\nMKJA\n"), ["--strict"],
        ["'in.fasta', line 2: unknown letter 'J' at position 3 of record 'P1'"],
    ),
    Case("embed", "names missing", put("a.csv", b"sequence\nMK\n"), ["--input", "a.csv"], ["'id'", "--name-column"]),
    Case("embed", "checkpoint missing", gone("run"), [], ["run", "does not exist"]),
    Case("embed", "checkpoint junk", put(f"{LATEST}/.metadata", JUNK), [], ["step_00000002", "damaged or incomplete"]),
    Case(
        "embed", "output exists", put("out/embeddings.npz", b"x"), [],
        ["out/embeddings.npz exists already", "--output", "--force"],
    ),
    Case("embed", "output is a folder", nothing, ["--output", "data", "--output-format", "npz"], ["data", "exists"]),
    Case(
        "embed", "a folder where a file is to be replaced", nothing,
        ["--output", "data", "--output-format", "npz", "--force"], ["data", "no output of this command"],
    ),
    Case("embed", "unknown ending", nothing, ["--output", "out/x.txt"], ["out/x.txt", ".npz", "--output-format"]),
    Case("embed", "misspelt flag", nothing, ["--layer", "1"], ["--layer", "did you mean '--layers'?"]),
    Case("embed", "no such layer", nothing, ["--layers", "2"], ["--layers 2", "1 blocks", "0 to 1"]),
    Case("embed", "negative layer", nothing, ["--layers", "-3"], ["--layers -3", "1 blocks"]),
    Case("embed", "no residues in a window", nothing, ["--max-length", "2"], ["--max-length", "<cls>", "2"]),
    Case("embed", "window that does not move", nothing, ["--overlap", "4096"], ["--overlap", "0 to 4095", "4096"]),
    Case("embed", "row too short", nothing, ["--batch-tokens", "64"], ["--batch-tokens 64", "4096", "--max-length"]),
    *unwritable("embed", "--output", "/embeddings.npz"),
    Case("score", "missing", gone("variants.csv"), [], ["variants.csv", "No such file"]),
    Case("score", "empty", put("variants.csv", b""), [], ["variants.csv: empty", "'mutant'"]),
    Case("score", "binary junk", put("variants.csv", JUNK), [], ["variants.csv: not UTF-8 text"]),
    Case("score", "no variant", put("variants.csv", b"mutant\nM1\n"), [], ["variants.csv, line 2", "A42G"]),
    Case(
        "score", "another wild type", put("variants.csv", b"mutant\nM1A\nA2G\n"), [],
        ["variants.csv, line 3: A2G", "P1, has K at position 2, not A", "--first-position"],
    ),
    Case("score", "wild type missing", gone("one.fasta"), [], ["'one.fasta' does not exist"]),
    Case("score", "several wild types", nothing, ["--wild-type", "in.fasta"], ["in.fasta holds several proteins"]),
    Case("score", "checkpoint missing", gone("run"), [], ["run", "does not exist"]),
    Case("score", "output exists", put("out/scores.csv", b"x"), [], ["out/scores.csv exists already", "--force"]),
    *unwritable("score", "--output", "/scores.csv"),
    Case("report", "missing", gone("run"), [], ["--pretraining run is not a directory"]),
    Case("report", "empty", put("run/metrics.jsonl", b""), [], ["metrics.jsonl: "]),
    Case("report", "binary junk", put("run/metrics.jsonl", JUNK), [], ["metrics.jsonl: "]),
    Case("report", "truncated", put("run/metrics.jsonl", b'{"kind": "start", "comm'), [], ["metrics.jsonl"]),
    *unwritable("report", "--output", "/report.html"),
]  # fmt: skip


def assert_refused(
    capsys: pytest.CaptureFixture[str], place: Path, words: Sequence[str], work: Callable[[], int]
) -> None:
    before = contents(place)
    capsys.readouterr()
    code, printed = work(), capsys.readouterr()
    assert code == 2, printed
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1, printed.err
    for word in words:
        assert word in printed.err
    assert contents(place) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.verb}: {case.what}")
def test_bad_input_is_one_sentence_and_leaves_nothing(
    case: Case, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.spoil()
    assert_refused(capsys, place, case.words, lambda: run(case.verb, *case.flags))


def test_a_truncated_gz_of_labelled_data_is_one_sentence_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated("structures/secondary_structure/secondary_structure_train.jsonl.gz")()
    argv = ["onehot", "secondary_structure", "--data_dir", "structures", "--output_dir", "out"]
    words = ["secondary_structure_train.jsonl.gz: the gzip data is damaged or cut off"]
    main = importlib.import_module(VERBS["tape-train"][0]).main
    assert_refused(capsys, place, words, lambda: run_command(main, argv))
