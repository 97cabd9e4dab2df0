"""
How many threads share a computation on the CPU.

On an idle machine, one thread per core is fastest. If another program uses a core, it is not: many
times per step, all threads wait for the one that shares its core. OMP_NUM_THREADS sets the maximum.
OMP_DYNAMIC=false fixes the number, on which the last digits of results depend.
"""

import os
import statistics
import sys
import time

import torch

from system.progress import print_line

PROBE_S = 0.1  # measuring time for each number of threads
GAIN = 1.15  # switch to another number only if it is this many times as fast
WINDOW_S = 1.0  # measure speed over windows of this length
SLOW = 0.7  # choose again below this fraction of the best speed,
LATER_S = 30.0  # or after this time with fewer threads than the maximum


class Threads:
    """
    Chooses a program's number of threads at the start, when the work slows down, and from time to
    time while it is below the maximum. device: a torch.device; does nothing unless it is a CPU.
    """

    def __init__(self, device):
        self.maximum = torch.get_num_threads()
        is_fixed = os.environ.get("OMP_DYNAMIC", "").lower() == "false"
        self.is_fixed = is_fixed or self.maximum == 1 or device.type != "cpu"
        self.latest, self.earlier, self.patience = 0.0, None, LATER_S
        self.start_window()
        if not self.is_fixed:
            self.choose()

    def start_window(self):
        self.n, self.seconds = 0, 0.0

    def choose(self):
        """Set the number of threads that is fastest now; if it changes, print why."""
        before = torch.get_num_threads()
        times = probe({self.maximum, self.maximum - 1, self.maximum // 2, 1, before} - {0})
        fastest = min(times, key=times.get)
        ratio = times[before] / times[fastest]
        if ratio < GAIN:
            fastest = before
        torch.set_num_threads(fastest)
        if fastest != before:
            reason = "other programs use the cores" if fastest < before else "cores are free again"
            threads = f"{fastest} of {self.maximum} threads ({ratio:.1f} times as fast as {before})"
            print_line(f"note: {reason}; using {threads}", sys.stderr)  # stdout may hold a story
        # more threads must prove faster at the work too, or choose_by_work() goes back
        self.earlier = (before, self.latest) if fastest > before else None
        self.best, self.chosen = 0.0, time.monotonic()
        self.start_window()

    def choose_by_work(self, speed):
        """Go back to the earlier number of threads if the work itself was faster with it."""
        (number, earlier_speed), self.earlier = self.earlier, None
        if speed < earlier_speed:
            torch.set_num_threads(number)
            self.patience *= 2
            threads = f"{number} of {self.maximum} threads"
            print_line(f"note: back to {threads}, which are faster", sys.stderr)

    def watch(self, n, seconds):
        """Count n steps, all of one kind, that took `seconds`; choose again if it is time."""
        if self.is_fixed:
            return
        self.n, self.seconds = self.n + n, self.seconds + seconds
        if self.seconds < WINDOW_S:
            return
        speed = self.n / self.seconds
        self.best, self.latest = max(self.best, speed), speed
        self.start_window()
        if self.earlier:
            self.choose_by_work(speed)
            return
        is_late = time.monotonic() > self.chosen + self.patience
        if speed < SLOW * self.best or (is_late and torch.get_num_threads() < self.maximum):
            self.choose()

    def watched(self, steps):
        """Yield the items of an iterator, passing the time that each takes to watch()."""
        start = time.perf_counter()
        for item in steps:
            self.watch(1, time.perf_counter() - start)
            yield item
            start = time.perf_counter()


def probe(numbers):
    """Return {number of threads: median seconds for a small computation}, measured alternating."""
    x, up = torch.ones(512, 128), torch.full((128, 512), 0.01)
    times = {n: [] for n in numbers}
    end = time.perf_counter() + PROBE_S * len(numbers)
    while time.perf_counter() < end or len(times[min(numbers)]) < 5:
        for n in numbers:
            torch.set_num_threads(n)
            start = time.perf_counter()
            # matrix products and elementwise operations, as in a layer
            (torch.relu(x @ up) @ up.T).add_(x).mean(-1)
            times[n].append(time.perf_counter() - start)
    return {n: statistics.median(seconds) for n, seconds in times.items()}
