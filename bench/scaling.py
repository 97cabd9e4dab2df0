"""
Measure tokens/s of train.py with one process and with several that share each step, each on one
thread or one GPU.

    python -m bench.scaling --processes=1,2,4

Efficiency is the speed of n processes over n times the speed of one. "apart" means n independent
runs at the same time, which show what the machine itself allows.
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
processes = "1,2"  # numbers of processes to compare, on GPUs one each; the steps are the same
scaling = "--dim=288 --n_layers=6 --n_heads=6 --max_seq_len=256"  # flags for train.py
scaling_steps = 12  # steps of each run; the first three are not counted
scaling_rounds = 3  # rounds, in which the ways alternate
folder = ""  # where to write shards and runs; empty: a new temporary folder
device = "auto"
dtype = "auto"
configure(globals())
# -----------------------------------------------------------------------------


def random_shards(data_dir, settings):
    """Write shards of random tokens, which train as fast as any, for a run of these settings."""
    paths = DataPaths(data_dir, settings["vocab_source"], settings["vocab_size"])
    os.makedirs(paths.shards)
    n = settings["batch_size"] * settings["gradient_accumulation_steps"]
    for i, n_windows in enumerate((4, 4 * n * scaling_steps)):
        size = n_windows * settings["max_seq_len"] + 1
        ids = np.random.default_rng(i).integers(0, settings["vocab_size"], size)
        ids.astype("<u2").tofile(os.path.join(paths.shards, f"data0{i}.bin"))


def speed_of(n, kind, flags, work_dir):
    """Return tokens/s of one run of n processes, or of n runs at once; medians over the steps."""
    launch = [sys.executable]
    if kind in ("DDP", "FSDP"):
        launch += f"-m torch.distributed.run --standalone --nproc_per_node={n}".split()
    flags = [*flags, "--fsdp"] if kind == "FSDP" else flags
    runs = []
    for i in range(n if kind == "apart" else 1):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if kind == "apart" and "--device=cuda" in flags:
            env["CUDA_VISIBLE_DEVICES"] = str(i)
        command = [*launch, TRAIN, *flags, f"--out_dir={work_dir}/run{i}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        runs.append(subprocess.Popen(command, env=env, **pipes))
    total = 0.0
    for i, process in enumerate(runs):
        errors = process.communicate()[1]
        if process.returncode:
            failed = f"process {i + 1} of {n}" if kind == "apart" else f"{kind} with {n} processes"
            raise UserError(f"{failed if kind else 'one process'} failed: {errors.strip()[-300:]}")
        steps = RunLog(f"{work_dir}/run{i}").read().train
        total += statistics.median(line["tok_s"] for line in steps[3:])
        shutil.rmtree(f"{work_dir}/run{i}")
    return total


if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", processes):
    raise UserError(f"processes = {processes!r}: expected numbers separated by commas, like 1,2")
counts = sorted({int(n) for n in processes.split(",")} | {1})
check_range(5, scaling_steps=scaling_steps)
check_range(1, scaling_rounds=scaling_rounds)
torch_device, torch_dtype = open_device(device, dtype)
flags = [*scaling.split(), f"--max_iters={scaling_steps}", "--log_interval=1", "--eval_iters=1"]
flags += ["--eval_interval=1000000", f"--device={torch_device.type}", "--compile=False"]
flags += [f"--dtype={str(torch_dtype).removeprefix('torch.')}"]
ways = [(n, kind) for n in counts for kind in (("apart", "DDP", "FSDP") if n > 1 else [""])]
with tempfile.TemporaryDirectory(dir=folder or None) as work_dir:
    random_shards(work_dir, resolved(tuple(flags)))
    flags.append(f"--data_dir={work_dir}")
    measures = {way: partial(speed_of, *way, flags, work_dir) for way in ways}
    results = alternate(measures, scaling_rounds)
rows = []
single = results[1, ""]
for (n, kind), speeds in results.items():
    speed = statistics.median(speeds)
    rounds = ", ".join(f"{x / (n * y):.0%}" for x, y in zip(speeds, single, strict=True))
    efficiency = f"{speed / n / statistics.median(single):.0%}"
    rows.append([f"{n} {kind}", f"{speed:,.0f}", f"{speed / n:,.0f}", efficiency, rounds])
print_table(["processes", "tokens/s", "each", "efficiency", "per round"], rows)
