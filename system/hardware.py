"""The machine: which device and dtype to compute with, and a description for the log."""

import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from configurator import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name):
    """
    Return the torch device for "auto" (the first available of cuda, mps and cpu) or a name such as
    "cuda:1". If it is not available, print a note and return the CPU. Raises UserError for a name
    that torch does not know.
    """
    have_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if have_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = {name}: expected one of auto, cpu, cuda, cuda:N, mps") from None
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = {"cpu": True, "mps": have_mps, "cuda": (device.index or 0) < n_cuda}
    if not available.get(device.type, False):
        print(f"note: device {name} is not available; using cpu")
        return torch.device("cpu")
    return device


def has_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices itself, without emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def is_bf16_faster(device):
    """
    Whether matrix products are clearly faster in bfloat16 than in float32. They are on every GPU
    that supports them. On CPUs it varies (Zen 5: four times as fast; an Intel Xeon without AMX:
    about half as fast), so both are measured, alternating, in a tenth of a second.
    """
    if not has_bf16(device) or device.type != "cpu":
        return has_bf16(device)
    in_float32, in_bfloat16 = fastest_products(512, (torch.float32, torch.bfloat16), 0.1)
    return in_float32 > 1.5 * in_bfloat16


def fastest_products(n, dtypes, seconds):
    """Return each dtype's shortest time for an n x n product, alternating for `seconds`."""
    best, end = [math.inf] * len(dtypes), time.perf_counter() + seconds
    inputs = [torch.ones(n, n, dtype=dtype) for dtype in dtypes]
    while time.perf_counter() < end:
        best = [min(b, seconds_of_product(x)) for b, x in zip(best, inputs, strict=True)]
    return best


def seconds_of_product(x):
    """Time x @ x on a CPU."""
    start = time.perf_counter()
    x @ x
    return time.perf_counter() - start


def pick_dtype(name, device):
    """
    Return the torch dtype for "auto" (bfloat16 if it is faster, else float32) or a name in DTYPES.
    If the device does not support it, print a note and return float32.
    """
    if name == "auto":
        return torch.bfloat16 if is_bf16_faster(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype = {name}: expected one of auto, {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    lacks_bf16 = dtype is torch.bfloat16 and not has_bf16(device)
    if lacks_bf16 or (dtype is torch.float16 and device.type != "cuda"):
        print(f"note: dtype {name} is not supported by {device_name(device)}; using float32")
        return torch.float32
    return dtype


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "cpu"
    return f"{device.type} ({platform.processor()})"


# (dense bfloat16 tensor-core TFLOP/s, memory in GB) from NVIDIA's data sheets, for the first key
# that is part of the device name
GPUS = {
    "B200": (2250, 180),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "H200": (989, 141),
    "A100": (312, 80),
    "L40S": (362, 48),
    "L4": (121, 24),
    "A10": (125, 24),
    "5090": (210, 32),
    "4090": (165, 24),
    "3090": (71, 24),
}


def peak_flops(device, dtype):
    """
    Return the device's peak FLOP/s for matrix products in `dtype`. For a GPU, it comes from the
    data sheet for bfloat16, and is None for another dtype or an unknown GPU. For a CPU, it is that
    of the fastest 1,024 x 1,024 product in 0.3 seconds, with the current number of threads.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = next((t for part, (t, _) in GPUS.items() if part in name), None)
        return tflops * 1e12 if tflops and dtype is torch.bfloat16 else None
    if device.type != "cpu":
        return None
    return 2 * 1024**3 / fastest_products(1024, [dtype], 0.3)[0]


def describe(device):
    """Return hardware and versions, for the first line of a log."""
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def git_commit():
    """Return this repository's commit, with "+" if files have changed; "" outside git."""
    folder = Path(__file__).resolve().parent.parent
    command = "git --git-dir=.git describe --always --abbrev=40 --exclude=* --dirty=+".split()
    try:
        return subprocess.check_output(
            command, cwd=folder, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
