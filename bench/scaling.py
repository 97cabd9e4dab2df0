"""
Tokens/s of train.py with one process and with several that share the same steps, each on one thread
or one GPU.

    python -m bench.scaling --processes=1,2,4

Efficiency is the speed of n processes over n times that of one. "apart" are as many independent
runs at the same time: what the machine itself allows.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial

import numpy as np

from bench.common import alternate, open_device
from configurator import UserError, check_range, configure
from dataset import DataPaths
from report.tables import print_table
from training.runlog import RunLog
from training.settings import TRAIN, resolved

# -----------------------------------------------------------------------------
processes = "1,2"  # how many, on GPUs one each; a step is the same for all
scaling = "--dim=288 --n_layers=6 --n_heads=6 --max_seq_len=256"  # the run, in train.py's words
scaling_steps = 12  # of each run; the first three are not counted
scaling_rounds = 3  # in which the ways alternate
folder = ""  # of shards and runs; empty: a new folder among the system's temporary ones
device = "auto"
dtype = "auto"
configure(globals())
# -----------------------------------------------------------------------------


def random_shards(where, settings):
    """Shards of random tokens, which take as long as any, for a run of these settings."""
    paths = DataPaths(where, settings["vocab_source"], settings["vocab_size"])
    os.makedirs(paths.shards)
    n = settings["batch_size"] * settings["gradient_accumulation_steps"]
    for i, n_windows in enumerate((4, 4 * n * scaling_steps)):
        size = n_windows * settings["max_seq_len"] + 1
        ids = np.random.default_rng(i).integers(0, settings["vocab_size"], size)
        ids.astype("<u2").tofile(os.path.join(paths.shards, f"data0{i}.bin"))


def speed_of(n, kind, words, where):
    """Tokens/s of one run of n processes, or of n runs at once; the median of its steps."""
    launch = [sys.executable]
    if kind in ("DDP", "FSDP"):
        launch += f"-m torch.distributed.run --standalone --nproc_per_node={n}".split()
    words = [*words, "--fsdp"] if kind == "FSDP" else words
    runs = []
    for i in range(n if kind == "apart" else 1):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if kind == "apart" and "--device=cuda" in words:
            env["CUDA_VISIBLE_DEVICES"] = str(i)
        command = [*launch, TRAIN, *words, f"--out_dir={where}/run{i}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        runs.append(subprocess.Popen(command, env=env, **pipes))
    total = 0.0
    for i, process in enumerate(runs):
        errors = process.communicate()[1]
        if process.returncode:
            raise UserError(f"{n} {kind} failed: {errors.strip()[-300:]}")
        steps = RunLog(f"{where}/run{i}").read().train
        total += statistics.median(line["tok_s"] for line in steps[3:])
        shutil.rmtree(f"{where}/run{i}")
    return total


if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", processes):
    raise UserError(f"processes = {processes!r}: expected numbers with commas, like 1,2")
counts = sorted({int(n) for n in processes.split(",")} | {1})
check_range(5, scaling_steps=scaling_steps)
check_range(1, scaling_rounds=scaling_rounds)
torch_device, torch_dtype = open_device(device, dtype)
words = [*scaling.split(), f"--max_iters={scaling_steps}", "--log_interval=1", "--eval_iters=1"]
words += ["--eval_interval=1000000", f"--device={torch_device.type}", "--compile=False"]
words += [f"--dtype={str(torch_dtype).removeprefix('torch.')}"]
ways = [(n, kind) for n in counts for kind in (("apart", "DDP", "FSDP") if n > 1 else [""])]
with tempfile.TemporaryDirectory(dir=folder or None) as where:
    random_shards(where, resolved(tuple(words)))
    words.append(f"--data_dir={where}")
    measures = {way: partial(speed_of, *way, words, where) for way in ways}
    speeds = alternate(measures, scaling_rounds)
rows = []
one = statistics.median(speeds[1, ""])
for (n, kind), found in speeds.items():
    speed = statistics.median(found)
    rounds = ", ".join(f"{x / (n * y):.0%}" for x, y in zip(found, speeds[1, ""], strict=True))
    each = f"{speed / n:,.0f}"
    rows.append([f"{n} {kind}", f"{speed:,.0f}", each, f"{speed / n / one:.0%}", rounds])
print_table(["processes", "tokens/s", "each", "efficiency", "of rounds"], rows)
