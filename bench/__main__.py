"""
Benchmarks: how fast training and inference are, and what limits them.

    python -m bench.train        tokens/s of plain Llama's training step and of ours, at two shapes
    python -m bench.loader       tokens/s of the training batches alone
    python -m bench.checkpoint   size and time of checkpoints, and what they cost training
    python -m bench.infer        tokens/s of ./run, and of its peers beside it
    python -m bench.tokenizer    MB/s of training and encoding, beside peers
    python -m bench.scaling      tokens/s of several processes, by DDP and FSDP, against one

Run them from the repository's folder; --help lists the settings of each. The speed of a shared
machine varies, so variants alternate in one process, and medians are printed.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(__doc__.strip())
    else:
        sys.exit(f"error: cannot read {sys.argv[1]!r}; `python -m bench` lists the benchmarks")
