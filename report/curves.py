"""Runs of train.py as curves, for pictures (pictures.py) and for the live page (live.py)."""

import os
import re
from dataclasses import dataclass

from configurator import UserError, printable
from training.runlog import LOG, RunLog

# x axes: name -> (field of a log line, label, divisor)
AXES = {
    "steps": ("step", "steps", 1),
    "tokens": ("tokens", "training tokens (millions)", 1e6),
    "time": ("train_s", "training time (minutes)", 60),
}
# folders inside out_dir that do not count as runs
NOT_RUNS = re.compile(r"(previous(_\d+)?|compiled|moving|uploads)")


@dataclass(eq=False)
class Run(RunLog):
    """A run in a picture: its log, and a short name that tells it from other runs."""

    name: str = ""

    def series(self, kind, value, x):
        """Return (xs, ys) for a field of one kind of log line, without None; x: a key of AXES."""
        x_field, _, divisor = AXES[x]
        lines = self.train if kind == "train" else self.evals
        lines = [line for line in lines if line.get(value) is not None]
        return [line[x_field] / divisor for line in lines], [line[value] for line in lines]

    def rates(self):
        """
        Return {role: its learning rate relative to the first role's, which is the one in the log};
        all rates follow one schedule.
        """
        rates = self.start.get("rates") or {"": 1.0}
        first = next(iter(rates.values()))
        if len(set(rates.values())) == 1:
            return {"": 1.0}
        return {role: rate / first for role, rate in rates.items()}


def find_runs(paths):
    """Return the runs that `paths` name (see find_folders), with their logs read."""
    return [Run(folder, name=name).read() for folder, name in find_folders(paths).items()]


def find_folders(paths):
    """
    Return {folder: short name} of the runs that `paths` name. A path is the folder of a run, its
    log, or a folder with several runs in it. Raises UserError for a path without runs.
    """
    folders = {}
    for path in paths:
        folder = os.path.dirname(path) if os.path.basename(path) == LOG else path
        if os.path.exists(os.path.join(folder, LOG)):
            folders[folder] = None
            continue
        if not os.path.exists(folder):
            raise UserError(f"{folder} does not exist; pass the out_dir of a run")
        try:
            names = sorted(os.listdir(folder))
        except OSError as e:
            raise UserError(
                f"cannot read {folder}: {e.strerror}; pass the out_dir of a run"
            ) from None
        inner = [os.path.join(folder, n) for n in names if not NOT_RUNS.fullmatch(n)]
        inner = [f for f in inner if os.path.exists(os.path.join(f, LOG))]
        if not inner:
            raise UserError(f"{folder} contains no runs: no {LOG} in it or in its folders")
        folders.update(dict.fromkeys(inner))
    return dict(zip(folders, short_names(list(folders)), strict=True))


def short_names(folders):
    """Return the folders' paths without the parents that they all share."""
    folders = list(map(os.path.abspath, folders))
    shared = os.path.commonpath([os.path.dirname(f) for f in folders])
    return [printable(os.path.relpath(f, shared)).replace(os.sep, "/") for f in folders]


def smooth(values, part):
    """
    Return a running mean over both sides, so that smoothing does not delay a falling curve. Weights
    halve with every `part` (a fraction of the list's length) of distance. 0: no smoothing.
    """
    n = len(values)
    if part <= 0 or n < 3:
        return list(values)
    keep = 0.5 ** (1 / max(part * n, 1e-3))

    def sums_up_to(items):
        sums, total, weight = [], 0.0, 0.0
        for item in items:
            total, weight = item + keep * total, 1 + keep * weight
            sums.append((total, weight))
        return sums

    left, right = sums_up_to(values), sums_up_to(values[::-1])[::-1]
    return [
        (a + b - value) / (wa + wb - 1)
        for value, (a, wa), (b, wb) in zip(values, left, right, strict=True)
    ]


def thinned(items, n):
    """Return at most n items of a list, evenly spaced, including the first and the last."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]
