"""
Measure what limits training beside the arithmetic.

    python bench.py loader        # tokens/s of the training batches alone
    python bench.py checkpoint    # size and time of checkpoints, and what they cost training

Figures of shared machines vary: variants alternate in one process, and medians are printed.
"""

import os
import statistics
import tempfile
import time

import numpy as np
import torch

from checkpoint import CheckpointWriter, Snapshot, load_checkpoint, optimizer_tensors
from configurator import UserError, configure
from dataset import TrainBatches, ahead
from hardware import autocast, describe, pick_device, pick_dtype
from model import ModelArgs, Transformer

# -----------------------------------------------------------------------------
what = ""  # loader or checkpoint
batch_size = 32  # sequences a batch (loader)
max_seq_len = 256  # tokens a sequence
n_tokens = 100_000_000  # of the shards (loader)
# checkpoint
dim = 512  # 42 million parameters, as llama2.c's stories42M
n_layers = 8
n_heads = 8
vocab_size = 32000
step_size = 4  # sequences a training step
save_interval = 50  # steps of a round, in which one checkpoint is written
rounds = 3  # with and without, alternating
folder = ""  # where to write; empty: a new folder in the system's place for them
device = "auto"
dtype = "auto"
configure(globals(), positional="what")
# -----------------------------------------------------------------------------


def synchronize():
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function):
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def bench_loader():
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder or None) as where:
        shards = []
        for i in range(10):
            path = os.path.join(where, f"{i}.bin")
            rng.integers(0, 4096, n_tokens // 10, dtype=np.uint16).tofile(path)
            shards.append(np.memmap(path, dtype=np.uint16, mode="r"))
        batches = TrainBatches(shards, max_seq_len, seed=1)
        n = batches.n_windows // batch_size  # batches of an epoch

        def alone():
            for k in range(n):
                batches.at(k * batch_size, batch_size)

        def in_a_thread():
            stream = ahead(lambda k: batches.at(k * batch_size, batch_size))
            for _ in range(n):
                next(stream)
            stream.close()

        tokens = n * batch_size * max_seq_len
        for name, way in (("alone", alone), ("in its thread", in_a_thread)):
            speeds = [tokens / seconds(way) for _ in range(5)]
            print(
                f"batches of {batch_size} x {max_seq_len} tokens, {name}: "
                f"{statistics.median(speeds) / 1e6:,.0f} million tokens/s "
                f"({min(speeds) / 1e6:,.0f} to {max(speeds) / 1e6:,.0f})"
            )


def bench_checkpoint():
    torch.manual_seed(1)
    args = ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=n_heads, vocab_size=vocab_size, max_seq_len=max_seq_len
    )
    model = Transformer(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocab_size, (step_size, max_seq_len + 1), device=device)
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step():
        with autocast(device, dtype):
            loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def checkpoint():
        tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
        return {"iter_num": 1, "model_args": args.to_dict(), **tensors}

    step()
    take = Snapshot().take
    copies = [seconds(lambda: take(checkpoint())) for _ in range(6)]
    with tempfile.TemporaryDirectory(dir=folder or None) as where:
        writer = CheckpointWriter(where, keep_last=2)

        def save_and_wait():
            writer.save(checkpoint())
            writer.wait()

        writes = [seconds(save_and_wait) for _ in range(5)]
        path = os.path.join(where, "ckpt.pt")
        reads = [seconds(lambda: load_checkpoint(path)) for _ in range(3)]
        print(
            f"{model.n_params():,} parameters: {os.path.getsize(path) / 1e6:,.0f} MB a checkpoint\n"
            f"copying to memory {copies[0]:.2f} s the first time, then "
            f"{statistics.median(copies[1:]):.3f} s; writing as well "
            f"{statistics.median(writes):.2f} s; reading and checking "
            f"{statistics.median(reads):.2f} s"
        )

        def steps(save):
            save()
            for _ in range(save_interval):
                step()

        ways = {
            "none": lambda: None,
            "one, in the background": lambda: writer.save(checkpoint()),
            "one, waited for": save_and_wait,
        }
        times = {name: [] for name in ways}
        for _ in range(rounds):
            for name, save in ways.items():
                times[name].append(seconds(lambda save=save: steps(save)))
                writer.wait()
    if writer.error:
        raise UserError(writer.error)
    print(f"{save_interval} steps of {step_size} x {max_seq_len} tokens, with checkpoints:")
    for name, found in times.items():
        slowdown = statistics.median(
            t / plain for t, plain in zip(found, times["none"], strict=True)
        )
        print(
            f"  {name}: {statistics.median(found):.2f} s "
            f"({min(found):.2f} to {max(found):.2f}), {slowdown - 1:+.1%}"
        )


BENCHES = {"loader": bench_loader, "checkpoint": bench_checkpoint}
if what not in BENCHES:
    raise UserError(f"expected one of {', '.join(BENCHES)}, not {what!r}")
device = pick_device(device)
dtype = pick_dtype(dtype, device)
about = describe(device)
print(f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}, {dtype}")
BENCHES[what]()
