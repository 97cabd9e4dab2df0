"""
Runs of train.py in processes of their own, and how fast their steps would be: what sweep.py and
bench/ share.

A run is given by train.py's command-line arguments. It is done if its log has ended and holds the
settings that they stand for.
"""

import json
import math
import os
import time

import numpy as np
import torch

from dataset import DataPaths
from model import ACTIVATION_CHECKPOINTING, Transformer
from optim import make_optimizer
from system.hardware import pick_dtype
from training.fit import use_private_compile_cache
from training.runlog import RunLog
from training.settings import SAME_RESULT, SAME_WORK, TRAIN, args_of, resolved

REPO = os.path.dirname(TRAIN)


def changed_settings(config, other):
    """
    The names of the settings that make two runs of train.py different ones, wherever they write;
    config, other: their settings. One that is absent, because a run is older, has its default.
    """
    config, other = ({**resolved(), **settings} for settings in (config, other))
    return [n for n in config if n not in SAME_RESULT and config[n] != other.get(n)]


def same_run(config, other):
    return not changed_settings(config, other)


def read_run(out_dir):
    """{"start": line, "evals": [lines], "end": line} of a finished run's log; otherwise None."""
    log = RunLog(out_dir).read()
    if log.end.get("reason") != "finished" or not log.evals or not log.start:
        return None
    return {"start": log.start, "evals": log.evals, "end": log.end}


def shards_hint(settings, data_dir):
    """The commands that make the shards of these settings, in one line; "" if they exist."""
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
    """The model that `settings` of train.py describe. UserError for numbers that do not fit."""
    return Transformer(args_of(settings))


def work_of(settings, threads):
    """A key of the settings that decide the speed of a run's steps."""
    kept = {name: value for name, value in settings.items() if name not in SAME_WORK}
    return json.dumps([kept, threads], sort_keys=True)


def flops_of_step(settings):
    with torch.device("meta"):
        return model_of(settings).flops_per_token() * tokens_of_step(settings)


def tokens_per_second(settings, device, budget_s):
    """The speed of training steps of random tokens, measured for about budget_s seconds."""
    torch._dynamo.reset()  # it stops compiling after a few different models
    torch.manual_seed(1)
    step, _, _ = stepper(settings, device)
    seconds_of(step, 1, device)  # with compilation
    n = min(50, max(1, round(budget_s / seconds_of(step, 1, device))))
    return n * tokens_of_step(settings) / seconds_of(step, n, device)


def stepper(settings, device):
    """
    (a function that takes one step of the training that `settings` of train.py describe, its model,
    its optimizer).
    """
    use_private_compile_cache()
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

    return step, model, optimizer


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
    for k, line in enumerate(evals):
        if line["val_bpb"] <= target:
            last_two = evals[k::-1][:2]  # np.interp wants them in rising order
            points = ([e[name] for e in last_two] for name in ("val_bpb", clock))
            return float(np.interp(target, *points))
    return math.inf


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
