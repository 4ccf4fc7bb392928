"""Builds the CPU extensions `megatron_plm.data._native` and `megatron_plm.kernels._cpu`.

Everything else is declared in pyproject.toml. The CUDA kernels are never built here: a CPU-only torch cannot load
them (see docs/kernels.md).
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile().install()  # a file a core


def extension(name: str, folder: str, *options: str) -> Pybind11Extension:
    """The module of all sources of `folder`."""
    return Pybind11Extension(
        name,
        sources=sorted(glob(f"{folder}/*.cpp")),
        include_dirs=[folder],
        depends=sorted(glob(f"{folder}/*.h")),
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", *options],
    )


setup(
    ext_modules=[
        extension("megatron_plm.data._native", "csrc/data"),
        # A product and a sum may be one instruction.
        extension("megatron_plm.kernels._cpu", "csrc/cpu", "-ffp-contract=fast"),
    ],
    cmdclass={"build_ext": build_ext},
)
