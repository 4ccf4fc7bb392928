"""The steps of the suites: what `make bench` and `make bench-gpu` run, each with the time that it takes and may take.

Each step is a program of its own: one that fails or hangs loses no other. The times that the steps take fit the suite's
whole time; of the CPU's they were measured, of the GPU's they are estimates. With `quick` all sizes are the smallest,
so that a test can run the same steps.
"""

import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_EXAMPLES = REPOSITORY / "examples/data"
_GPU_TESTS = "pytest.mark.gpu"  # what the tests that need one are marked by


@dataclass(frozen=True)
class SuiteStep:
    """One program; its figures, if any, it writes as `NAME.json`."""

    name: str
    words: tuple[str, ...]
    expected: float  # seconds that it takes
    seconds: float  # that it may take
    is_judged: bool = True  # whether the bars that it misses are the suite's


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
        _measure("train", folder, (255, 360), quick, ["--data-path", data, "--presets", *shapes, *sizes, *rounds,
                                                      *seconds, *cpu, *(["--seq-length", "128"] if quick else [])]),
        _measure("embed", folder, (60, 110), quick, ["--input", fasta, "--preset", shapes[0], *sizes, *rounds,
                                                     *seconds]),
        _measure("data", folder, (95, 170), quick, ["--input", str(_EXAMPLES / "pretrain_train.fasta.gz"), *megabytes,
                                                     *rounds, *loader_seconds]),
        _measure("checkpoint", folder, (35, 80), quick, ["--data-path", data, *checkpoint, *cpu]),
        _measure("attention", folder, (40, 60), quick, ["--input", fasta, *heads, *rounds, *cpu]),
    ]  # fmt: skip


def gpu_steps(folder: Path, *, quick: bool) -> list[SuiteStep]:
    """Everything that one GPU can tell; what matters most comes first, as the time may end before the steps do."""
    data, fasta = _data(folder), str(_EXAMPLES / "pretrain_train.fasta.gz")
    brief = ["--rounds", "1", "--seconds", "0.1"] if quick else ["--rounds", "2", "--seconds", "1.5"]
    tiny = ["--presets", "tiny", "--seq-length", "128", "--rows", "2", "--sides", "ours"]

    def train(name: str, shape: str, sides: str, times: tuple[float, float]) -> SuiteStep:
        flags = tiny if quick else [*shape.split(), "--sides", *sides.split()]
        return _measure("train", folder, times, quick, ["--data-path", data, *flags, *brief], name=name)

    # A step of several micro-batches, as one GPU that trains these models has: its weights change once in all of them.
    of_650m = "--presets esm2-650m --rows 32 --micro-batches 4"
    small = "--presets esm2-8m esm2-35m esm2-150m --rows 64"
    saved = ["--presets", "tiny", "--rows", "4"] if quick else ["--presets", "esm2-150m", "--rows", "32"]
    # The peers, where transformers is there, at one shape: a model that users train on one GPU.
    peers = [train("train-8m-peers", "--presets esm2-8m --rows 64", "ours compiled padded bucketed packed", (60, 100))]
    return [
        _dataset(folder),
        train("train-650m", of_650m, "ours compiled", (60, 130)),
        train("train-3b", "--presets esm2-3b --rows 16 --micro-batches 4", "ours compiled", (70, 130)),
        train("train-small", small, "ours compiled", (75, 130)),
        _measure("attention", folder, (25, 50), quick, ["--input", fasta, "--rounds", "2", "--seconds",
                                                        "0.05" if quick else "0.2"]),
        *_kernel_steps(folder, quick=quick),
        train("train-650m-fused", of_650m, "fused fused_compiled", (60, 110)),
        _profile_step(folder, data, quick=quick),
        *(peers if find_spec("transformers") and not quick else []),
        *_test_step(folder),
        _measure("checkpoint", folder, (20, 60), quick, ["--data-path", data, *saved, "--rounds", "1",
                                                         "--directory", str(folder)]),
        _measure("data", folder, (15, 40), quick, ["--input", fasta, "--no-peer", "--rounds", "1",
                                                   "--megabytes", "2" if quick else "256",
                                                   "--seconds", "0.1" if quick else "1"], is_judged=False),
    ]  # fmt: skip


def _data(folder: Path) -> str:
    return str(folder / "data" / "train")


def _dataset(folder: Path) -> SuiteStep:
    fasta = str(_EXAMPLES / "pretrain_train.fasta.gz")
    words = ["tools/preprocess_data.py", "--input", fasta, "--output-prefix", _data(folder), "--tokenizer", "esm2"]
    return SuiteStep("dataset", (sys.executable, *words, "--force"), 3, 30)


def _measure(
    subject: str,
    folder: Path,
    times: tuple[float, float],
    quick: bool,
    flags: list[str],
    *,
    name: str | None = None,
    is_judged: bool = True,
) -> SuiteStep:
    """`times`: seconds that it takes, and that it may take."""
    name, (expected, most) = name or subject, times
    words = [sys.executable, "tools/benchmark.py", subject, *flags, "--output", str(folder / f"{name}.json")]
    # With quick, which a test runs on machines that do other things too, only the suite's own time counts.
    quickly = ["--quick"] if quick else []
    return SuiteStep(name, (*words, *quickly), expected, 300 if quick else most, is_judged)


def _kernel_steps(folder: Path, *, quick: bool) -> list[SuiteStep]:
    """Of the kernels in csrc/kernels: building them, and their table. Quick, on a CPU, only the table."""
    build = SuiteStep("build-kernels", ("make", "kernels", f"PYTHON={sys.executable}"), 20, 90)
    # Every case is compiled by torch, too: all shapes of the subject would take minutes.
    shape = [] if quick else ["--presets", "esm2-650m", "--dtypes", "bf16"]
    return [*([] if quick else [build]), _measure("kernels", folder, (35, 90), quick, shape)]


def _profile_step(folder: Path, data: str, *, quick: bool) -> SuiteStep:
    """A traced run of launch/pretrain.sh in one process; its checkpoint goes."""
    shape = "--preset tiny --seq-length 128 --micro-batch-size 2 --global-batch-size 2" if quick else (
        "--preset esm2-150m --bf16 --compile --micro-batch-size 32 --global-batch-size 32"
    )  # fmt: skip
    run = folder / "profile"
    command = f"launch/pretrain.sh {shape} --train-iters 16 --profile"
    python, data, to = shlex.quote(sys.executable), shlex.quote(data), shlex.quote(str(run))
    one = f"NNODES=1 NPROC_PER_NODE=1 PYTHON={python}"
    words = ("bash", "-c", f"{one} {command} --data-path {data} --save {to} && rm -r {to}/checkpoints")
    return SuiteStep("profile", words, 40, 100)


def _test_step(folder: Path) -> list[SuiteStep]:
    """The tests that need a GPU."""
    files = [path for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if _GPU_TESTS in path.read_text()]
    if not all(map(find_spec, ("pytest", "pytest_timeout", "hypothesis"))):
        return []
    words = (sys.executable, "-m", "pytest", "-rs", "-m", "gpu", *(str(path) for path in files))
    return [SuiteStep("tests", (*words, f"--junitxml={folder / 'tests.xml'}"), 35, 90)]
