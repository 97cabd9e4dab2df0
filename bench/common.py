"""What benchmarks share: where they run, variants that alternate, tables, other programs."""

import statistics
import subprocess
import sys

import torch

from configurator import UserError
from system.hardware import describe, pick_device, pick_dtype

CPU = torch.device("cpu")


def open_device(device="cpu", dtype=""):
    """
    The torch device and number format of two settings, None if dtype is empty; prints the first
    line of every benchmark, which names them.
    """
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device) if dtype else None
    about = describe(torch_device)
    facts = [about["device_name"], f"{about['threads']} threads", f"torch {about['torch']}"]
    print(*facts, *([torch_dtype] if dtype else []), sep=", ", flush=True)
    return torch_device, torch_dtype


def alternate(measures, rounds):
    """Call each of `measures`, {name: function}, once a round -> {name: [result of each round]}."""
    results = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def ratio(figures, base):
    """The median over the rounds of a figure's ratio to that of `base`."""
    return statistics.median(a / b for a, b in zip(figures, base, strict=True))


def median_and_range(figures, style):
    """The median, lowest and highest of some figures as texts."""
    return [f"{f(figures):{style}}" for f in (statistics.median, min, max)]


def output_of(command, **options):
    """What a program prints; UserError, with its last line, if it fails. options: of run."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        program = command[1] if command[0] == sys.executable else command[0]
        lines = (done.stderr.strip() or "it printed no error").splitlines()
        raise UserError(f"{program} failed: {lines[-1].removeprefix('error: ')}")
    return done.stdout + done.stderr
