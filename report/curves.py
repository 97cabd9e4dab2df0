"""
Runs as curves: what the logs of train.py and the results of sweep.py say, for pictures
(pictures.py) and for the live page (live.py).
"""

import contextlib
import json
import math
import os
import re
import statistics
from dataclasses import dataclass, field

from configurator import UserError
from training.rundir import LOG

# what curves are drawn against: name -> (field of a log's line, label, divisor)
AXES = {
    "steps": ("step", "steps", 1),
    "tokens": ("tokens", "training tokens (millions)", 1e6),
    "time": ("train_s", "training time (minutes)", 60),
}
EARLIER = re.compile(r"(previous(_\d+)?|compiled|moving|uploads)")  # folders that are no runs


@dataclass(eq=False)
class Run:
    """What the log of a run says, line by line; `read` goes on where it stopped."""

    folder: str
    name: str
    start: dict = field(default_factory=dict)
    train: list = field(default_factory=list)  # lines of kind train
    evals: list = field(default_factory=list)  # lines of kind eval
    end: dict = field(default_factory=dict)
    place: int = 0  # bytes of the log that are read
    inode: int = 0

    @property
    def log(self):
        return os.path.join(self.folder, LOG)

    def read(self):
        """
        Take in what was written since; from the beginning where the file is another one, which it
        is when a run is resumed or begun again. Returns the run.
        """
        try:
            with open(self.log, "rb") as f:
                now = os.fstat(f.fileno())
                if now.st_ino != self.inode or now.st_size < self.place:
                    self.start, self.train, self.evals, self.end = {}, [], [], {}
                    self.place, self.inode = 0, now.st_ino
                f.seek(self.place)
                text = f.read()
        except FileNotFoundError:
            return self
        whole = text[: text.rfind(b"\n") + 1]  # a last line may be half written
        self.place += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                self.add(json.loads(line))
        return self

    def add(self, line):
        kind = line.get("kind")
        if kind in ("train", "eval"):
            (self.train if kind == "train" else self.evals).append(line)
            self.end = {}  # it goes on
        elif kind == "start":
            self.start, self.end = line, {}
        elif kind == "end":
            self.end = line

    def series(self, kind, value, x):
        """(xs, ys) of a field of the lines of a kind, where it is a number; x: of AXES."""
        place, _, divisor = AXES[x]
        lines = self.train if kind == "train" else self.evals
        found = [
            (line[place] / divisor, line[value])
            for line in lines
            if isinstance(line.get(value), (int, float))
        ]
        return [p[0] for p in found], [p[1] for p in found]

    def rates(self):
        """
        {role: the rate over that of the first group, which the log has}; all groups rise and fall
        together.
        """
        rates = self.start.get("rates") or {"": 1.0}
        first = next(iter(rates.values()))
        if len(set(rates.values())) == 1:
            return {"": 1.0}
        return {role: rate / first for role, rate in rates.items()}


def find_runs(paths):
    """The runs of folders, see find_folders, read as far as they are."""
    folders = find_folders(paths)
    return [Run(f, name).read() for f, name in zip(folders, short_names(folders), strict=True)]


def find_folders(paths):
    """
    The folders of runs that paths name, each a run's or one of several runs. Raises UserError where
    there is none.
    """
    found = {}
    for path in paths:
        folder = os.path.dirname(path) if os.path.basename(path) == LOG else path
        if os.path.exists(os.path.join(folder, LOG)):
            found[folder] = None
            continue
        try:
            names = sorted(os.listdir(folder))
        except OSError as e:
            raise UserError(f"cannot read {folder}: {e.strerror}; name a run's out_dir") from None
        inner = [os.path.join(folder, n) for n in names if not EARLIER.fullmatch(n)]
        inner = [f for f in inner if os.path.exists(os.path.join(f, LOG))]
        if not inner:
            raise UserError(f"there is no {LOG} in {folder}, nor in a folder in it")
        found.update(dict.fromkeys(inner))
    return list(found)


def short_names(folders):
    """The folders' names, without what all of them share in front."""
    parts = [os.path.normpath(f).split(os.sep) for f in folders]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts] if len(parts) > 1 else [parts[0][-1]]


def smooth(values, part):
    """
    Means of what is near, on both sides, so that a falling curve is not drawn late: a value counts
    half that is `part` of the whole list away, a quarter at twice that. 0: the values as they are.
    """
    n = len(values)
    if part <= 0 or n < 3:
        return list(values)
    keep = 0.5 ** (1 / max(part * n, 1e-3))

    def sums_up_to(items):
        found, total, weight = [], 0.0, 0.0
        for item in items:
            total, weight = item + keep * total, 1 + keep * weight
            found.append((total, weight))
        return found

    before, behind = sums_up_to(values), sums_up_to(values[::-1])[::-1]
    return [
        (a + b - value) / (wa + wb - 1)
        for value, (a, wa), (b, wb) in zip(values, before, behind, strict=True)
    ]


def thinned(items, n):
    """At most n of a list, evenly spaced, the first and the last among them."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


# ---- results of sweeps


# what pictures need of a result, by its status
FIELDS = {
    "finished": "varied sweep val_loss val_bpb tokens train_s curve".split(),
    "diverged": "varied sweep curve".split(),
    "failed": "varied sweep error".split(),
}


def read_sweep(path):
    """The lines of results.jsonl of a sweep. Raises UserError where none has a result."""
    lines, bad = [], []
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for number, text in enumerate(f, 1):
                try:
                    line = json.loads(text)
                    for name in FIELDS[line["status"]]:
                        line[name]
                    lines.append(line)
                except (ValueError, KeyError, TypeError):
                    bad.append(number)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not lines:
        raise UserError(f"{path} has no results of sweep.py")
    if bad:
        print(f"warning: {path}, lines {', '.join(map(str, bad))}: no results, left out")
    if all(line["status"] == "failed" for line in lines):
        raise UserError(
            f"{path} has no result: all runs failed, the first with {lines[0]['error']}"
        )
    return lines


def sweep_axes(lines, x=""):
    """
    (what stands on the x axis, what tells its series apart) of a sweep: names of `varied`, but for
    the seed. By itself x is the setting with the most values.
    """
    values = {}
    for line in lines:
        for name, value in line["varied"].items():
            if name != "seed":
                values.setdefault(name, {})[value] = None
    if x and x not in values:
        raise UserError(f"x = {x}: this sweep varies {', '.join(values) or 'the seed alone'}")
    if not values:
        return "", []
    x = x or max(values, key=lambda name: len(values[name]))
    return x, [name for name in values if name != x]


def in_order(lines, x, series):
    """The lines by their settings: numbers by size, names as they came."""
    places = {}
    for line in lines:
        for name, value in line["varied"].items():
            of_name = places.setdefault(name, {})
            of_name.setdefault(value, len(of_name))

    def rank(line):
        found = [(name, line["varied"].get(name)) for name in (*series, x) if name]
        return [v if is_number(v) else places.get(n, {}).get(v, -1) for n, v in found]

    return sorted(lines, key=rank)


def summarize(lines, x, series, value):
    """
    [(label of a series, [(x, values of the finished seeds, number that diverged)])], see in_order.
    value: a field of the results.
    """
    found = {}
    for line in in_order(lines, x, series):
        if line["status"] == "failed":
            continue
        varied = line["varied"]
        label = ", ".join(
            str(varied[name]) if name == "run" else f"{name} = {show(varied[name])}"
            for name in series
            if name in varied
        )
        values, diverged = found.setdefault(label, {}).setdefault(varied.get(x, ""), ([], []))
        if line["status"] == "finished" and line.get(value) is not None:
            values.append(line[value])
        else:
            diverged.append(line["name"])
    return [
        (label, [(place, values, len(bad)) for place, (values, bad) in places.items()])
        for label, places in found.items()
    ]


def mean_and_sd(values):
    """Mean and standard deviation (0 of a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def show(value):
    """A setting's value in a label."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def value_of(lines):
    """The field that a sweep is judged by, and its label: bits per byte where they are known."""
    ended = [line for line in lines if line["status"] == "finished"]
    if all(line.get("val_bpb") is not None for line in ended):
        return "val_bpb", "validation loss (bits per byte)"
    return "val_loss", "validation loss (nats a token)"


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
