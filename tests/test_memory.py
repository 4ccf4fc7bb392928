"""Freed memory is kept or handed back, as asked: what was kept and is asked for again costs no new pages."""

import platform
import subprocess
import sys

import pytest
from processes import environment

PROGRAM = """
import ctypes, resource, sys
from megatron_plm.memory import keep_freed_memory, return_freed_memory
{"kept": keep_freed_memory, "handed-back": return_freed_memory}[sys.argv[1]]()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def touched():
    block = libc.malloc(4 << 20)
    ctypes.memset(block, 1, 4 << 20)
    libc.free(ctypes.c_void_p(block))
touched()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    touched()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_blocks_are_used_again():
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, mode],
                env=environment(),
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout
        )
        for mode in ("kept", "handed-back")
    }
    assert faults["kept"] < 50
    assert faults["handed-back"] > 50 * 1000
