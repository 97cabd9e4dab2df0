"""
Compare tokens/s of training steps: plain Llama's and ours.

    python -m bench.train --shapes=128 --ways=plain,modded
    python -m bench.train --llama2c=PATH   # and a checkout of karpathy/llama2.c

plain: plain Llama, AdamW, float32; eager: the same model and optimizer in --dtype; compiled: eager
plus torch.compile; modded: our architecture, Muon, compiled.
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
from functools import partial

from configurator import UserError, check_range, configure
from system.tuning import tune_process

# -----------------------------------------------------------------------------
shapes = "128,288"  # some of 128, 288, given
ways = "plain,eager,compiled,modded"  # some of these
llama2c = ""  # path of a checkout of karpathy/llama2.c, to measure it too
train_rounds = 7  # rounds, in which the ways alternate
train_steps = 4  # steps of each way per round
# the shape "given", as flags for train.py: 42 million parameters, like llama2.c's stories42M
given = "--dim=512 --n_layers=8 --n_heads=8 --vocab_size=32000 --max_seq_len=1024 --batch_size=32"
device = "auto"
dtype = "auto"
configure(globals())
# -----------------------------------------------------------------------------

tune_process()  # like train.py

import torch

from bench.common import alternate, median_and_range, open_device, ratio
from report.tables import print_table
from system.hardware import DTYPES, peak_flops
from training.runs import model_of, seconds_of, stepper, tokens_per_step
from training.settings import resolved

# flags for train.py
SHAPES = {
    "128": (
        "--dim=128 --n_layers=5 --n_heads=8 --n_kv_heads=4 --vocab_size=512 --max_seq_len=1024 "
        "--batch_size=32"
    ),
    "288": (
        "--dim=288 --n_layers=6 --n_heads=6 --vocab_size=4096 --max_seq_len=1024 --batch_size=16"
    ),
    "given": given,
}
WAYS = {
    "plain": "--arch=llama --optimizer=adamw --dtype=float32 --compile=False",
    "eager": "--arch=llama --optimizer=adamw --compile=False",
    "compiled": "--arch=llama --optimizer=adamw --compile=True",
    "modded": "--arch=modded --optimizer=muon --compile=True",
}


def llama2c_stepper(settings, torch_device):
    """
    Return what runs.stepper returns, for llama2.c's model and optimizer in float32. The model is
    compiled only above a dim of 128, where that makes it faster.
    """
    path = os.path.join(llama2c, "model.py")
    spec = importlib.util.spec_from_file_location("llama2c_model", path)
    theirs = sys.modules["llama2c_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    names = "dim n_layers n_heads n_kv_heads vocab_size max_seq_len".split()
    sizes = {name: settings[name] or None for name in names}  # n_kv_heads = 0: like n_heads
    model = theirs.Transformer(theirs.ModelArgs(**sizes, multiple_of=32)).to(torch_device)
    with contextlib.redirect_stdout(None):  # it reports on the optimizer
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), torch_device.type)
    call = torch.compile(model) if settings["dim"] > 128 else model
    shape = (settings["batch_size"], settings["max_seq_len"] + 1)
    tokens = torch.randint(0, settings["vocab_size"], shape, device=torch_device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        call(x, y)
        model.last_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model, optimizer


def settings_of(shape, way, torch_dtype):
    """Return train.py's settings for one of WAYS at one of SHAPES."""
    dtype = str(torch_dtype).removeprefix("torch.")
    flags = f"--max_seq_len=256 --dtype={dtype} {SHAPES[shape]} {WAYS.get(way, WAYS['plain'])}"
    return resolved(tuple(flags.split()))


def bench_shape(shape, way_names, torch_device, torch_dtype):
    """Measure the ways of these names at one of SHAPES, and print their table."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    dtypes = {torch.float32, torch_dtype}
    measures = {"peaks": lambda: {d: peak_flops(torch_device, d) for d in dtypes}}
    runs = {way: settings_of(shape, way, torch_dtype) for way in way_names}
    first = {}
    for way, settings in runs.items():
        try:
            make = llama2c_stepper if way == "llama2c" else stepper
            step, _, _ = make(settings, torch_device)
        except ValueError as e:
            raise UserError(f"shape {shape}: {e}") from None
        first[way] = seconds_of(step, 1, torch_device)
        seconds_of(step, 1, torch_device)
        measures[way] = partial(seconds_of, step, train_steps, torch_device)
    results = alternate(measures, train_rounds)
    rows = []
    for way, settings in runs.items():
        n = train_steps * tokens_per_step(settings)
        peaks = [of_dtype[DTYPES[settings["dtype"]]] for of_dtype in results["peaks"]]
        flops = model_of(settings).flops_per_token()
        speeds = [n / t for t in results[way]]
        share = f"{ratio([flops * v for v in speeds], peaks):.1%}" if all(peaks) else "unknown"
        relative = f"{ratio(results[way_names[0]], results[way]):.2f}x"
        figures = median_and_range(speeds, ",.0f")
        rows.append([way, *figures, relative, share, f"{first[way]:.1f} s"])
    print(
        f"\n{shape}: dim {settings['dim']}, {settings['n_layers']} layers, vocabulary "
        f"{settings['vocab_size']}, {tokens_per_step(settings):,} tokens per step"
    )
    print_table(["way", "tok/s", "min", "max", "ratio", "of peak", "first step"], rows)


way_names, shape_names = ways.split(","), shapes.split(",")
for setting, names, known in (("ways", way_names, WAYS), ("shapes", shape_names, SHAPES)):
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{setting} = {unknown[0]!r}: expected one or more of {', '.join(known)}")
check_range(1, train_rounds=train_rounds, train_steps=train_steps)
if llama2c:
    if not os.path.exists(os.path.join(llama2c, "model.py")):
        raise UserError(f"llama2c = {llama2c!r} is not a checkout: it has no model.py")
    way_names = ["llama2c", *way_names]
torch_device, torch_dtype = open_device(device, dtype)
print(
    f"medians of {train_rounds} rounds of {train_steps} steps; ratio: to the first line; of "
    "peak: of the matrix products that this machine reaches in the dtype; first step: with "
    "compilation"
)
with tempfile.TemporaryDirectory() as cache:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that compilation is measured in full
    for shape in shape_names:
        bench_shape(shape, way_names, torch_device, torch_dtype)
