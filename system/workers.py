"""Work shared out to processes."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from configurator import UserError
from system.progress import progress


def worker_count(num_workers):
    """The setting num_workers as a number of processes: 0 stands for one a core."""
    if not 0 <= num_workers <= 1000:
        raise UserError(f"num_workers = {num_workers}: expected 0 (one a core) to 1000")
    affinity = getattr(os, "sched_getaffinity", None)
    return num_workers or (len(affinity(0)) if affinity else os.cpu_count())


def leave_ctrl_c():
    """In a worker: Ctrl-C is for the parent, and where that was killed the worker ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def in_order(function, items, arguments, num_workers):
    """
    Yield (item, function(item, *arguments)) for each of `items`, in their order, computed in
    num_workers processes, each two results ahead at most: so far `items` is read ahead, too.
    """
    if num_workers < 2:
        for item in items:
            yield item, function(item, *arguments)
        return
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(num_workers, initializer=leave_ctrl_c)
        stack.callback(pool.shutdown, cancel_futures=True)
        todo, running = iter(items), deque()
        try:
            while True:
                for one in itertools.islice(todo, 2 * num_workers - len(running)):
                    running.append((one, pool.submit(function, one, *arguments)))
                if not running:
                    return
                item, future = running.popleft()
                yield item, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was ended, perhaps because memory ran out: try fewer "
                "--num_workers"
            ) from None


def over_spans(function, spans, arguments, num_workers, what):
    """The results of in_order() for Spans, behind a progress bar of their bytes called `what`."""
    n_bytes = sum(span.end - span.start for span in spans)
    with progress(total=n_bytes, desc=what, unit="B", unit_scale=True) as bar:
        workers = min(num_workers, len(spans))
        for span, result in in_order(function, spans, arguments, workers):
            yield result
            bar.update(span.end - span.start)
