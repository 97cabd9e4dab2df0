"""
Measure the size of a checkpoint, the seconds to copy, write and read it, and how saving slows
down training.

    python -m bench.checkpoint --folder=/mnt/disk
"""

import os
import tempfile
from functools import partial

from bench.common import alternate, median_and_range, open_device, ratio
from configurator import UserError, check_range, configure
from report.tables import print_table
from training.checkpoint import CheckpointWriter, Snapshot, load_checkpoint, optimizer_tensors
from training.runs import seconds_of, stepper, tokens_per_step
from training.settings import resolved

# -----------------------------------------------------------------------------
# flags for train.py; the default has 42 million parameters, like llama2.c's stories42M
run = "--dim=512 --n_layers=8 --n_heads=8 --vocab_size=32000 --max_seq_len=256 --batch_size=4"
save_interval = 50  # steps per round; a round writes one checkpoint
rounds = 3  # rounds with and without a checkpoint, alternating
folder = ""  # where to write; empty: a new temporary folder
device = "auto"
dtype = "auto"
configure(globals())
# -----------------------------------------------------------------------------


def checkpoint():
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
    return {"iter_num": 1, "model_args": model.args.to_dict(), **tensors}


def rows_of(times):
    return [[name, *median_and_range(values, ".3f")] for name, values in times.items()]


check_range(1, rounds=rounds)
torch_device, torch_dtype = open_device(device, dtype)
settings = resolved(("--arch=llama", "--optimizer=adamw", "--compile=False", *run.split()))
settings["dtype"] = str(torch_dtype).removeprefix("torch.")
step, model, optimizer = stepper(settings, torch_device)
print(f"{model.n_params():,} parameters")
seconds = partial(seconds_of, n=1, device=torch_device)
seconds(step)
take = Snapshot().take
first, *copies = [seconds(lambda: take(checkpoint())) for _ in range(6)]
with tempfile.TemporaryDirectory(dir=folder or None) as work_dir:
    writer = CheckpointWriter(work_dir, keep_last=2)

    def save():
        writer.save(checkpoint())

    def save_and_wait():
        save()
        writer.wait()

    def steps_with(save):
        def steps():
            save()
            for _ in range(save_interval):
                step()

        result = seconds(steps)
        writer.wait()
        return result

    writes = [seconds(save_and_wait) for _ in range(5)]
    path = os.path.join(work_dir, "ckpt.pt")
    reads = [seconds(lambda: load_checkpoint(path)) for _ in range(3)]
    size = os.path.getsize(path)
    ways = {"none": lambda: None, "in the background": save, "blocking": save_and_wait}
    times = alternate({name: partial(steps_with, way) for name, way in ways.items()}, rounds)
if writer.error:
    raise UserError(writer.error)
once = {"copying to memory, the first time": [first], "copying to memory": copies}
once |= {"copying and writing": writes, "reading and checking": reads}
print_table([f"a checkpoint of {size / 1e6:,.0f} MB", "seconds", "min", "max"], rows_of(once))
slower = [f"{ratio(values, times['none']) - 1:+.1%}" for values in times.values()]
rows = [[*row, change] for row, change in zip(rows_of(times), slower, strict=True)]
print(f"\n{save_interval} steps of {tokens_per_step(settings):,} tokens, with one checkpoint")
print_table(["checkpoint", "seconds", "min", "max", "change"], rows)
