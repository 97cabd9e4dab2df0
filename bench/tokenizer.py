"""
Measure MB/s of training and applying tokenizers, with every installed encoder and with peers.

    python -m bench.tokenizer --source=text.txt
    python -m bench.tokenizer --source=text.txt --llama2c=PATH

The peers are Hugging Face's tokenizers, if installed, and the pretokenize command of a checkout of
karpathy/llama2.c.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from functools import partial
from importlib.util import find_spec

from bench.common import CPU, alternate, open_device, output_of, ratio
from bpe import BPETokenizer, train_bpe
from configurator import UserError, check_range, configure
from formats.hftokenizer import tokenizer_json
from report.tables import print_table
from text.documents import SEPARATOR
from tokenizer import ByteLevel, SentencePiece, train_sentencepiece
from training.runs import REPO, seconds_of

# -----------------------------------------------------------------------------
source = ""  # a .txt file with <|endoftext|> between documents
llama2c = ""  # path of a checkout of karpathy/llama2.c, to measure its pretokenize too
tokenizer_rounds = 5  # rounds, in which the ways alternate
threads = 2  # processes of those ways that use several
folder = ""  # where to write; empty: a new temporary folder
# -----------------------------------------------------------------------------

END = SEPARATOR.decode()
PEER = "Hugging Face tokenizers"


def measure(task, n_bytes, ways):
    """Time `ways`, {name: function}; print each speed and its ratio to the last one."""
    measures = {name: partial(seconds_of, way, 1, CPU) for name, way in ways.items()}
    times = alternate(measures, tokenizer_rounds)
    *_, base = times.values()
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        speed = f"{n_bytes / median / 1e6:.1f}"
        rows.append([f"  {name}", speed, f"{median:.2f}", f"{ratio(base, seconds):.2f}x"])
    print()
    print_table([task, "MB/s", "seconds", "ratio"], rows)


def peer_train(path, size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": [END], "show_progress": False}
    tokenizer.train([path], trainers.BpeTrainer(vocab_size=size, **options))


def peer_encode(text, documents):
    from tokenizers import Tokenizer

    Tokenizer.from_str(text).encode_batch(documents)


def bench_training(task, n_bytes, path, size, processes):
    ways = {"ours": partial(train_bpe, path, size, [END], processes)}
    if find_spec("tokenizers"):
        ways[PEER] = partial(peer_train, path, size)
    measure(task, n_bytes, ways)


def encoders(kind, path, documents):
    """
    Return {encoder: function that encodes the documents}. Each call makes a new tokenizer of class
    `kind`, with an empty cache.
    """

    def encode(name):
        kind(path).encoder(name)[1](documents)

    return {name: partial(encode, name) for name in kind.ENCODERS}


def bench_bpe(work_dir, documents, n_bytes):
    """Measure encoding with byte-level BPE, with files in work_dir."""
    vocab, merges = train_bpe(source, 10_000, [END], threads)
    path = os.path.join(work_dir, "bpe.model")
    BPETokenizer(vocab, merges, [END]).save(path)

    def stream():
        with open(source, encoding="utf-8", newline="") as f:
            for _ in BPETokenizer(vocab, merges, [END]).encode_iterable(f):
                pass

    ways = {"ours, encode_iterable by line": stream}
    ways |= reversed(encoders(ByteLevel, path, documents).items())
    if find_spec("tokenizers"):
        text = json.dumps(tokenizer_json(ByteLevel(path)))
        ways[f"{PEER}, all cores"] = partial(peer_encode, text, documents)
    measure("encode byte-level BPE of 10,000, one core", n_bytes, ways)


def bench_sentencepiece(work_dir, documents, n_bytes):
    """Measure encoding with SentencePiece, in this process and as the pretokenize command."""
    print("\ntraining SentencePiece of 4,096", flush=True)
    data = os.path.join(work_dir, "data")
    stories = os.path.join(data, "TinyStories_all_data")
    os.makedirs(stories)
    path = os.path.join(data, "tok4096.model")
    with open(path, "wb") as f:
        f.write(train_sentencepiece(documents, 4096)[0])
    ways = encoders(SentencePiece, path, documents)
    measure("encode SentencePiece of 4,096, one core", n_bytes, ways)

    for i in range(20):
        with open(os.path.join(stories, f"data{i:02}.json"), "w", encoding="utf-8") as f:
            json.dump([{"story": text} for text in documents[i::20] if text], f)
    shards = os.path.join(data, "tok4096")

    def pretokenize(folder, *flags, **options):
        shutil.rmtree(shards, ignore_errors=True)
        script = os.path.join(os.path.abspath(folder), "tinystories.py")
        output_of([sys.executable, script, "pretokenize", "--vocab_size=4096", *flags], **options)
        if not os.path.isdir(shards):
            raise UserError(f"{script} did not write {shards}")

    ours = partial(pretokenize, REPO, f"--data_dir={data}", f"--num_workers={threads}")
    ways = {f"ours, {name}": partial(ours, f"--encoder={name}") for name in SentencePiece.ENCODERS}
    if llama2c:
        ways["llama2.c"] = partial(pretokenize, llama2c, cwd=work_dir)
    measure("pretokenize with SentencePiece of 4,096: the whole command", n_bytes, ways)


def main():
    if not source:
        raise UserError(
            "--source=PATH is missing: pass a .txt file with <|endoftext|> between documents"
        )
    check_range(1, tokenizer_rounds=tokenizer_rounds)
    open_device()
    with open(source, encoding="utf-8", newline="") as f:
        text = f.read()
    documents = [part.strip() for part in text.split(END)]
    n_bytes = len(text.encode())
    print(
        f"{n_bytes / 1e6:.1f} MB, one or {threads} processes; medians of {tokenizer_rounds} "
        "rounds; ratio: to the last line"
    )
    with tempfile.TemporaryDirectory(dir=folder or None) as work_dir:
        small = os.path.join(work_dir, "small.txt")
        with open(small, "w", encoding="utf-8", newline="") as f:
            f.write(text[:133_000])
        bench_training("train 500 on 133 kB, one process", 133_000, small, 500, 1)
        bench_training("train 10,000", n_bytes, source, 10_000, threads)
        bench_bpe(work_dir, documents, n_bytes)
        bench_sentencepiece(work_dir, documents, n_bytes)


if __name__ == "__main__":  # because worker processes import this file again
    configure(globals())
    main()
