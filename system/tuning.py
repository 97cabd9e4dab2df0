"""Tune a process before torch is loaded: how it keeps memory, and how its threads wait."""

import contextlib
import ctypes
import os
import sys

# parameters of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SPINS = 10_000  # about 0.2 ms


def tune_process():
    """
    Call this before importing torch: OpenMP reads its settings when it is loaded.

    Waiting threads spin SPINS times and then sleep; libgomp's default is 300,000. If another
    program occupies a core, spinning takes time from the very thread they wait for: a step of
    config/story.py on two cores takes more than ten times as long. Compiled code asks for the
    number of threads each time it runs, because system/threads.py changes it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    os.environ.setdefault("TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "1")
    keep_freed_memory()


def keep_freed_memory():
    """
    Make malloc keep freed memory for the next step, which needs blocks of the same sizes. By
    default glibc returns large blocks to the system each time, and getting them back, page by page,
    takes a tenth of a step on a CPU. Does nothing if GLIBC_TUNABLES is set or the system is not
    Linux with glibc.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, 1 << 30)
            mallopt(M_TRIM_THRESHOLD, -1)
