"""How the C library handles freed memory, and how much of it there was."""

import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of handing it back; does nothing where it isn't glibc.

    Each block or activation of a megabyte would otherwise be mapped, filled with zeros page by page and unmapped again:
    a quarter of the preprocessor's time, and about a tenth of a training step's on a CPU (docs/LOG.md).
    """
    _set(mmap_threshold=32 << 20, trim_threshold=1 << 30)  # of the first the most that glibc takes


def return_freed_memory() -> None:
    """Let the C library hand back freed memory of more than a few pages at once; does nothing where it isn't glibc.

    By itself it learns to keep blocks of up to 32 MB; then tensors that stay lie in the gaps of those that went, and it
    grows: to cut 0.3 GB for four ranks took 0.5 GB.
    """
    _set(mmap_threshold=128 << 10, trim_threshold=128 << 10)


def peak_memory() -> int | None:
    """The most resident memory that this process has had, in bytes; None where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    # Not getrusage's: that one is at least what the process had that started this one.
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0].split()[1]) if lines else None


def _set(*, mmap_threshold: int, trim_threshold: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_M_TRIM_THRESHOLD, trim_threshold)
