"""Builds the CUDA kernels from csrc/kernels into the library that `library.py` loads: `make kernels`.

It needs nvcc and the headers of the torch that runs this, no GPU. The library names torch's stable ABI of 2.11 and
takes its functions from the torch that loads it, which must be a CUDA build.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_plm.arguments import ArgumentParser
from megatron_plm.errors import UserError, run_command
from megatron_plm.kernels.library import LIBRARY

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "kernels"
ARCHITECTURES = ("80", "90", "100")  # A100; H100 and H200; B200
_TARGET = "0x020b000000000000"  # torch 2.11
_TORCH = ("torch_cpu", "torch_cuda")  # the libraries of a CUDA build that hold the stable ABI's functions


def main(argv: Sequence[str]) -> int:
    """Build the library; returns 0. Raises UserError where nvcc or the sources are missing, or nvcc fails."""
    parser = ArgumentParser(prog="python -m megatron_plm.kernels.build", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), type=_arch, help="compute capabilities, × 10")
    parser.add_argument("--output", type=Path, default=LIBRARY, metavar="FILE", help="the library")
    options = parser.parse(argv)
    build(options.output, options.arch)
    print(f"wrote {options.output} for {', '.join(f'sm_{arch}' for arch in options.arch)}")
    return 0


def build(output: Path, architectures: Sequence[str]) -> None:
    """Compile each source for all `architectures`, with warnings as errors, and link them into `output`, which is
    complete or as it was."""
    if not SOURCES.is_dir():
        raise UserError(
            f"{SOURCES}: no such folder; the kernels are built from a clone of the repository, not from a wheel"
        )
    nvcc = find_nvcc()
    if nvcc is None:
        raise UserError("no nvcc in NVCC, CUDA_HOME/bin, PATH or /usr/local/cuda/bin; install the CUDA toolkit")
    include = Path(torch.__file__).parent / "include"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={_TARGET}", "-isystem", str(include)]
    flags += ["-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden", "-Werror=all-warnings", "--threads=0", *codes]
    with tempfile.TemporaryDirectory(prefix="megatron-plm-kernels-") as scratch:
        objects = []
        for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]):
            objects.append(f"{scratch}/{source.stem}.o")
            _run([nvcc, *flags, "-c", str(source), "-o", objects[-1]])
        # The library must name torch's, whose functions it would not see otherwise. Empty ones of the same names do for
        # linking: a torch without CUDA lacks the second.
        empty = Path(scratch) / "empty.cpp"
        empty.touch()
        for name in _TORCH:
            named = f"-Xlinker=-soname,lib{name}.so"
            _run([nvcc, "-shared", "--cudart=none", named, str(empty), "-o", f"{scratch}/lib{name}.so"])
        torch_libraries = ["-Xlinker=--no-as-needed", f"-L{scratch}", *(f"-l{name}" for name in _TORCH)]
        aside = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            _run([nvcc, "-shared", *codes, *objects, *torch_libraries, "-o", str(aside)])
            os.replace(aside, output)
        finally:
            aside.unlink(missing_ok=True)


def find_nvcc() -> str | None:
    """Where the compiler is: named by NVCC, in CUDA_HOME, on the path, or where CUDA is installed by default."""
    named = [os.environ.get("NVCC"), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc", "nvcc"]
    named.append("/usr/local/cuda/bin/nvcc")
    return next((found for name in named if name and (found := shutil.which(name))), None)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}".rstrip())


def _arch(text: str) -> str:
    if not text.isascii() or not text.isdigit() or int(text) < 80:
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability × 10 of 80 or more, such as 90")
    return text


if __name__ == "__main__":
    import sys

    sys.exit(run_command(main, sys.argv[1:]))
