"""
Measure tokens/s of the data loader alone, from ten shards of random tokens.

    python -m bench.loader --n_tokens=10_000_000
"""

import os
import tempfile

import numpy as np

from bench.common import CPU, median_and_range, open_device
from configurator import configure
from dataset import TrainBatches, prefetch
from report.tables import print_table
from training.runs import seconds_of

# -----------------------------------------------------------------------------
batch_size = 32  # sequences per batch
max_seq_len = 256  # tokens per sequence
n_tokens = 100_000_000  # tokens in the shards
folder = ""  # where to write the shards; empty: a new temporary folder
configure(globals())
# -----------------------------------------------------------------------------

open_device()
rng = np.random.default_rng(0)
with tempfile.TemporaryDirectory(dir=folder or None) as work_dir:
    shards = []
    for i in range(10):
        path = os.path.join(work_dir, f"{i}.bin")
        rng.integers(0, 4096, n_tokens // 10, dtype=np.uint16).tofile(path)
        shards.append(np.memmap(path, dtype=np.uint16, mode="r"))
    batches = TrainBatches(shards, max_seq_len, seed=1)
    n = batches.n_windows // batch_size  # batches per epoch

    def alone():
        for k in range(n):
            batches.at(k * batch_size, batch_size)

    def in_a_thread():
        stream = prefetch(lambda k: batches.at(k * batch_size, batch_size))
        for _ in range(n):
            next(stream)
        stream.close()

    millions = n * batch_size * max_seq_len / 1e6
    rows = []
    for name, way in (("alone", alone), ("in a thread", in_a_thread)):
        speeds = [millions / seconds_of(way, 1, CPU) for _ in range(5)]
        rows.append([name, *median_and_range(speeds, ",.0f")])
head = f"batches of {batch_size} x {max_seq_len} tokens"
print_table([head, "million tokens/s", "min", "max"], rows)
