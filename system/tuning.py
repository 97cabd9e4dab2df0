"""What a process is told before torch starts in it: how to keep memory, how to wait."""

import contextlib
import ctypes
import os
import sys

# parameters of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SPINS = 10_000  # about 0.2 ms


def tune_process():
    """
    Call it before torch is imported, whose OpenMP reads its settings when it is loaded.

    Threads that wait spin for SPINS turns and then sleep. By default (libgomp) it is 300,000. If
    another program has one of the cores, they spin away the time of the thread that they wait for:
    a step of config/story.py on two cores takes more than ten times as long. Compiled code asks
    how many threads there are each time it runs, since system/threads.py changes that.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    os.environ.setdefault("TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "1")
    keep_freed_memory()


def keep_freed_memory():
    """
    Have malloc keep freed memory for the next step, which asks for the same large blocks: by
    default glibc returns them to the system each time, and getting them again, page by page, takes
    a tenth of a step on a CPU. Where GLIBC_TUNABLES is set, and on other systems than Linux with
    glibc, it does nothing.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, 1 << 30)
            mallopt(M_TRIM_THRESHOLD, -1)
