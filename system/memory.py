"""How the process gets memory from the system."""

import contextlib
import ctypes
import os
import sys

# parameters of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def tune_malloc():
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
