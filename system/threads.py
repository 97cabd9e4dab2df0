"""
How many threads share a computation on the CPU.

On a machine with nothing else to do, one a core is best. With another program on one of the cores
it is not: all threads wait for the one that has to share its core, many times in each step.
OMP_NUM_THREADS is the most that are used. OMP_DYNAMIC=false keeps that number, which the last
digits of results depend on.
"""

import os
import statistics
import sys
import time

import torch

from system.progress import print_line

PROBE_S = 0.1  # for each number of threads that is tried
GAIN = 1.15  # how many times as fast another number has to be
WINDOW_S = 1.0  # in which a speed is measured
SLOW = 0.7  # of the best speed so far: the number is chosen again
LATER_S = 30.0  # so is a number below the most, after this time


class Threads:
    """
    The threads of a program: their number is chosen at the start, where the work slows down, and
    while it is below the most now and then. device: a torch.device; only a CPU has threads.
    """

    def __init__(self, device):
        self.most = torch.get_num_threads()
        is_fixed = os.environ.get("OMP_DYNAMIC", "").lower() == "false"
        self.is_fixed = is_fixed or self.most == 1 or device.type != "cpu"
        self.latest, self.earlier, self.patience = 0.0, None, LATER_S
        self.start_window()
        if not self.is_fixed:
            self.choose()

    def start_window(self):
        self.n, self.seconds = 0, 0.0

    def choose(self):
        """Set the number of threads that is fastest now, and print why if it changes."""
        before = torch.get_num_threads()
        times = probe({self.most, self.most - 1, self.most // 2, 1, before} - {0})
        fastest = min(times, key=times.get)
        ratio = times[before] / times[fastest]
        if ratio < GAIN:
            fastest = before
        torch.set_num_threads(fastest)
        if fastest != before:
            why = "other programs use the cores" if fastest < before else "cores are free again"
            line = f"{why}: {fastest} of {self.most} threads, {ratio:.1f} times as fast"
            print_line(line, sys.stderr)  # stdout may be a story
        # a number that had a speed before, if this one should be faster than that
        self.earlier = (before, self.latest) if fastest > before else None
        self.best, self.chosen = 0.0, time.monotonic()
        self.start_window()

    def choose_by_work(self, speed):
        """Go back to the earlier number where that was faster at the work itself."""
        (number, before), self.earlier = self.earlier, None
        if speed < before:
            torch.set_num_threads(number)
            self.patience *= 2
            print_line(f"back to {number} of {self.most} threads, which were faster", sys.stderr)

    def watch(self, n, seconds):
        """Choose again where it is time to. n: steps that took `seconds`, all of one kind."""
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
        if speed < SLOW * self.best or (is_late and torch.get_num_threads() < self.most):
            self.choose()

    def watched(self, steps):
        """The items of an iterator, watching how long it takes to make each."""
        start = time.perf_counter()
        for item in steps:
            self.watch(1, time.perf_counter() - start)
            yield item
            start = time.perf_counter()


def probe(numbers):
    """{number of threads: median seconds of a small computation by as many}, all in turn."""
    x, up = torch.ones(512, 128), torch.full((128, 512), 0.01)
    times = {n: [] for n in numbers}
    end = time.perf_counter() + PROBE_S * len(numbers)
    while time.perf_counter() < end or len(times[min(numbers)]) < 5:
        for n in numbers:
            torch.set_num_threads(n)
            start = time.perf_counter()
            # products and what lies between them, as in a layer
            (torch.relu(x @ up) @ up.T).add_(x).mean(-1)
            times[n].append(time.perf_counter() - start)
    return {n: statistics.median(found) for n, found in times.items()}
