"""
Size of a checkpoint, seconds to copy, write and read it, and what saving costs training.

    python -m bench.checkpoint --folder=/mnt/disk
"""

import os
import tempfile
from functools import partial

import torch

from bench.common import alternate, median_and_range, open_device, ratio
from configurator import UserError, check_range, configure
from model import ModelArgs, Transformer
from report.tables import print_table
from training.checkpoint import CheckpointWriter, Snapshot, load_checkpoint, optimizer_tensors
from training.runs import seconds_of

# -----------------------------------------------------------------------------
dim = 512  # 42 million parameters, as llama2.c's stories42M
n_layers = 8
n_heads = 8
vocab_size = 32000
max_seq_len = 256  # tokens a sequence
step_size = 4  # sequences a training step
save_interval = 50  # steps of a round, in which one checkpoint is written
rounds = 3  # with and without a checkpoint, alternating
folder = ""  # where to write; empty: a new temporary folder
device = "auto"
dtype = "auto"
configure(globals())
# -----------------------------------------------------------------------------


def make_training(torch_device, torch_dtype):
    """(a function that takes a training step, one that makes a checkpoint) of a random model."""
    torch.manual_seed(1)
    args = ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=n_heads, vocab_size=vocab_size, max_seq_len=max_seq_len
    )
    model = Transformer(args).to(torch_device)
    model.dtype = torch_dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocab_size, (step_size, max_seq_len + 1), device=torch_device)
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step():
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def checkpoint():
        tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
        return {"iter_num": 1, "model_args": args.to_dict(), **tensors}

    print(f"{model.n_params():,} parameters")
    return step, checkpoint


def rows_of(times):
    return [[name, *median_and_range(values, ".3f")] for name, values in times.items()]


check_range(1, rounds=rounds)
torch_device, torch_dtype = open_device(device, dtype)
step, checkpoint = make_training(torch_device, torch_dtype)
seconds = partial(seconds_of, n=1, device=torch_device)
seconds(step)
take = Snapshot().take
first, *copies = [seconds(lambda: take(checkpoint())) for _ in range(6)]
with tempfile.TemporaryDirectory(dir=folder or None) as where:
    writer = CheckpointWriter(where, keep_last=2)

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
    path = os.path.join(where, "ckpt.pt")
    reads = [seconds(lambda: load_checkpoint(path)) for _ in range(3)]
    size = os.path.getsize(path)
    ways = {"none": lambda: None, "in the background": save, "waited for": save_and_wait}
    times = alternate({name: partial(steps_with, way) for name, way in ways.items()}, rounds)
if writer.error:
    raise UserError(writer.error)
once = {"copying to memory, the first time": [first], "copying to memory": copies}
once |= {"copying and writing": writes, "reading and checking": reads}
print_table([f"a checkpoint of {size / 1e6:,.0f} MB", "seconds", "from", "to"], rows_of(once))
slower = [f"{ratio(values, times['none']) - 1:+.1%}" for values in times.values()]
rows = [[*row, change] for row, change in zip(rows_of(times), slower, strict=True)]
print(f"\n{save_interval} steps of {step_size} x {max_seq_len} tokens, with one checkpoint")
print_table(["checkpoint", "seconds", "from", "to", "change"], rows)
