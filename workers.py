"""Work shared out to processes."""

import contextlib
import os
import signal
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from configurator import UserError


def worker_count(num_workers):
    """The setting num_workers as a number of processes: 0 stands for one a core."""
    if num_workers < 0:
        raise UserError(f"num_workers = {num_workers}: expected 0 (one a core) or more")
    affinity = getattr(os, "sched_getaffinity", None)
    return num_workers or (len(affinity(0)) if affinity else os.cpu_count())


def leave_ctrl_c():
    """In a worker: Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_order(function, spans, arguments, num_workers, what):
    """
    Yield function(span, *arguments) for each of `spans`, in their order, computed in num_workers
    processes, behind a progress bar of bytes called `what`.
    """
    n_bytes = sum(span.end - span.start for span in spans)
    bar = tqdm(total=n_bytes, desc=what, unit="B", unit_scale=True)
    with bar, contextlib.ExitStack() as stack:
        found = (function(span, *arguments) for span in spans)
        if num_workers > 1 and len(spans) > 1:
            pool = ProcessPoolExecutor(num_workers, initializer=leave_ctrl_c)
            stack.callback(pool.shutdown, cancel_futures=True)
            found = pool.map(function, spans, *([one] * len(spans) for one in arguments))
        for span, result in zip(spans, found, strict=True):
            bar.update(span.end - span.start)
            yield result
