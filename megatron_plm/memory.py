"""How the C library handles freed memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of handing it back; does nothing where it isn't glibc.

    Each block or activation of a megabyte would otherwise be mapped, filled with zeros page by page and unmapped again:
    a quarter of the preprocessor's time, and about a tenth of a training step's on a CPU (docs/LOG.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
