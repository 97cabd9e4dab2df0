"""What the machine has: the device and number format to compute with, and its description."""

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
    A torch device from "auto" (cuda, mps or cpu, the first that is there) or a name such as
    "cuda:1". One that is not there falls back to the CPU and says so. Raises UserError for a name
    that torch does not know.
    """
    have_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if have_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cpu": True, "mps": have_mps, "cuda": (device.index or 0) < n_cuda}
    if not there.get(device.type, False):
        print(f"device {name} is not available here; using cpu")
        return torch.device("cpu")
    return device


def has_bf16(device):
    """Whether the hardware itself multiplies bfloat16 matrices, and not an emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def bf16_pays(device):
    """
    Whether products in bfloat16 are clearly faster than in float32. A GPU that has them is; of CPUs
    it depends: Zen 5 is four times as fast, an Intel Xeon without AMX about half as fast. So it is
    measured, in a tenth of a second, both in turn.
    """
    if not has_bf16(device) or device.type != "cpu":
        return has_bf16(device)
    in_float32, in_bfloat16 = fastest_products(512, (torch.float32, torch.bfloat16), 0.1)
    return in_float32 > 1.5 * in_bfloat16


def fastest_products(n, dtypes, seconds):
    """The shortest time of a product of n x n matrices in each dtype, alternating for `seconds`."""
    best, end = [math.inf] * len(dtypes), time.perf_counter() + seconds
    inputs = [torch.ones(n, n, dtype=dtype) for dtype in dtypes]
    while time.perf_counter() < end:
        best = [min(b, seconds_of_product(x)) for b, x in zip(best, inputs, strict=True)]
    return best


def seconds_of_product(x):
    """How long x @ x takes on a CPU."""
    start = time.perf_counter()
    x @ x
    return time.perf_counter() - start


def pick_dtype(name, device):
    """
    The torch dtype to compute in from "auto" (bfloat16 where that is faster, else float32) or a
    name in DTYPES. One that the device lacks falls back to float32 and says so.
    """
    if name == "auto":
        return torch.bfloat16 if bf16_pays(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype = {name!r}: expected auto, {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    lacks_bf16 = dtype is torch.bfloat16 and not has_bf16(device)
    if lacks_bf16 or (dtype is torch.float16 and device.type != "cuda"):
        print(f"dtype {name} is not supported by {device_name(device)}; using float32")
        return torch.float32
    return dtype


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "cpu"
    return f"{device.type} ({platform.processor()})"


# Dense bfloat16 tensor-core TFLOP/s and memory in GB, from NVIDIA's data sheets; the first name
# that fits
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
    The most operations a second of this device in matrix products of `dtype`: for a GPU from its
    data sheet (bfloat16; None for others, and where it is unknown), for a CPU the best of some
    products of 1,024 x 1,024 matrices on the threads in use, measured in 0.3 seconds.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = next((t for part, (t, _) in GPUS.items() if part in name), None)
        return tflops * 1e12 if tflops and dtype is torch.bfloat16 else None
    if device.type != "cpu":
        return None
    return 2 * 1024**3 / fastest_products(1024, [dtype], 0.3)[0]


def describe(device):
    """Hardware and versions, for the head of a log."""
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def git_commit():
    """The commit of this repository, with "+" where files were changed since; "" outside git."""
    folder = Path(__file__).resolve().parent.parent
    command = "git --git-dir=.git describe --always --abbrev=40 --exclude=* --dirty=+".split()
    try:
        return subprocess.check_output(
            command, cwd=folder, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
