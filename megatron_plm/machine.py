"""Where a figure was measured."""

import contextlib
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_plm import __version__


def processor_name() -> str:
    """The name of the CPU as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of Python, this package and those that decide its numbers; what is not installed is left out."""
    versions = {"python": platform.python_version(), "megatron_plm": __version__}
    for package in ("torch", "numpy", "transformers", "apex", "transformer_engine", "flash_attn", "flash_attn_3"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, versions and commit, for the record beside every measurement."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": package_versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
