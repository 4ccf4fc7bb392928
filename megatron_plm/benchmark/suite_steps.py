"""The steps of the suites: what `make bench` and `make bench-gpu` run, each with the time that it may take.

Each step is a program of its own: one that fails or hangs loses no other. With `quick` all sizes are the smallest, so
that a test can run the same steps.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_EXAMPLES = REPOSITORY / "examples/data"
_NEEDS_GPU = re.compile(r"skipif\(\s*not torch\.cuda\.is_available\(\)")


@dataclass(frozen=True)
class SuiteStep:
    """One program: its words, and how long it may take; its figures, if any, it writes as `NAME.json`."""

    name: str
    words: tuple[str, ...]
    seconds: float


def cpu_steps(folder: Path, *, quick: bool) -> list[SuiteStep]:
    """Every ratio of issue 8, and of design.md's section 5 that one machine without a GPU can measure."""
    data, fasta = _data(folder), str(_EXAMPLES / "pretrain_valid.fasta.gz")
    shapes = ["tiny"] if quick else ["esm2-8m", "esm2-35m"]
    rounds, cpu = ["--rounds", "1" if quick else "3"], ["--device", "cpu"]
    sizes = ["--peer-batch-sizes", "4"] if quick else ["--peer-batch-sizes", "4", "8"]
    seconds = ["--seconds", "0.1" if quick else "5"]
    megabytes = ["--megabytes", "2", "--peer-megabytes", "1"] if quick else ["--megabytes", "512"]
    loader_seconds = ["--seconds", "0.1" if quick else "2"]
    checkpoint = ["--presets", "tiny" if quick else "esm2-8m"]
    heads = ["--presets", "esm2-8m"] if quick else ["--presets", "esm2-8m", "esm2-35m"]
    return [
        _dataset(folder),
        _measure("train", folder, 330, quick, ["--data-path", data, "--presets", *shapes, *sizes, *rounds, *seconds,
                                               *cpu, *(["--seq-length", "128"] if quick else [])]),
        _measure("embed", folder, 110, quick, ["--input", fasta, "--preset", shapes[0], *sizes, *rounds, *seconds]),
        _measure("data", folder, 170, quick, ["--input", str(_EXAMPLES / "pretrain_train.fasta.gz"), *megabytes,
                                              *rounds, *loader_seconds]),
        _measure("checkpoint", folder, 60, quick, ["--data-path", data, *checkpoint, *cpu]),
        _measure("attention", folder, 60, quick, ["--input", fasta, *heads, *rounds, *cpu]),
    ]  # fmt: skip


def gpu_steps(folder: Path, *, quick: bool) -> list[SuiteStep]:
    """Everything that one GPU can tell; what matters most comes first, as the time may end before the steps do."""
    data, fasta = _data(folder), str(_EXAMPLES / "pretrain_train.fasta.gz")
    ours = ["--sides", "ours", "compiled"]
    brief = ["--rounds", "1", "--seconds", "0.1"] if quick else ["--rounds", "3", "--seconds", "3"]
    # The peers, where transformers is there, at one shape: a model that users train on one GPU.
    peers = ["padded", "bucketed", "packed"] if find_spec("transformers") else []

    def train(name: str, preset: str, rows: int, seconds: float, sides: list[str]) -> SuiteStep:
        shape = (
            ["--presets", "tiny", "--seq-length", "128", "--rows", "2"]
            if quick
            else ["--presets", preset, "--rows", str(rows)]
        )
        sides = ["--sides", "ours"] if quick else sides
        return _measure("train", folder, seconds, quick, ["--data-path", data, *shape, *sides, *brief], name=name)

    return [
        _dataset(folder),
        train("train-650m", "esm2-650m", 32, 80, ours),
        train("train-3b", "esm2-3b", 16, 90, ours),
        _measure("attention", folder, 40, quick, ["--input", fasta, *brief]),
        *_kernel_steps(folder, quick=quick),
        train("train-650m-fused", "esm2-650m", 32, 90, ["--sides", "compiled", "fused", "fused_compiled"]),
        train("train-8m", "esm2-8m", 64, 90, [*ours, *peers]),
        train("train-35m", "esm2-35m", 64, 50, ours),
        train("train-150m", "esm2-150m", 32, 50, ours),
        _measure("checkpoint", folder, 120, quick, ["--data-path", data, "--presets", "tiny" if quick else "esm2-650m",
                                                   "--rows", "4" if quick else "32", "--rounds", "1" if quick else "2",
                                                   "--directory", str(folder)]),
        _profile_step(folder, data, quick=quick),
        _measure("data", folder, 40, quick, ["--input", fasta, "--no-peer", "--rounds", "1",
                                             "--megabytes", "2" if quick else "256",
                                             "--seconds", "0.1" if quick else "1"]),
        *_test_step(folder),
    ]  # fmt: skip


def _data(folder: Path) -> str:
    return str(folder / "data" / "train")


def _dataset(folder: Path) -> SuiteStep:
    fasta = str(_EXAMPLES / "pretrain_train.fasta.gz")
    words = ["tools/preprocess_data.py", "--input", fasta, "--output-prefix", _data(folder), "--tokenizer", "esm2"]
    return SuiteStep("dataset", (sys.executable, *words, "--force"), 30)


def _measure(
    subject: str, folder: Path, seconds: float, quick: bool, flags: list[str], *, name: str | None = None
) -> SuiteStep:
    name = name or subject
    words = [sys.executable, "tools/benchmark.py", subject, *flags, "--output", str(folder / f"{name}.json")]
    # With quick, which a test runs on machines that do other things too, only the suite's own time counts.
    return SuiteStep(name, (*words, *(["--quick"] if quick else [])), 300 if quick else seconds)


def _kernel_steps(folder: Path, *, quick: bool) -> list[SuiteStep]:
    """Of the kernels in csrc/kernels: building them, and their table. Quick, on a CPU, only the table."""
    build = SuiteStep("build-kernels", ("make", "kernels", f"PYTHON={sys.executable}"), 90)
    # Every case is compiled by torch, too: all shapes of the subject would take minutes.
    shape = [] if quick else ["--presets", "esm2-650m", "--dtypes", "bf16"]
    return [*([] if quick else [build]), _measure("kernels", folder, 60, quick, shape)]


def _profile_step(folder: Path, data: str, *, quick: bool) -> SuiteStep:
    """A traced run of launch/pretrain.sh; its checkpoint goes."""
    shape = "--preset tiny --seq-length 128 --micro-batch-size 2 --global-batch-size 2" if quick else (
        "--preset esm2-650m --bf16 --compile --micro-batch-size 32 --global-batch-size 32"
    )  # fmt: skip
    run = folder / "profile"
    command = f"launch/pretrain.sh {shape} --train-iters 16 --profile"
    python, data, to = shlex.quote(sys.executable), shlex.quote(data), shlex.quote(str(run))
    words = ("bash", "-c", f"PYTHON={python} {command} --data-path {data} --save {to} && rm -r {to}/checkpoints")
    return SuiteStep("profile", words, 120)


def _test_step(folder: Path) -> list[SuiteStep]:
    """The test files with tests that need a GPU."""
    files = [path for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if _NEEDS_GPU.search(path.read_text())]
    if not files or not find_spec("pytest"):
        return []
    words = (sys.executable, "-m", "pytest", "-rs", "-k", "gpu or cuda", *(str(path) for path in files))
    return [SuiteStep("tests", (*words, f"--junitxml={folder / 'tests.xml'}"), 60)]
