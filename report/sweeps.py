"""Read the results of a sweep (results.jsonl), group them by setting, and make a table."""

import contextlib
import json
import math
import os
import statistics
from collections import Counter

import numpy as np

from configurator import UserError, printable
from report.tables import markdown
from system.fields import (
    each,
    fits,
    is_count,
    is_number,
    is_scalar,
    is_size,
    is_string,
    optional,
)
from system.progress import print_line


def is_curve(value):
    """Return whether value is a list of evaluations."""
    return type(value) is list and all(fits(point, POINT) for point in value)


def is_hardware(value):
    return each(is_scalar)(value) and set(value) == {"device_name", "threads", "platform", "torch"}


# the fields of a result, by its status; see system/fields.py
POINT = {"step": is_count, "tokens": is_count, "train_s": is_size}
POINT |= dict.fromkeys(("val_loss", "val_bpb"), optional(is_number))
RUN = {"name": is_string, "varied": each(is_scalar), "config": each(is_scalar)}
FIELDS = {
    "finished": {
        **RUN,
        **{"val_loss": is_number, "val_bpb": optional(is_number), "curve": is_curve},
        **{"steps": is_count, "tokens": is_count, "train_s": is_size},
    },
    "diverged": {**RUN, "curve": is_curve},
    "failed": {**RUN, "error": is_string},
}
OPTIONAL = dict.fromkeys(("title", "sweep", "arguments", "commit"), is_string)
OPTIONAL["hardware"] = is_hardware


def is_result(line):
    """Return whether a parsed line of results.jsonl is the result of a run."""
    status = line.get("status") if type(line) is dict else None
    if type(status) is not str or status not in FIELDS:
        return False
    return fits(line, FIELDS[status] | {k: v for k, v in OPTIONAL.items() if k in line})


def read_results(path):
    """Read results.jsonl; return (results, numbers of the lines that are not results)."""
    results, bad = [], []
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot read {path}: it is not a file")
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for number, text in enumerate(f, 1):
                line = None
                with contextlib.suppress(ValueError, RecursionError):
                    line = json.loads(text)
                if is_result(line):
                    results.append(line)
                else:
                    bad.append(number)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; pass the results.jsonl of a sweep") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    return results, bad


def read_sweep(path):
    """Read the results of a sweep. Raises UserError if no run has a result."""
    results, bad = read_results(path)
    if not results:
        raise UserError(f"{path} contains no results of sweep.py")
    if bad:
        numbers = ", ".join(map(str, bad[:20])) + ", ..." * (len(bad) > 20)
        print_line(f"warning: {path}: skipping lines that are not results: {numbers}")
    if all(line["status"] == "failed" for line in results):
        raise UserError(
            f"{path} contains no results: all runs failed, the first with {results[0]['error']}"
        )
    return results


def title_of(results):
    return printable(results[0].get("title") or results[0].get("sweep", ""))


def value_of(results):
    """Return the field that ranks runs, and its label: bits per byte if known, else the loss."""
    if all(line["val_bpb"] is not None for line in results if line["status"] == "finished"):
        return "val_bpb", "validation loss (bits per byte)"
    return "val_loss", "validation loss (nats per token)"


# ---- groups of runs


def sweep_axes(results, x=""):
    """
    Return (setting on the x axis, settings that distinguish its series) from the names in `varied`,
    without the seed. The default x is the setting with the most values.
    """
    values = {}
    for line in results:
        for name, value in line["varied"].items():
            if name != "seed":
                values.setdefault(name, {})[value] = None
    if x and x not in values:
        names = ", ".join(values) or "only the seed"
        raise UserError(f"x = {x}: expected a setting that this sweep varies ({names})")
    if not values:
        return "", []
    x = x or max(values, key=lambda name: len(values[name]))
    return x, [name for name in values if name != x]


def sort_results(results, x, series):
    """Return the results sorted by their settings: numbers by size, text by first appearance."""
    names = [name for name in (*series, x) if name]
    values_of = {name: [line["varied"].get(name) for line in results] for name in names}

    def rank(line):
        values = {name: line["varied"].get(name) for name in names}
        return [v if is_number(v) else values_of[name].index(v) for name, v in values.items()]

    return sorted(results, key=rank)


def summarize(results, x, series, value):
    """
    Return [(label of a series, [(x, values of the finished seeds, number that diverged)])], sorted
    as by sort_results(). value: a field of the results.
    """
    table = {}
    for line in sort_results(results, x, series):
        if line["status"] != "failed":
            row = table.setdefault(label_of(line["varied"], series), {})
            values, diverged = row.setdefault(line["varied"].get(x, ""), ([], []))
            is_finished = line["status"] == "finished"
            (values if is_finished else diverged).append(line.get(value))
    return [
        (label, [(setting, values, len(bad)) for setting, (values, bad) in row.items()])
        for label, row in table.items()
    ]


def label_of(varied, names):
    """Return a label such as "lr = 0.1, batch = 4"; a run's own name stays unchanged."""
    return ", ".join(
        format_value(varied[name]) if name == "run" else f"{name} = {format_value(varied[name])}"
        for name in names
        if name in varied
    )


def format_value(value):
    """Format a setting's value for a label."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


# ---- statistics


def mean_and_sd(values):
    """Return the mean and the standard deviation (0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def pooled_sd(groups):
    """
    Return the standard deviation of a single run, pooled over groups of runs that differ only in
    their seed and assumed to be the same in all groups; None if no group has two runs.
    """
    groups = [values for values in groups if len(values) > 1]
    if not groups:
        return None
    squares = sum((len(values) - 1) * statistics.variance(values) for values in groups)
    return math.sqrt(squares / sum(len(values) - 1 for values in groups))


def compare(values, base, sd):
    """
    Return (difference of the means of two lists, whether it exceeds two standard errors, None if sd
    is None); sd: the standard deviation of a single value.
    """
    difference = statistics.mean(values) - statistics.mean(base)
    if sd is None:
        return difference, None
    return difference, abs(difference) > 2 * sd * math.sqrt(1 / len(values) + 1 / len(base))


def time_to(curve, target, value):
    """
    Return the seconds of training until a curve first reaches `target`, interpolated linearly
    between evaluations, or inf if it never does. value: the field of its points.
    """
    curve = [point for point in curve if point[value] is not None]
    for k, point in enumerate(curve):
        if point[value] <= target:
            last_two = curve[k::-1][:2]  # np.interp needs rising values
            points = ([p[name] for p in last_two] for name in (value, "train_s"))
            return float(np.interp(target, *points))
    return math.inf


# ---- the table

ANSWERS = {None: "?", True: "yes", False: "no"}
HEADER = "run|settings|{}|difference|beyond noise|time to reach|ms per step|relative tok/s"
MACHINE = "Machine: {device_name}, {threads} threads, {platform}, torch {torch}."
EXPLANATION = """\
Values are the mean ± standard deviation over a run's seeds, with their number in brackets; lower is
better. *Difference* compares a run with the first run, `{first}`, or a run `a+b` with the run `a`.
*Beyond noise* says whether it exceeds two standard errors{noise}; by chance, about one row in
twenty does. *Time to reach* is the training time until a run reaches the final value of the run it
is compared with (median over seeds), and how many times as fast that is. Speeds are medians over
the runs.
"""


class Group:
    """The runs of a sweep that differ only in their seed."""

    def __init__(self, runs, value):
        self.runs, self.value = runs, value
        self.finished = [run for run in runs if run["status"] == "finished"]
        self.values = [run[value] for run in self.finished]
        self.mean = statistics.mean(self.values) if self.values else math.inf

    def median(self, amount, unit):
        """Return the median ratio of two fields; needs finished runs."""
        return statistics.median(run[amount] / max(run[unit], 1e-3) for run in self.finished)

    def time_to(self, base):
        """Return when its seeds reach another group's mean, and the speed-up, as text."""
        curves = [run["curve"] for run in self.finished]
        seconds = statistics.median(time_to(curve, base.mean, self.value) for curve in curves)
        if seconds == math.inf:
            return "never"
        base_s = statistics.median(run["train_s"] for run in base.finished)
        return f"{seconds:,.0f} s ({base_s / max(seconds, 1e-3):.1f} x)"

    def outcome(self):
        """Return mean, standard deviation and number of values, and how many runs have none."""
        counts = Counter(run["status"] for run in self.runs)
        parts = [f"{counts[s]} {s}" for s in ("diverged", "failed") if counts[s]]
        if self.values:
            spread = f" ± {statistics.stdev(self.values):.4f}" if len(self.values) > 1 else ""
            parts.insert(0, f"{self.mean:.4f}{spread} ({len(self.values)})")
        return " ".join(parts)


def groups_of(results, x=""):
    """Return {label: Group} for a sweep, sorted as by sort_results()."""
    value, _ = value_of(results)
    x, series = sweep_axes(results, x)
    runs = {}
    for line in sort_results(results, x, series):
        label = label_of(line["varied"], (*series, x)) or title_of(results)
        runs.setdefault(label, []).append(line)
    return {label: Group(lines, value) for label, lines in runs.items()}


def table(results, x=""):
    """
    Return the effect of each setting of a sweep as rows of text, the header first. A run `a+b` is
    compared with `a` if there is one, any other run with the first. Named runs are sorted by the
    run they are compared with, then best first.
    """
    groups = groups_of(results, x)
    labels = list(groups)
    sd = pooled_sd(group.values for group in groups.values())
    bases = {}
    for label in labels:
        base, plus, _ = label.partition("+")
        bases[label] = base if plus and base in groups else labels[0]
    if "run" in results[0]["varied"]:
        labels.sort(key=lambda label: (list(groups).index(bases[label]), groups[label].mean))
    unit = value_of(results)[1].partition("(")[2].rstrip(")")
    rows = [HEADER.format(unit).split("|")]
    for label in labels:
        group, base = groups[label], groups[bases[label]]
        arguments = group.runs[0].get("arguments")
        difference = beyond = reached = ms = relative = ""
        if group.values and base.values:
            ms = f"{1000 * group.median('train_s', 'steps'):,.0f}"
            speed, base_speed = (g.median("tokens", "train_s") for g in (group, base))
            relative = f"{speed / max(base_speed, 1e-3):.2f}"
            if group is not base:
                number, is_beyond = compare(group.values, base.values, sd)
                difference, beyond = f"{number:+.4f}", ANSWERS[is_beyond]
                reached = group.time_to(base)
        settings = f"`{arguments}`" if arguments else ""
        outcome = group.outcome()
        rows.append([label, settings, outcome, difference, beyond, reached, ms, relative])
    return rows


def failures(results):
    """Return a line of text for each run that failed."""
    return [f"{r['name']} failed: {r['error']}" for r in results if r["status"] == "failed"]


def section(results, x=""):
    """Return a sweep as a section of a Markdown document: explanation, machine and table."""
    groups = groups_of(results, x)
    sd = pooled_sd(group.values for group in groups.values())
    noise = "" if sd is None else f" (a single run deviates by {sd:.4f}, pooled over all rows)"
    measured = [line for line in results if "hardware" in line]
    machines = {MACHINE.format(**line["hardware"]) for line in measured}
    commits = {line.get("commit", "")[:9] for line in measured} - {""}
    lines = [
        f"## {title_of(results)}\n",
        EXPLANATION.format(first=next(iter(groups)), noise=noise),
        *sorted(machines),
        f"Commit: {', '.join(sorted(commits))}.\n",
        markdown(table(results, x)) + "\n",
        *(f"- {sentence}" for sentence in failures(results)),
    ]
    return "\n".join(lines)
