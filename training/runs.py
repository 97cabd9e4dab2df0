"""
Separate runs of train.py, and the speed of their steps: shared by sweep.py and bench/.

A run is identified by train.py's command-line arguments. It is done if its log has ended and has
the same settings.
"""

import json
import math
import os
import time

import torch

from dataset import DataPaths
from model import ACTIVATION_CHECKPOINTING, Transformer
from optim import make_optimizer
from system.hardware import pick_dtype
from training.fit import use_private_compile_cache
from training.settings import SAME_RESULT, SAME_WORK, TRAIN, args_of, resolved

REPO = os.path.dirname(TRAIN)


def changed_settings(config, other):
    """
    Return the names of the settings that make two runs of train.py differ, wherever they write.
    config, other: their settings; one that an older run lacks has its default.
    """
    config, other = ({**resolved(), **settings} for settings in (config, other))
    return [n for n in config if n not in SAME_RESULT and config[n] != other.get(n)]


def same_run(config, other):
    return not changed_settings(config, other)


def shards_hint(settings, data_dir):
    """Return the commands that create the shards of these settings; "" if they exist."""
    paths = DataPaths(data_dir, settings["vocab_source"], settings["vocab_size"])
    if os.path.isdir(paths.shards) and any(n.endswith(".bin") for n in os.listdir(paths.shards)):
        return ""
    stages = ["pretokenize"] if paths.is_llama2 else ["train_vocab", "pretokenize"]
    return " && ".join(f"python tinystories.py {stage} {paths.flags()}" for stage in stages)


# ---- speed of steps


def tokens_per_step(settings):
    return (
        settings["batch_size"] * settings["gradient_accumulation_steps"] * settings["max_seq_len"]
    )


def model_of(settings):
    """Return the Transformer for settings of train.py. Raises UserError if they do not fit."""
    return Transformer(args_of(settings))


def work_of(settings, threads):
    """Return a key of everything that decides the speed of a run's steps."""
    kept = {name: value for name, value in settings.items() if name not in SAME_WORK}
    return json.dumps([kept, threads], sort_keys=True)


def flops_of_step(settings):
    with torch.device("meta"):
        return model_of(settings).flops_per_token() * tokens_per_step(settings)


def tokens_per_second(settings, device, budget_s):
    """Return the speed of training steps on random tokens, measured for about budget_s seconds."""
    torch._dynamo.reset()  # it would stop compiling after a few different models
    torch.manual_seed(1)
    step, _, _ = stepper(settings, device)
    seconds_of(step, 1, device)  # compiles
    n = min(50, max(1, round(budget_s / seconds_of(step, 1, device))))
    return n * tokens_per_step(settings) / seconds_of(step, n, device)


def stepper(settings, device):
    """
    Return (step, model, optimizer) for settings of train.py; step() takes one training step on
    random tokens.
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
    """Return the seconds that n calls of `step` take."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
