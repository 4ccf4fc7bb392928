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


class FreedMemory:
    """Holds the freed memory that the C library keeps to about twice what a piece of work takes.

    Tensors whose sizes change from batch to batch leave gaps that the next ones don't fit into, so that what is kept
    grows and grows: fine-tuning 2 million weights came to 6.8 GB. Handing all back after each batch costs a quarter of
    the time; this does it as seldom as it may.
    """

    def __init__(self) -> None:
        self._least: int | None = None  # resident when all was handed back
        self._taken = 0  # at most, by a piece of work that began then
        self._is_first = True  # since all was handed back

    def bound(self) -> None:
        """To be called between pieces of work, when the tensors of the last are gone."""
        resident = _status("VmRSS")
        if resident is None:
            return
        if self._least is not None and self._is_first:
            self._taken, self._is_first = max(self._taken, resident - self._least), False
        if self._least is None or resident > self._least + 2 * self._taken:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            self._least, self._is_first = _status("VmRSS"), True


def peak_memory() -> int | None:
    """The most resident memory that this process has had, in bytes; None where there is no /proc."""
    return _status("VmHWM")  # not getrusage's: that one is at least what the process had that started this one


def _status(name: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(lines[0].split()[1]) if lines else None


def _set(*, mmap_threshold: int, trim_threshold: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_M_TRIM_THRESHOLD, trim_threshold)
