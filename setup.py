"""Builds the CPU extension `megatron_plm.data._native`; everything else is declared in pyproject.toml.

The CUDA kernels are never built here: a CPU-only torch cannot load them (see docs/kernels.md).
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile().install()  # a file a core

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_plm.data._native",
            sources=sorted(glob("csrc/data/*.cpp")),
            include_dirs=["csrc/data"],
            depends=sorted(glob("csrc/data/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
