"""
Fuzz run.c with libFuzzer: model files, tokenizer files, prompts and tables of guesses.

    python tests/fuzz.py --seconds=60 --out=fuzz

The seeds are written by our own exporters. Needs clang. If a target fails, exits with status 1 and
leaves the input in the folder.
"""

import argparse
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import EVERYTHING, REPO, random_model

from bpe import PATTERNS, BPETokenizer, train_bpe
from formats.modelbin import DTYPES, export_model
from text.draft import write_draft
from text.synth import make_stories
from tokenizer import byte_level_c_file, open_tokenizer, train_sentencepiece

TARGETS = ("model", "tokenizer", "text", "draft")
VOCAB_SIZE = 300
FLAGS = (
    "-std=c11 -ffp-contract=off -Wno-psabi -g -O1 -fsanitize=fuzzer,address,undefined "
    "-fno-sanitize-recover=all -Wno-unused-function"
).split()


def with_few_ranges(data):
    """Return a byte-level tokenizer file with only its first character ranges, to make it small."""
    n = struct.unpack_from("<I", data, 28)[0]
    return data[:28] + struct.pack("<I", min(n, 20)) + data[32 : 32 + 240] + data[32 + 12 * n :]


def make_seeds(folder, files):
    """Write a few small, valid files of each kind; `files` are tokenizers of VOCAB_SIZE."""
    sizes = {"dim": 16, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40}
    options = {"n_kv_heads": 1, "n_layers": 2, "bigram_rows": 8, "value_embeddings": 1}
    for dtype in DTYPES:
        export_model(random_model(**sizes), folder / "model" / f"plain_{dtype}", dtype=dtype)
        model = random_model(**{**EVERYTHING, **sizes, **options})
        export_model(model, folder / "model" / f"all_{dtype}", dtype=dtype)
    for i, data in enumerate([*files, *map(with_few_ranges, files[1:])]):
        seed = bytes([(VOCAB_SIZE - 3) // 3]) + data + b"Once upon\n\n 12's"
        (folder / "tokenizer" / str(i)).write_bytes(seed)
    texts = [
        "Once upon a time",
        "Zo\u00eb \U0001f600 \u2581",
        "\n\t  ",
        "<s><0x0A>",
        "I'LL 123\r\n  .",
        "<|endoftext|><|end|>",
    ]
    for i, text in enumerate(texts):
        (folder / "text" / str(i)).write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--seconds", type=int, default=60, help="time for each target")
    parser.add_argument("--out", default="fuzz", help="folder for corpora and failing inputs")
    parser.add_argument("--jobs", type=int, default=1, help="processes per target")
    args = parser.parse_args()
    clang = shutil.which("clang") or sys.exit("error: make fuzz needs clang")
    folder = Path(args.out).resolve()
    for name in TARGETS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    stories = [item["story"] for item in make_stories(500, seed=1)]
    path = folder / "tokenizer.model"
    path.write_bytes(train_sentencepiece(stories, VOCAB_SIZE)[0])
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories))
    special = ["<|endoftext|>", "<|end|>", "<|"]
    bpes = [
        BPETokenizer(*train_bpe(folder / "stories.txt", VOCAB_SIZE, special), special, name)
        for name in PATTERNS
    ]
    files = [open_tokenizer(path).c_file(), *(byte_level_c_file(bpe, 270, 271) for bpe in bpes)]
    environment = {**os.environ, "FUZZ_VOCAB_SIZE": str(VOCAB_SIZE)}
    for name, data in zip(("TOKENIZER", "GPT2", "GPT4"), files, strict=True):
        environment[f"FUZZ_{name}"] = str(folder / f"{name}.bin")
        (folder / f"{name}.bin").write_bytes(data)
    make_seeds(folder, files)
    tokenizer = open_tokenizer(path)
    ids = np.concatenate([[tokenizer.bos_id, *tokenizer.encode(text)] for text in stories])
    for max_slots in (20, 1000):
        write_draft(folder / "draft" / str(max_slots), ids, tokenizer, max_slots)
    failed = []
    for i, name in enumerate(TARGETS):
        binary = folder / f"fuzz_{name}"
        command = [clang, *FLAGS, f"-DTARGET={i}", str(REPO / "tests/fuzz.c"), "-o", str(binary)]
        if subprocess.run([*command, "-lm"]).returncode:
            sys.exit("error: clang cannot link its fuzzer; on Debian: apt install libclang-rt-dev")
        print(f"{name}: {args.seconds} s", flush=True)
        flags = [f"-max_total_time={args.seconds}", f"-fork={args.jobs}", "-max_len=65536"]
        flags += ["-rss_limit_mb=4096", "-timeout=20", f"-artifact_prefix={folder}/{name}-"]
        done = subprocess.run([str(binary), *flags, str(folder / name)], env=environment)
        if done.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}; the inputs are in {folder}")


main()
