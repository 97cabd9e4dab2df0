"""
Runs of train.py as a subprocess, and what their logs say: what bench.py and ablate.py share.

A run is given as words of train.py's command line. It counts as done where its log ends well and
has the settings that those words make.
"""

import ast
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys

from configurator import apply, settings_of
from dataset import DataPaths
from model import ARCHS

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")


def train_settings(words=()):
    """
    {name: value} of every setting of train.py as `words` leave them, those of --arch included.
    Raises UserError for words that train.py would not take.
    """
    settings = {"__file__": TRAIN}
    with open(TRAIN, encoding="utf-8") as f:
        body = ast.parse(f.read()).body
    for node in body:
        if not isinstance(node, ast.Assign):
            continue
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "configure":
            break
        if isinstance(node.value, ast.Constant):
            settings[node.targets[0].id] = node.value.value
    given = apply(settings, words)
    options = ARCHS.get(settings["arch"], {})
    return settings_of(settings) | {k: v for k, v in options.items() if k not in given}


def same_run(settings, others):
    """Whether two dicts of train.py's settings are of the same run; where it writes is no matter"""
    return {**settings, "out_dir": ""} == {**others, "out_dir": ""}


def start(words, out_dir, **options):
    """Run train.py to its end; returns the CompletedProcess. options: of subprocess.run."""
    return subprocess.run([sys.executable, TRAIN, *words, f"--out_dir={out_dir}"], **options)


def read_run(out_dir):
    """
    {"start": line, "evals": [lines], "end": line} of the log of a finished run; None where there is
    none, or it did not come to its end.
    """
    path = os.path.join(out_dir, "log.jsonl")
    if not os.path.exists(path):
        return None
    run = {"evals": []}
    with open(path, encoding="utf-8", errors="replace") as f:
        for text in f:
            with contextlib.suppress(ValueError):  # a line that was cut off
                line = json.loads(text)
                if line["kind"] == "eval":
                    run["evals"].append(line)
                else:
                    run[line["kind"]] = line
    ended = run.get("end", {}).get("reason") == "finished"
    return run if ended and run["evals"] and "start" in run else None


def shards_hint(settings, data_dir):
    """The commands that make the shards of these settings in one line; "" where they are there."""
    paths = DataPaths(data_dir, settings["vocab_source"], settings["vocab_size"])
    if os.path.isdir(paths.shards) and any(n.endswith(".bin") for n in os.listdir(paths.shards)):
        return ""
    stages = ["pretokenize"] if paths.is_llama2 else ["train_vocab", "pretokenize"]
    return " && ".join(f"python tinystories.py {stage} {paths.make_hint()}" for stage in stages)


# ---- curves: lists of evaluations, each with train_s, time_s and val_bpb


def with_all_s(evals):
    """
    A curve with all_s as well, the seconds from the start of the process with one evaluation alone:
    those in between are there to draw the curve, and would make a run with many of them look slow.
    """
    before_training = evals[0]["time_s"] - evals[0]["train_s"]  # and the first evaluation
    return [{**line, "all_s": before_training + line["train_s"]} for line in evals]


def time_to(evals, target, clock="train_s"):
    """
    The seconds of `clock` (train_s or all_s) at which a curve first comes down to `target` bits
    per byte, linear between evaluations; inf where it never does.
    """
    before = None
    for line in evals:
        if line["val_bpb"] <= target:
            if before is None:
                return line[clock]
            share = (before["val_bpb"] - target) / (before["val_bpb"] - line["val_bpb"])
            return before[clock] + share * (line[clock] - before[clock])
        before = line
    return math.inf


def value_at(evals, seconds):
    """
    Bits per byte after so many seconds of training, linear between evaluations; None before the
    first of them.
    """
    before = None
    for line in evals:
        if line["train_s"] >= seconds:
            if before is None:
                return line["val_bpb"] if line["train_s"] == seconds else None
            share = (seconds - before["train_s"]) / (line["train_s"] - before["train_s"])
            return before["val_bpb"] + share * (line["val_bpb"] - before["val_bpb"])
        before = line
    return before["val_bpb"] if before else None


def race(plain, ours, sprint):
    """
    What one run of the plain recipe, one of ours and one of ours in a fraction of the time say:
    seconds each needs to the plain recipe's final bits per byte, by both clocks, and the ratios.
    """
    plain, ours, sprint = (with_all_s(run["evals"]) for run in (plain, ours, sprint))
    target = plain[-1]["val_bpb"]
    found = {
        "target": target,
        "ours_final": ours[-1]["val_bpb"],
        "sprint_final": sprint[-1]["val_bpb"],
    }
    for clock in ("train_s", "all_s"):
        found[f"plain_{clock}"] = plain_s = time_to(plain, target, clock)
        # the sprint is one point: its schedule ends there, and nothing before it counts
        for name, evals in (("ours", ours), ("sprint", sprint[-1:])):
            seconds = time_to(evals, target, clock)
            found |= {f"{name}_{clock}": seconds, f"{name}_{clock}_ratio": plain_s / seconds}
    return found


# ---- differences


def pooled_sd(groups):
    """
    The standard deviation of one run around the mean of its like, from groups of runs that differ
    by their seed alone: taken to be the same in all groups, it is known better than in any of them.
    None where no group has two.
    """
    groups = [values for values in groups if len(values) > 1]
    if not groups:
        return None
    squares = sum((len(values) - 1) * statistics.variance(values) for values in groups)
    return math.sqrt(squares / sum(len(values) - 1 for values in groups))


def compare(values, base, sd):
    """
    Mean of some results, its difference to that of `base`, and whether this is more than two
    standard errors, sd being the standard deviation of one result; None where that is unknown.
    """
    mean = statistics.mean(values)
    difference, beyond_noise = mean - statistics.mean(base), None
    if sd is not None:
        beyond_noise = abs(difference) > 2 * sd * math.sqrt(1 / len(values) + 1 / len(base))
    return {
        "mean": mean,
        "n": len(values),
        "difference": difference,
        "beyond_noise": beyond_noise,
    }
