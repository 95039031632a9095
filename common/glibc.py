"""Settings of glibc's allocator, without which a row's time depends on the rows before it."""

import ctypes
import os
import sys
from contextlib import suppress


def restart() -> None:
    """Starts Python anew, once, with malloc's per-thread cache (tcache) off: glibc reads this
    setting only at its start. A cached block splits the memory that a result has left. The next
    result then needs new pages, which the system clears: on batches of photographs some runs took
    twice as long. Calls on images of a few pixels take the same time either way."""
    mine = sys.platform == "linux" and sys.argv[0] in sys.orig_argv  # and not IPython's process
    if mine and not {"GLIBC_TUNABLES", "BENCH_RESTARTED"} & os.environ.keys():
        os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "BENCH_RESTARTED": "1"}
        os.execv(sys.executable, sys.orig_argv)


def keep_memory() -> None:
    """Tells glibc to keep freed memory. Its own limits adapt to earlier frees, so a row would take
    up to four times as long, depending on the rows before it."""
    with suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX: a result of 38 MB would be mapped, and faulted in, anew
