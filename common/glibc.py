"""Settings of glibc's allocator, without which a row's time depends on the rows before it."""

import ctypes
import os
import sys
from contextlib import suppress


def restart() -> None:
    """Starts Python anew, once, with a setting that glibc reads at its start: no cache of small
    blocks for each thread. A block in it splits the memory that a result has left. Then the next
    result takes new memory, whose pages the system clears: of a batch of photographs some runs took
    twice as long. Calls on images of a few pixels take as long with the setting as without."""
    mine = sys.platform == "linux" and sys.argv[0] in sys.orig_argv  # and not IPython's process
    if mine and not {"GLIBC_TUNABLES", "BENCH_RESTARTED"} & os.environ.keys():
        os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "BENCH_RESTARTED": "1"}
        os.execv(sys.executable, sys.orig_argv)


def keep_memory() -> None:
    """Tells glibc to keep what is freed. By itself it decides by what was freed before, and a row
    would take up to four times as long by the rows before it."""
    with suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX: a result of 38 MB would be mapped, and faulted in, anew
