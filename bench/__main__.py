"""
Benchmarks: how fast training and inference are, and what limits them.

    python -m bench.train        tokens/s of training: plain Llama and ours, at two shapes
    python -m bench.loader       tokens/s of the data loader alone
    python -m bench.checkpoint   size and time of checkpoints, and how they slow down training
    python -m bench.infer        tokens/s of ./run, compared with its peers
    python -m bench.page         tokens/s, loading and memory of the model in browsers
    python -m bench.tokenizer    MB/s of training and encoding, compared with peers
    python -m bench.scaling      tokens/s of several processes (DDP, FSDP), compared with one

Run them from the repository's folder; --help lists the settings of each. The speed of a shared
machine varies, so variants alternate in one process, and the medians are printed.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(__doc__.strip())
    else:
        sys.exit(f"error: unknown argument {sys.argv[1]!r}: `python -m bench` lists the benchmarks")
