"""Runs of train.py as curves, for pictures (pictures.py) and for the live page (live.py)."""

import os
import re
from dataclasses import dataclass

from configurator import UserError, printable
from training.runlog import LOG, RunLog

# what curves are drawn against: name -> (field of a log's line, label, divisor)
AXES = {
    "steps": ("step", "steps", 1),
    "tokens": ("tokens", "training tokens (millions)", 1e6),
    "time": ("train_s", "training time (minutes)", 60),
}
EARLIER = re.compile(r"(previous(_\d+)?|compiled|moving|uploads)")  # not folders of runs


@dataclass(eq=False)
class Run(RunLog):
    """A run in a picture: its log, and a name among the other runs."""

    name: str = ""

    def series(self, kind, value, x):
        """(xs, ys) of a field of the lines of a kind, where it is a number; x: of AXES."""
        place, _, divisor = AXES[x]
        lines = self.train if kind == "train" else self.evals
        lines = [line for line in lines if line.get(value) is not None]
        return [line[place] / divisor for line in lines], [line[value] for line in lines]

    def rates(self):
        """
        {role: its learning rate relative to the first role's, whose rate is in the log}; all rates
        follow one schedule.
        """
        rates = self.start.get("rates") or {"": 1.0}
        first = next(iter(rates.values()))
        if len(set(rates.values())) == 1:
            return {"": 1.0}
        return {role: rate / first for role, rate in rates.items()}


def find_runs(paths):
    """The runs in some folders (see find_folders), with what their logs hold so far."""
    return [Run(folder, name=name).read() for folder, name in find_folders(paths).items()]


def find_folders(paths):
    """
    {folder: short name} of the runs that `paths` name. A path is the folder of a run, its log, or a
    folder that holds folders of runs. Raises UserError for a path without any.
    """
    folders = {}
    for path in paths:
        folder = os.path.dirname(path) if os.path.basename(path) == LOG else path
        if os.path.exists(os.path.join(folder, LOG)):
            folders[folder] = None
            continue
        try:
            names = sorted(os.listdir(folder))
        except OSError as e:
            raise UserError(f"cannot read {folder}: {e.strerror}; name a run's out_dir") from None
        inner = [os.path.join(folder, n) for n in names if not EARLIER.fullmatch(n)]
        inner = [f for f in inner if os.path.exists(os.path.join(f, LOG))]
        if not inner:
            raise UserError(f"there is no {LOG} in {folder}, nor in a folder in it")
        folders.update(dict.fromkeys(inner))
    return dict(zip(folders, short_names(list(folders)), strict=True))


def short_names(folders):
    """The folders' names without the parent folders that all of them share."""
    folders = list(map(os.path.abspath, folders))
    shared = os.path.commonpath([os.path.dirname(f) for f in folders])
    return [printable(os.path.relpath(f, shared)).replace(os.sep, "/") for f in folders]


def smooth(values, part):
    """
    A running mean over both sides, so that a falling curve is not drawn late. A value at a distance
    of `part` of the whole list has half the weight, one at twice that a quarter. 0: no smoothing.
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
    """At most n of a list, evenly spaced, with the first and the last."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]
