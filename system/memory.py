"""How the process gets memory from the system, decided before it has any."""

import os
import sys

# for glibc's malloc: freed memory is kept for the next step, and comes in huge pages
TUNABLES = {"hugetlb": 1, "mmap_threshold": 1 << 30, "trim_threshold": 1 << 32}
SETTINGS = ":".join(f"glibc.malloc.{k}={v}" for k, v in TUNABLES.items())


def tune_malloc():
    """
    Start this Python process again with settings of malloc that suit training on a CPU, where every
    step asks for the same large blocks: by default glibc returns them to the system each time, and
    getting them again, page by page, takes a tenth of a step. Call it early: what was imported
    before is imported twice. Where GLIBC_TUNABLES is set, and on other systems than Linux, it does
    nothing.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = SETTINGS
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
