"""Shared by the benchmarks: their device, alternating variants, statistics, other programs."""

import statistics
import subprocess
import sys

import torch

from configurator import UserError
from system.hardware import describe, pick_device, pick_dtype

CPU = torch.device("cpu")


def open_device(device="cpu", dtype=""):
    """
    Return the torch device and dtype of two settings; the dtype is None if its setting is empty.
    Prints the first line of every benchmark, which names them.
    """
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device) if dtype else None
    about = describe(torch_device)
    facts = [about["device_name"], f"{about['threads']} threads", f"torch {about['torch']}"]
    print(*facts, *([torch_dtype] if dtype else []), sep=", ", flush=True)
    return torch_device, torch_dtype


def alternate(measures, rounds):
    """Call each of `measures`, {name: function}, once per round; return {name: [results]}."""
    results = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def ratio(figures, base):
    """Return the median over the rounds of the ratio of `figures` to `base`."""
    return statistics.median(a / b for a, b in zip(figures, base, strict=True))


def median_and_range(figures, style):
    """Return the median, minimum and maximum of some figures, formatted."""
    return [f"{f(figures):{style}}" for f in (statistics.median, min, max)]


def output_of(command, **options):
    """Return a program's output; on failure raise UserError with its last line. options: of run."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        program = command[1] if command[0] == sys.executable else command[0]
        lines = (done.stderr.strip() or "it printed no error").splitlines()
        raise UserError(f"{program} failed: {lines[-1].removeprefix('error: ')}")
    return done.stdout + done.stderr
