"""
Runs of train.py as a subprocess, what their logs say, and how fast their steps would be: what
bench.py, ablate.py and sweep.py share.

A run is given as words of train.py's command line. It counts as done where its log ends well and
has the settings that those words make.
"""

import ast
import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import fields

import torch

from configurator import apply, settings_of
from dataset import DataPaths
from model import ACTIVATION_CHECKPOINTING, ARCHS, ModelArgs, Transformer
from optim import make_optimizer
from system.hardware import pick_dtype

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = os.path.join(REPO, "train.py")
# settings that leave what a run computes as it is
OF_THE_START = "out_dir resume on_finish picture".split()
# settings that leave the work of a step as it is
SAME_WORK = set(
    "zero_init embedding_std head_std hidden_lr embedding_lr bigram_lr head_lr scalar_lr momentum "
    "momentum_warmup muon_weight_decay decay_shape muon_beta1 muon_beta2 base_learning_rate "
    "weight_decay beta1 beta2 warmup_iters cooldown_frac cooldown_shape final_lr_frac".split()
)


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
    """
    Whether two dicts of train.py's settings are of the same run, wherever it writes. Settings that
    one of them lacks, being older, are taken to be the default.
    """
    default = defaults()
    names = (settings.keys() | others.keys()) - set(OF_THE_START)
    return all(
        settings.get(name, default.get(name)) == others.get(name, default.get(name))
        for name in names
    )


@functools.cache
def defaults():
    return train_settings()


def start(words, out_dir, **options):
    """Run train.py to its end; returns the CompletedProcess. options: of subprocess.run."""
    return subprocess.run([sys.executable, TRAIN, *words, f"--out_dir={out_dir}"], **options)


def read_log(out_dir):
    """{"start": line, "evals": [lines], "end": line}, as far as the log in out_dir has them."""
    path = os.path.join(out_dir, "log.jsonl")
    run = {"evals": []}
    if not os.path.exists(path):
        return run
    with open(path, encoding="utf-8", errors="replace") as f:
        for text in f:
            with contextlib.suppress(ValueError):  # a line that was cut off
                line = json.loads(text)
                if line["kind"] == "eval":
                    run["evals"].append(line)
                else:
                    run[line["kind"]] = line
    return run


def read_run(out_dir):
    """read_log of a finished run; None where there is none, or it did not come to its end."""
    run = read_log(out_dir)
    ended = run.get("end", {}).get("reason") == "finished"
    return run if ended and run["evals"] and "start" in run else None


def shards_hint(settings, data_dir):
    """The commands that make the shards of these settings in one line; "" where they are there."""
    paths = DataPaths(data_dir, settings["vocab_source"], settings["vocab_size"])
    if os.path.isdir(paths.shards) and any(n.endswith(".bin") for n in os.listdir(paths.shards)):
        return ""
    stages = ["pretokenize"] if paths.is_llama2 else ["train_vocab", "pretokenize"]
    return " && ".join(f"python tinystories.py {stage} {paths.make_hint()}" for stage in stages)


# ---- speed of steps


def tokens_of_step(settings):
    return (
        settings["batch_size"] * settings["gradient_accumulation_steps"] * settings["max_seq_len"]
    )


def model_of(settings):
    """The model that `settings` of train.py describe. ValueError for numbers that do not fit."""
    return Transformer(args_of(settings))


def args_of(settings):
    """The ModelArgs that `settings` of train.py describe. ValueError where they do not fit."""
    args = {f.name: settings[f.name] for f in fields(ModelArgs) if f.name in settings}
    paths = DataPaths("", settings["vocab_source"], settings["vocab_size"])
    return ModelArgs.from_dict({**args, "vocab_size": paths.vocab_size})


def stepper(settings, device):
    """A function that takes one step of the training that `settings` of train.py describe."""
    model = model_of(settings).to(device)
    model.dtype, model.fp8_head = pick_dtype(settings["dtype"], device), settings["fp8_head"]
    for block in model.layers:
        block.recompute = ACTIVATION_CHECKPOINTING[settings["activation_checkpointing"]]
        block.attention.kernel = settings["attention"]
    if settings["compile"] == "True":
        model.compile_layers()
    optimizer = make_optimizer(model, settings["optimizer"], settings)
    shape = (settings["batch_size"], settings["max_seq_len"] + 1)
    tokens = torch.randint(0, model.args.vocab_size, shape, device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        for _ in range(settings["gradient_accumulation_steps"]):
            model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"] or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds_of(step, n, device):
    """Seconds of n calls of `step`."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


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
