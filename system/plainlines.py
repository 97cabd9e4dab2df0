"""A progress bar for files and pipes: plain lines now and then. See progress.py."""

import time

from tqdm import tqdm

SHARE = 0.1  # of the work between two plain lines, or
SECONDS = 30.0  # this long, whichever comes first
SHORTEST = 2.0  # seconds between two plain lines at least, so that short work prints only its end


class PlainLines(tqdm):
    """A tqdm whose output is lines of its own: every tenth of the work or 30 s, and the end."""

    def __init__(self, iterable=None, desc="", total=None, unit="it", **options):
        self.printed_n, self.printed_at = options.get("initial", 0), time.monotonic()
        self.closing = False
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        unit = unit if unit == "B" else f" {unit.strip()}"
        counted = unit if unit[-1] in "Bs" else f"{unit}s"
        usual = (
            ("{desc}: " if desc else "")
            + ("{percentage:.0f}%, " if total else "")
            + "{n_fmt}"
            + (" of {total_fmt}" if total else "")
            + f"{counted} in {{elapsed}}, {{rate_fmt}}{{postfix}}"
        )
        options["bar_format"] = options.get("bar_format", usual).replace("|{bar}|", ",")
        super().__init__(iterable, desc, total, mininterval=0.5, unit=unit, **options)

    def display(self, msg=None, pos=None):
        now = time.monotonic()
        waited = now - self.printed_at
        is_due = waited >= SECONDS or (self.total and self.n - self.printed_n >= SHARE * self.total)
        is_end = self.closing and self.n != self.printed_n
        if is_end or (is_due and waited >= SHORTEST):
            self.printed_n, self.printed_at = self.n, now
            print(str(self), file=self.fp, flush=True)
        return True

    def clear(self, *args, **options):
        """There is no bar to wipe away before another line is printed."""

    def close(self):
        self.closing = not self.disable
        if self.closing:
            self.display()
        self.disable = True
        super().close()
