"""Work divided among processes."""

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
    """Return the number of processes for the setting num_workers; 0 means one per core."""
    if not 0 <= num_workers <= 1000:
        raise UserError(f"num_workers = {num_workers}: expected 0 (one per core) to 1000")
    affinity = getattr(os, "sched_getaffinity", None)
    return num_workers or (len(affinity(0)) if affinity else os.cpu_count())


def follow_parent():
    """In a worker: ignore Ctrl-C, which the parent handles, and exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_after, args=(os.getppid(),), daemon=True).start()


def exit_after(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def in_order(function, items, arguments, num_workers):
    """
    Yield (item, function(item, *arguments)) for each of `items`, in order, computed by num_workers
    processes. `items` is read, and results are computed, at most two per process ahead.
    """
    if num_workers < 2:
        for item in items:
            yield item, function(item, *arguments)
        return
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(num_workers, initializer=follow_parent)
        stack.callback(pool.shutdown, cancel_futures=True)
        remaining, running = iter(items), deque()
        try:
            while True:
                for item in itertools.islice(remaining, 2 * num_workers - len(running)):
                    running.append((item, pool.submit(function, item, *arguments)))
                if not running:
                    return
                item, future = running.popleft()
                yield item, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out: use a smaller "
                "--num_workers"
            ) from None


def over_spans(function, spans, arguments, num_workers, label):
    """Yield the results of in_order() for Spans, with a progress bar that counts their bytes."""
    n_bytes = sum(span.end - span.start for span in spans)
    with progress(total=n_bytes, desc=label, unit="B", unit_scale=True) as bar:
        workers = min(num_workers, len(spans))
        for span, result in in_order(function, spans, arguments, workers):
            yield result
            bar.update(span.end - span.start)
