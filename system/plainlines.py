"""Progress for files and pipes: a plain line from time to time. See progress.py."""

import time

from tqdm import tqdm

# A line is due after this fraction of the work, or after this many seconds
SHARE, SECONDS = 0.1, 30.0
SHORTEST = 2.0  # minimum seconds between lines, so that short work prints only its last line


class PlainLines(tqdm):
    """A tqdm that prints whole lines: after each tenth of the work or 30 s, and at the end."""

    def __init__(self, iterable=None, desc="", total=None, unit="it", **options):
        self.printed_n, self.printed_at = options.get("initial", 0), time.monotonic()
        self.closing = False
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        unit = unit if unit == "B" else f" {unit.strip()}"
        counted = unit if unit[-1] in "Bs" else f"{unit}s"
        default = (
            ("{desc}: " if desc else "")
            + ("{percentage:.0f}%, " if total else "")
            + "{n_fmt}"
            + (" of {total_fmt}" if total else "")
            + f"{counted} in {{elapsed}}, {{rate_fmt}}{{postfix}}"
        )
        options["bar_format"] = options.get("bar_format", default).replace("|{bar}|", ",")
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
        """Do nothing: there is no bar to erase."""

    def close(self):
        self.closing = not self.disable
        if self.closing:
            self.display()
        self.disable = True
        super().close()
