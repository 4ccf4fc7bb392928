"""Fuzzing the compiled data code and the index reader: `python tests/fuzz/fuzz.py --seconds 300`.

Each target is a C++ file here (LLVMFuzzerTestOneInput), linked with csrc/data but its bindings, and built with
AddressSanitizer and UndefinedBehaviorSanitizer: by clang with libFuzzer where it is installed, else by g++ with
engine.cpp, which also is guided by coverage. An input that breaks a promise is kept in the folder of --keep, and is run
again by `python tests/fuzz/fuzz.py --target rows --again FILE`.
"""

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "data"

TARGETS = ("records", "hashing", "packing", "rows")
_HEAD = b"\x07\x01\x1f"  # of records.cpp, after format, strictness and names: three sizes of pieces
SEEDS = {
    "records": [
        b"\x00\x00\x00" + _HEAD + b">a b\nMKLV\nACDE*\n>b\nW\n",
        b"\x00\x01\x01" + _HEAD + b">a\r\nMK LV\tA\r\n;note\r\n\r\n>\r\nMJ",
        b"\x00\x00\x01" + _HEAD + b";first\n>a\nMK>LV\n>b\n>c\nM\x00K\xff\n",
        b"\x00\x00\x00" + _HEAD + b">a\rMKLV\r>b\rMK\n>" + b"n" * 300 + b"\nM\n",
        b"\x01\x00\x00" + _HEAD + b"MKLV\n\nACDE*\r\nM K\nM\tK\n",
        b"\x02\x00\x01" + _HEAD + b'{"id": 7, "s": "MK\\u0041V", "x": [1.5e-3, {"y": null}]}\n\n{"s":"W","id":"b"}\n',
        b"\x02\x01\x01" + _HEAD + b'{"id":"\\ud83d\\ude00","s":"MK"}\r\n{"s": true}\n[1]\n',
        b"\x03\x00\x01" + _HEAD + b'id,s\na,MKLV\n"b ""x""\n","AC"\r\n\nc,W\n',
        b"\x03\x01\x00" + _HEAD + b'"id","s"\n"a"b,MK\n"open\n',
        b"\x04\x00\x01" + _HEAD + b"id\tx\ts\na\t1\tMKLV\r\nb\t2\tACDE",
    ],
    "hashing": [bytes([width, *range(8), 0, 25, longer, *range(60)]) for width in range(3) for longer in range(2)]
    + [b"\x03" + bytes(8) + b"r1\tm1\nr1 note\tm2\r\n\nr2\tm3\tx\n"],
    "packing": [bytes([1, 0, 0, 40, 0, 8]) + bytes(range(1, 200)), bytes([0, 9, 0, 3, 0, 1]) + b"\x05\x01" * 90],
    # Pseudo-random bytes: the target reads them as files, options and segments, most of them valid.
    "rows": [hashlib.shake_256(bytes([number])).digest(600) for number in range(24)],
}
_FLAGS = ("-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", "-Wall", "-Wextra")
_INCLUDES = (f"-I{SOURCES}", f"-I{HERE}")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
}


def missing(compiler: str = "g++") -> str | None:
    """Why the targets cannot be built with the sanitizers here; None where they can."""
    if shutil.which(compiler) is None:
        return f"no {compiler}"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text("int main() { return 0; }\n")
        done = subprocess.run([compiler, *_SANITIZERS, source, "-o", program], capture_output=True, text=True)
        if done.returncode or subprocess.run([program], capture_output=True).returncode:
            return f"{compiler} cannot link or run with {_SANITIZERS[0]}"
    return None


def compile_all(folder: Path) -> None:
    """Compile everything into `folder`, with one compiler for each core; the code under test reports coverage."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(functools.partial(_compile, folder), [*_code_under_test(), *sorted(HERE.glob("*.cpp"))]))


def _compile(folder: Path, source: Path) -> Path:
    coverage = ["-fsanitize-coverage=trace-pc"] if source.parent == SOURCES else []
    command = ["g++", *_FLAGS, *_SANITIZERS, *coverage, *_INCLUDES, "-c", source, "-o", _object(folder, source)]
    subprocess.run(command, check=True)
    return _object(folder, source)


def link(target: str, folder: Path, source: Path | None = None) -> Path:
    """Link one target of a folder of `compile_all`, or one that `source` holds; returns the program."""
    own = _compile(folder, source) if source else _object(folder, HERE / f"{target}.cpp")
    objects = [own, *(_object(folder, path) for path in [*_code_under_test(), HERE / "engine.cpp"])]
    subprocess.run(["g++", *_SANITIZERS, *objects, "-o", folder / target], check=True)
    return folder / target


def _code_under_test() -> list[Path]:
    bindings = {"module.cpp", *(path.name for path in SOURCES.glob("bind_*.cpp"))}
    return [path for path in sorted(SOURCES.glob("*.cpp")) if path.name not in bindings]


def _object(folder: Path, source: Path) -> Path:
    return folder / f"{source.parent.name}-{source.stem}.o"


def build_libfuzzer(target: str, folder: Path) -> Path:
    """Compile and link one target with clang and its libFuzzer."""
    sources = [HERE / f"{target}.cpp", *_code_under_test()]
    flags = [*_FLAGS, "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["clang++", *flags, *_INCLUDES, *sources, "-o", folder / target], check=True)
    return folder / target


def write_seeds(target: str, folder: Path) -> list[Path]:
    """Write the inputs that mutation begins with, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"seed-{number}" for number in range(len(SEEDS[target]))]
    for path, content in zip(paths, SEEDS[target], strict=True):
        path.write_bytes(content)
    return paths


def run(
    program: Path, files: Sequence[Path], keep: Path, *, seed: int = 1, inputs: int = 0, seconds: int = 0
) -> subprocess.CompletedProcess:
    """Run a program of `link` on `files` and on mutations; `keep` then holds the input that failed, if one did."""
    return subprocess.run(
        [program, str(seed), str(inputs), str(seconds), keep, *files],
        capture_output=True,
        text=True,
        env={**os.environ, **_ENVIRONMENT},
    )


def main() -> int:
    """Fuzz every target for a while; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300, help="time of each target (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    parser.add_argument("--target", choices=[*TARGETS, "index"], nargs="+", default=[*TARGETS, "index"])
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder of programs and failing inputs")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only run this input again")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    if shutil.which("clang++") is None or options.again:
        compile_all(options.keep)
    failed = [target for target in options.target if not _fuzz(target, options)]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def _fuzz(target: str, options: argparse.Namespace) -> bool:
    if target == "index":
        from index_reader import fuzz_index

        return fuzz_index(seconds=options.seconds, seed_=options.seed, keep=options.keep / "index")
    if options.again:
        done = run(link(target, options.keep), [options.again], options.keep / f"{target}.input")
    elif shutil.which("clang++"):
        corpus = options.keep / f"{target}-corpus"
        write_seeds(target, corpus)
        limits = [
            f"-max_total_time={options.seconds}",
            f"-seed={options.seed}",
            "-max_len=4096",
            "-print_final_stats=1",
        ]
        prefix = f"-artifact_prefix={options.keep}/{target}-"
        program = build_libfuzzer(target, options.keep)
        done = subprocess.run([program, *limits, prefix, corpus], capture_output=True, text=True)
    else:
        program, keep = link(target, options.keep), options.keep / f"{target}.input"
        files = write_seeds(target, options.keep / f"{target}-corpus")
        done = run(program, files, keep, seed=options.seed, inputs=1 << 60, seconds=options.seconds)
    told = done.stdout + done.stderr
    print(f"{target}: {told.strip() if done.returncode else told.strip().splitlines()[-1]}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
