"""
Measure how fast training and inference are, and what limits them.

    python bench.py train         # tokens/s of the plain recipe and of ours, at two shapes
    python bench.py speedrun --data_dir=data --minutes=10  # bits per byte against time, of both
    python bench.py loader        # tokens/s of the training batches alone
    python bench.py checkpoint    # size and time of checkpoints, and what they cost training
    python bench.py infer         # tokens/s of ./run, and of its peers beside it
    python bench.py tokenizer --source=text.txt  # MB/s of training and encoding, beside peers
    python bench.py scaling       # tokens/s of several processes, by DDP and FSDP, against one

`train --llama2c=PATH` measures a checkout of karpathy/llama2.c as well. `speedrun` writes
speedrun.json and speedrun.png to --out; runs that are complete there are not done again. `infer`
takes --peer=PATH, llama.cpp's llama-bench (its models need the extra export), and --llama2c=PATH,
as `tokenizer` does.

Figures of shared machines vary: variants alternate in one process, and medians are printed.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from bpe import BPETokenizer, all_pieces, train_bpe
from configurator import UserError, configure
from dataset import DataPaths, TrainBatches, ahead
from formats.gguf import write_gguf
from formats.hftokenizer import tokenizer_json
from formats.modelbin import DTYPES, export_model
from model import ARCHS, ModelArgs, Transformer
from optim import make_optimizer
from system.files import write_json
from system.hardware import describe, git_commit, peak_flops, pick_device, pick_dtype
from system.memory import tune_malloc
from text.corpus import SEPARATOR, whole_file
from text.shards import write_npy
from tokenizer import ByteLevel, SentencePiece, sentencepiece_model, train_sentencepiece
from training.checkpoint import CheckpointWriter, Snapshot, load_checkpoint, optimizer_tensors
from training.runs import (
    TRAIN,
    race,
    read_run,
    same_run,
    shards_hint,
    start,
    train_settings,
    value_at,
)

# -----------------------------------------------------------------------------
what = ""  # train, speedrun, loader, checkpoint, infer, tokenizer or scaling
batch_size = 32  # sequences a batch (loader; train at the given shape)
max_seq_len = 256  # tokens a sequence
# train
shapes = "128,288"  # names in SHAPES; or given: dim, n_layers, n_heads and so on, as set here
ways = "plain,eager,compiled,modded"  # names in WAYS
llama2c = ""  # a checkout of karpathy/llama2.c, to measure it too (infer and tokenizer as well)
train_rounds = 7  # in which the ways alternate
train_steps = 4  # of each way in a round
# speedrun
data_dir = "data"  # with the shards of both recipes' vocabularies
minutes = 10.0  # of training; the sprint has a thirtieth
seeds = 1  # every run is done so many times; medians are printed
out = "out/speedrun"  # folder of the runs and the results
plain = "config/plain_llama2c.py"  # the recipe to compare with
ours = "config/speedrun_cpu.py"  # our recipe
sprint = "config/sprint_cpu.py"  # our recipe for the plain one's value in a thirtieth of the time
plain_eval_interval = 50  # steps between evaluations in a run of ten minutes; others have as many
ours_eval_interval = 125  # likewise, of ours
eval_windows = 2000  # validation sequences at most, evenly spaced; the whole of a shorter text
# loader
n_tokens = 100_000_000  # of the shards
# checkpoint, and train at the given shape
dim = 512  # 42 million parameters, as llama2.c's stories42M
n_layers = 8
n_heads = 8
vocab_size = 32000
# checkpoint
step_size = 4  # sequences a training step
save_interval = 50  # steps of a round, in which one checkpoint is written
rounds = 3  # with and without, alternating
folder = ""  # where to write; empty: a new folder in the system's place for them
# infer
engine = "run"  # ours, as make run builds it
peer = ""  # llama.cpp's llama-bench
cases = ""  # numbers of rows of CASES, with commas; empty: all
infer_rounds = 3  # in which ours and the peer alternate
threads = 2  # or processes, of tokenizer
models = "out/random"  # folder of the random models, which are kept
# tokenizer
source = ""  # a .txt file with <|endoftext|> between documents
tokenizer_rounds = 5  # in which the ways alternate
# scaling
processes = "1,2"  # how many, on GPUs one each; a step is the same for all
scaling = "--dim=288 --n_layers=6 --n_heads=6 --max_seq_len=256"  # the run, in train.py's words
scaling_steps = 12  # of each run; the first three are not counted
scaling_rounds = 3  # in which the ways alternate
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
    model.dtype = dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocab_size, (step_size, max_seq_len + 1), device=device)
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step():
        model(x, y).backward()
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


# ---- train

SHAPES = {
    "128": {
        "dim": 128,
        "n_layers": 5,
        "n_heads": 8,
        "n_kv_heads": 4,
        "vocab_size": 512,
        "batch_size": 32,
    },
    "288": {"dim": 288, "n_layers": 6, "n_heads": 6, "vocab_size": 4096, "batch_size": 16},
    "given": {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "vocab_size": vocab_size,
        "batch_size": batch_size,
    },
}
# name -> arch, optimizer, whether in the fastest number format (or float32), whether compiled
WAYS = {
    "plain": ("llama", "adamw", False, False),
    "eager": ("llama", "adamw", True, False),
    "compiled": ("llama", "adamw", True, True),
    "modded": ("modded", "muon", True, True),
}


def our_way(name, args):
    """A model of ours and its optimizer: (model, function of x and y to the loss, optimizer)."""
    _, optimizer, is_fast, is_compiled = WAYS[name]
    model = Transformer(args).to(device)
    model.dtype = dtype if is_fast else torch.float32
    if is_compiled:
        model.compile_layers()
    return model, model, make_optimizer(model, optimizer, train_settings())


def llama2c_way(shape):
    """
    llama2.c's model and optimizer, as our_way; compiled where that makes it faster, which it does
    not at a dim of 128.
    """
    path = os.path.join(llama2c, "model.py")
    spec = importlib.util.spec_from_file_location("llama2c_model", path)
    theirs = sys.modules["llama2c_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    model = theirs.Transformer(theirs.ModelArgs(**shape, multiple_of=32)).to(device)
    with contextlib.redirect_stdout(None):  # it reports on the optimizer
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    call = torch.compile(model) if shape["dim"] > 128 else model

    def loss_of(x, y):
        call(x, y)
        return model.last_loss

    return model, loss_of, optimizer


def bench_shape(name, wanted):
    torch._dynamo.reset()
    torch.manual_seed(1)
    shape = {"max_seq_len": max_seq_len, **SHAPES[name]}
    n_rows = shape.pop("batch_size")
    tokens = torch.randint(0, shape["vocab_size"], (n_rows, max_seq_len + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    try:
        all_args = {way: ModelArgs(**shape, **ARCHS[arch]) for way, (arch, *_) in WAYS.items()}
    except ValueError as e:
        raise UserError(f"shape {name}: {e}") from None
    flops = {way: Transformer(args).flops_per_token() for way, args in all_args.items()}
    flops["llama2c"] = flops["plain"]
    found = {}
    for way in wanted:
        model, loss_of, optimizer = (
            llama2c_way(shape) if way == "llama2c" else our_way(way, all_args[way])
        )

        def step(model=model, loss_of=loss_of, optimizer=optimizer):
            loss_of(x, y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        is_fast = way in WAYS and WAYS[way][2]
        found[way] = {
            "step": step,
            "flops": flops[way],
            "dtype": dtype if is_fast else torch.float32,
            "first": seconds(step),
            "speeds": [],
            "shares": [],
        }
        step()
    for _ in range(train_rounds):
        peaks = {d: peak_flops(device, d) for d in {torch.float32, dtype}}
        for one in found.values():
            took = seconds(lambda one=one: [one["step"]() for _ in range(train_steps)])
            one["speeds"].append(train_steps * tokens[:, 1:].numel() / took)
            if peak := peaks[one["dtype"]]:
                one["shares"].append(one["speeds"][-1] * one["flops"] / peak)
    base = found[wanted[0]]
    print(
        f"\n{name}: dim {shape['dim']}, {shape['n_layers']} layers, vocabulary "
        f"{shape['vocab_size']}, {n_rows} x {max_seq_len} tokens a step; medians of "
        f"{train_rounds} rounds of {train_steps} steps\n"
        f"{'way':<10} {'tok/s':>9} {'from':>9} {'to':>9} {'ratio':>7} {'of peak':>8} "
        f"{'first step':>11}"
    )
    for way, one in found.items():
        ratio = statistics.median(a / b for a, b in zip(one["speeds"], base["speeds"], strict=True))
        share = f"{statistics.median(one['shares']):.1%}" if one["shares"] else "unknown"
        print(
            f"{way:<10} {statistics.median(one['speeds']):>9,.0f} {min(one['speeds']):>9,.0f} "
            f"{max(one['speeds']):>9,.0f} {ratio:>6.2f}x {share:>8} {one['first']:>9.1f} s"
        )


def bench_train():
    wanted, names = ways.split(","), shapes.split(",")
    for kind, given, known in (("ways", wanted, WAYS), ("shapes", names, SHAPES)):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"{kind} = {unknown[0]!r}: expected names of {', '.join(known)}")
    if train_rounds < 1 or train_steps < 1:
        raise UserError("train_rounds and train_steps must be above 0")
    if llama2c:
        if not os.path.exists(os.path.join(llama2c, "model.py")):
            raise UserError(f"llama2c = {llama2c!r} is no checkout: it has no model.py")
        wanted = ["llama2c", *wanted]
    print(
        "plain: plain Llama, AdamW, float32; eager: the same model and optimizer in "
        f"{str(dtype).removeprefix('torch.')}; compiled: and compiled; modded: our architecture, "
        "Muon, compiled\nratio: to the first line; of peak: of the products this machine can do in "
        "the number format; first step: with compilation"
    )
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that compilation is measured in full
        for name in names:
            bench_shape(name, wanted)


# ---- speedrun


def curve(line):
    return {k: line[k] for k in ("step", "tokens", "time_s", "train_s", "val_loss", "val_bpb")}


def bench_speedrun():
    if minutes <= 0 or seeds < 1:
        raise UserError("minutes and seeds must be above 0")
    scale = minutes / 10
    recipes = {
        "plain": (plain, minutes, max(1, round(plain_eval_interval * scale))),
        "ours": (ours, minutes, max(1, round(ours_eval_interval * scale))),
        "sprint": (sprint, minutes / 30, 1_000_000_000),  # evaluated at its end alone
    }
    planned = []
    for seed in range(1337, 1337 + seeds):
        for name, (recipe, length, interval) in recipes.items():
            words = [
                recipe,
                f"--data_dir={os.path.abspath(data_dir)}",
                f"--device={device}",
                f"--max_minutes={length}",
                f"--eval_interval={interval}",
                f"--seed={seed}",
                "--picture=False",
            ]
            settings = train_settings(words)
            words.append(f"--eval_iters={math.ceil(eval_windows / settings['batch_size'])}")
            if hint := shards_hint(settings, data_dir):
                raise UserError(f"{data_dir} lacks the shards of {recipe}; make them with: {hint}")
            planned.append((name, os.path.join(out, f"{name}-{seed}"), words))

    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    done = {name: [] for name in recipes}
    for name, where, words in planned:
        run = read_run(where)
        if run and same_run(run["start"]["config"], train_settings(words)):
            print(f"{where} is complete", flush=True)
        else:
            print(f"training {name} for {recipes[name][1]:.3g} minutes in {where}", flush=True)
            # what an earlier run compiled; all else of it train.py keeps, or puts aside
            shutil.rmtree(os.path.join(where, "compiled"), ignore_errors=True)
            failed = start(words, where, env=environment).returncode
            run = read_run(where)
            if failed or not run:
                raise UserError(f"the run in {where} did not finish; the same command goes on")
        if run["evals"][-1]["val_bpb"] is None:
            raise UserError(f"{where}: without a tokenizer in {data_dir} bytes are unknown")
        done[name].append(run)
    report(done)


def report(done):
    """Print the tables of finished runs, {name: [run of each seed]}, and write the files."""
    medians = statistics.median
    races = [race(*of_seed) for of_seed in zip(*done.values(), strict=True)]
    result = {key: medians(r[key] for r in races) for key in races[0]}

    def time_of(value):
        return f"{value:,.0f} s" if math.isfinite(value) else "never"

    print(f"\nbits per byte after minutes of training, {about['device_name']}")
    print(f"{'minutes':>8} {'plain':>8} {'ours':>8}")
    for k in range(1, 11):
        cells = []
        for name in ("plain", "ours"):
            found = [value_at(run["evals"], 60 * minutes * k / 10) for run in done[name]]
            cells.append("-" if None in found else f"{medians(found):.4f}")
        print(f"{minutes * k / 10:>8.2g} {cells[0]:>8} {cells[1]:>8}")
    print(
        f"final: plain {result['target']:.4f}, ours {result['ours_final']:.4f}, "
        f"ours in {minutes / 30:.2g} minutes {result['sprint_final']:.4f}"
    )
    title = "to the plain recipe's final value"
    head = f"{'training':>9} {'ratio':>7} {'all':>9} {'ratio':>7}"
    print(f"\n{title:<42} {head}")
    for name, label in (
        ("plain", "plain"),
        ("ours", "ours, the long run on its way"),
        ("sprint", "ours, a run that ends there"),
    ):
        cells = ""
        for clock in ("train_s", "all_s"):
            ratio = result.get(f"{name}_{clock}_ratio", 1.0)
            cells += f" {time_of(result[f'{name}_{clock}']):>9} {ratio:>6.1f}x"
        print(f"  {label:<40}{cells}")
    print(
        "training: without compilation and evaluations; all: from the start of the process, with "
        "compilation and one evaluation"
    )

    def of_json(values):
        return {k: v if math.isfinite(v) else None for k, v in values.items()}

    write_json(
        os.path.join(out, "speedrun.json"),
        {
            "minutes": minutes,
            "hardware": about,
            "commit": git_commit(),
            "median": of_json(result),
            "seeds": [of_json(r) for r in races],
            "runs": {
                name: [
                    {
                        "commit": run["start"]["commit"],
                        "config": run["start"]["config"],
                        "evals": [curve(line) for line in run["evals"]],
                    }
                    for run in found
                ]
                for name, found in done.items()
            },
        },
    )
    print(f"wrote {os.path.join(out, 'speedrun.json')}")
    picture(done, result["target"])


def picture(done, target):
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture without matplotlib: pip install matplotlib, and run this again")
        return
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    labels = {
        "plain": f"plain recipe ({os.path.basename(plain)})",
        "ours": f"ours ({os.path.basename(ours)})",
        "sprint": f"sprint ({os.path.basename(sprint)})",
    }
    for name, color, style in (("plain", "C7", "o-"), ("ours", "C0", "o-"), ("sprint", "C3", "*")):
        for i, run in enumerate(done[name]):
            x = [line["train_s"] / 60 for line in run["evals"]]
            y = [line["val_bpb"] for line in run["evals"]]
            size = 14 if name == "sprint" else 4
            label = labels[name] if i == 0 else None
            ax.plot(x, y, style, color=color, markersize=size, label=label)
    ax.axhline(target, color="C7", linewidth=1, linestyle=":")
    ax.set(
        xlabel="training time (minutes)",
        ylabel="validation loss (bits per byte)",
        title=f"{minutes:g} minutes on {about['device_name']}",
        xlim=(0, None),
    )
    ax.grid(alpha=0.3)
    ax.legend()
    path = os.path.join(out, "speedrun.png")
    part = f"{path}.part"
    fig.savefig(part, format="png", dpi=150)
    os.replace(part, path)
    print(f"wrote {path}")


# ---- infer

# random models of these shapes, and llama2.c's names for them
MODELS = {
    "260K": {"dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 172},
    "15M": {"dim": 288, "n_layers": 6, "n_heads": 6},
    "42M": {"dim": 512, "n_layers": 8, "n_heads": 8},
    "110M": {"dim": 768, "n_layers": 12, "n_heads": 12},
    "360M": {"dim": 960, "n_layers": 32, "n_heads": 15, "n_kv_heads": 5, "hidden_dim": 2560},
}
VOCABULARIES = {"260K": 512, "360M": 49152}  # of all others 32,000
# model, number format, what is measured on how many tokens, the program it is measured beside
CASES = (
    ("110M", "int8", "decode", 128, "llama.cpp"),
    ("15M", "int8", "decode", 128, "llama.cpp"),
    ("360M", "int8", "decode", 128, "llama.cpp"),
    ("110M", "int4", "decode", 128, "llama.cpp"),
    ("110M", "fp32", "decode", 128, "llama2.c"),
    ("110M", "int8", "prefill", 128, "llama.cpp"),
    ("15M", "int8", "16 stories", 128, "one story"),
    ("260K", "fp32", "decode", 512, "llama2.c"),  # its clock counts whole milliseconds
    ("15M", "fp32", "story", 256, "llama2.c"),  # drawn from 0.9 of the probability, and printed
    ("260K", "fp32", "story", 512, "llama2.c"),
)
GGUF_TYPES = {"int8": "q8_0", "int4": "q4_0"}


def random_transformer(name):
    """A model of MODELS, as sure of its next token as a trained one, whose text has no end."""
    torch.manual_seed(1)
    args = ModelArgs(**MODELS[name], vocab_size=VOCABULARIES.get(name, 32000), max_seq_len=512)
    model = Transformer(args)
    with torch.no_grad():
        model.tok_embeddings.weight[1:3] *= 0.01  # of BOS and EOS
        for layer in model.layers:  # or the tied head would always repeat the token before
            layer.attention.wo.weight *= 30
            layer.feed_forward.w2.weight *= 30
        # logits then deviate by 5: of 32,000 tokens some 10 to 100 have 0.9 of it all
        model.norm.weight *= 5 / (model.tok_embeddings.weight.std() * args.dim**0.5)
    return model


@functools.cache
def fake_tokenizer(size):
    """A SentencePiece of so many pieces, most of which mean nothing."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3] + [6] * 256 + [1] * (size - len(pieces))
    pieces += [f"p{i}" for i in range(len(pieces), size)]
    return SentencePiece("", sentencepiece_model(pieces, [-float(i) for i in range(size)], types))


def model_file(name, kind):
    """The path of a model, made if it is not there: kind is one of DTYPES, or of GGUF_TYPES."""
    path = os.path.join(models, f"{name}_{kind}.{'bin' if kind in DTYPES else 'gguf'}")
    if not os.path.exists(path):
        print(f"making {path}", flush=True)
        model = random_transformer(name)
        if kind in DTYPES:
            export_model(model, path, dtype=kind)
        else:
            write_gguf(model, path, kind, fake_tokenizer(model.args.vocab_size), {})
    return path


def output_of(command):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = (done.stderr.strip() or "it ended early").splitlines()
        raise UserError(f"{command[0]} failed: {lines[-1].removeprefix('error: ')}")
    return done.stdout + done.stderr


def number_in(pattern, text, command):
    found = re.search(pattern, text)
    if not found:
        raise UserError(f"{command} printed no {pattern!r}: {text[-200:]!r}")
    return float(found[1])


def our_speed(name, kind, task, n):
    """Tokens/s of ours, and the share of the memory's speed that its decoding reaches."""
    if task == "story":
        return story_speed(os.path.abspath(engine), name, kind, n), math.nan
    stories = "16" if task == "16 stories" else "1"
    command = [os.path.abspath(engine), model_file(name, kind), "--bench", "-n", str(n)]
    text = output_of([*command, "-b", stories])  # with as many of the threads as pay
    line = "prefill" if task == "prefill" else "decode"
    speed = number_in(rf"{line}: ([0-9.]+) tok/s", text, engine)
    return speed, number_in(r"decode, ([0-9.]+) %", text, engine)


def llama_cpp_speed(name, kind, task, n):
    path = model_file(name, GGUF_TYPES[kind])
    words = ["-p", str(n), "-n", "0"] if task == "prefill" else ["-p", "0", "-n", str(n)]
    text = output_of([peer, "-m", path, "-t", str(threads), "-r", "3", "-o", "json", *words])
    return json.loads(text[text.index("[") : text.rindex("]") + 1])[0]["avg_ts"]


def story_speed(binary, name, kind, n, *words):
    """Tokens/s that ours or llama2.c's engine says of a story with its random tokenizer."""
    n_pieces = VOCABULARIES.get(name, 32000)
    tokenizer = os.path.join(models, f"tok{n_pieces}.bin")
    fake_tokenizer(n_pieces).export(tokenizer)
    command = [binary, model_file(name, kind), "-z", tokenizer, "-s", "1", "-n", str(n), *words]
    return number_in(r"achieved tok/s: ([0-9.]+)", output_of(command), binary)


def llama2c_speed(name, kind, task, n):
    """Of its run.c, built as its make runomp does."""
    binary = os.path.join(models, "llama2c_run")
    if not os.path.exists(binary):
        flags = ["-Ofast", "-fopenmp", "-march=native", os.path.join(llama2c, "run.c"), "-lm"]
        output_of(["cc", *flags, "-o", binary])
    return story_speed(binary, name, kind, n, "-t", "1" if task == "story" else "0")


def bench_infer():
    os.makedirs(models, exist_ok=True)
    numbers = [int(n) for n in cases.split(",")] if cases else range(len(CASES))
    if not os.path.exists(engine):
        raise UserError(f"engine = {engine!r}: there is none; build it with: make run")
    if infer_rounds < 1 or not set(numbers) <= set(range(len(CASES))):
        raise UserError(f"infer_rounds must be above 0, and cases from 0 to {len(CASES) - 1}")
    peers = {
        "llama.cpp": llama_cpp_speed if peer else None,
        "llama2.c": llama2c_speed if llama2c else None,
        "one story": lambda name, kind, _, n: our_speed(name, kind, "decode", n)[0],
    }
    print(
        f"tokens/s with {threads} threads, random weights, medians of {infer_rounds} rounds in "
        "which ours and the peer alternate; of memory: of what the same threads read a second, "
        "measured in between\n"
        f"{'model':<6} {'format':<6} {'task':<11} {'ours':>9} {'of memory':>9} {'peer':>9} "
        f"{'ratio':>7}"
    )
    for n in numbers:
        name, kind, task, tokens, other = CASES[n]
        ours, shares, theirs = [], [], []
        for _ in range(infer_rounds):
            speed, share = our_speed(name, kind, task, tokens)
            ours.append(speed)
            shares.append(share)
            if peers[other]:
                theirs.append(peers[other](name, kind, task, tokens))
        medians = statistics.median
        cells = f"{'':>9} {'':>7}"
        if theirs:
            ratio = medians(a / b for a, b in zip(ours, theirs, strict=True))
            cells = f"{medians(theirs):>9,.0f} {ratio:>6.2f}x  {other}"
        share = f"{medians(shares):.0f} %" if task == "decode" else ""
        print(
            f"{name:<6} {kind:<6} {task:<11} {medians(ours):>9,.0f} {share:>9} {cells}", flush=True
        )


# ---- tokenizer


def bench_tokenizer():
    """Every row: MB/s of a text in each way, in turn, and how much faster than the last way."""
    if not source:
        raise UserError(
            "--source=PATH is missing: a .txt file with <|endoftext|> between documents"
        )
    if tokenizer_rounds < 1:
        raise UserError("tokenizer_rounds must be above 0")
    end = SEPARATOR.decode()
    with open(source, encoding="utf-8", newline="") as f:
        text = f.read()
    documents = [part.strip() for part in text.split(end)]
    n_bytes = len(text.encode())
    print(
        f"{n_bytes / 1e6:.1f} MB, {threads} processes where there are several; medians of "
        f"{tokenizer_rounds} rounds, MB/s, and the ratio to the last"
    )
    with tempfile.TemporaryDirectory(dir=folder or None) as where:
        small = os.path.join(where, "small.txt")
        with open(small, "w", encoding="utf-8", newline="") as f:
            f.write(text[:133_000])
        rows("train 500 on 133 kB, one process", 133_000, bpe_trainers(small, 500, 1))
        rows("train 10,000", n_bytes, bpe_trainers(source, 10_000, threads))
        vocab, merges = train_bpe(source, 10_000, [end], threads)
        path = os.path.join(where, "bpe.model")
        BPETokenizer(vocab, merges, [end]).save(path)

        def stream():
            with open(source, encoding="utf-8", newline="") as f:
                for _ in BPETokenizer(vocab, merges, [end]).encode_iterable(f):
                    pass

        ways = {"own, encode_iterable of the lines": stream}
        for name in reversed(ByteLevel.ENCODERS):  # a new one each time: its cache is empty
            ways[name] = encoding_by(lambda: ByteLevel(path), name, documents)
        ways |= hf_encoder(ByteLevel(path), documents)
        rows("encode byte-level BPE of 10,000, one core", n_bytes, ways)

        ids = os.path.join(where, "ids.npy")
        spans = all_pieces([whole_file(source)], [end])
        ways = {
            name: lambda name=name, path=path: write_npy(ids, ByteLevel(path), spans, threads, name)
            for name in ByteLevel.ENCODERS
        }
        rows("the same from file to file, with processes", n_bytes, ways)

        print("\ntraining SentencePiece of 4,096", flush=True)
        model = train_sentencepiece(documents, 4096)[0]
        path = os.path.join(where, "sp.model")
        with open(path, "wb") as f:
            f.write(model)
        ways = {
            name: encoding_by(lambda: SentencePiece(path), name, documents)
            for name in SentencePiece.ENCODERS
        }
        rows("encode SentencePiece of 4,096, one core", n_bytes, ways)
        rows(
            "pretokenize with SentencePiece of 4,096: the whole command",
            n_bytes,
            pretokenize_commands(where, documents, model),
        )


def rows(task, n_bytes, ways):
    """Run each of `ways`, {name: function}, in turn in each round and print their speeds."""
    times = {name: [] for name in ways}
    for _ in range(tokenizer_rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    print(f"\n{task}")
    *_, base = times.values()
    for name, found in times.items():
        ratio = statistics.median(b / a for a, b in zip(found, base, strict=True))
        median = statistics.median(found)
        print(f"  {name:<36} {n_bytes / median / 1e6:>8.1f} {median:>8.2f} s {ratio:>7.2f}x")
    sys.stdout.flush()


def bpe_trainers(path, size, processes):
    end = SEPARATOR.decode()
    ways = {"ours": lambda: train_bpe(path, size, [end], processes)}
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        return ways

    def theirs():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        words = {"initial_alphabet": alphabet, "special_tokens": [end], "show_progress": False}
        tokenizer.train([path], trainers.BpeTrainer(vocab_size=size, **words))

    return ways | {"Hugging Face tokenizers": theirs}


def encoding_by(make, name, documents):
    return lambda: make().encoder(name)[1](documents)


def hf_encoder(tokenizer, documents):
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return {}
    text = json.dumps(tokenizer_json(tokenizer))
    return {
        "Hugging Face tokenizers, all cores": lambda: Tokenizer.from_str(text).encode_batch(
            documents
        )
    }


def pretokenize_commands(where, documents, model):
    """Our command with each encoder, and llama2.c's, on the documents in 20 JSON files."""
    data = os.path.join(where, "data")
    stories = os.path.join(data, "TinyStories_all_data")
    os.makedirs(stories)
    for i in range(20):
        with open(os.path.join(stories, f"data{i:02}.json"), "w", encoding="utf-8") as f:
            json.dump([{"story": text} for text in documents[i::20] if text], f)
    with open(os.path.join(data, "tok4096.model"), "wb") as f:
        f.write(model)
    shards = os.path.join(data, "tok4096")

    def run(script, *words, **options):
        shutil.rmtree(shards, ignore_errors=True)
        command = [sys.executable, os.path.abspath(script), "pretokenize", "--vocab_size=4096"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, **options)
        if done.returncode or not os.path.isdir(shards):
            raise UserError(f"{script} failed: {done.stderr.strip()[-300:]}")

    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tinystories.py")
    flags = [f"--data_dir={data}", f"--num_workers={threads}"]
    ways = {
        f"ours, {name}": lambda name=name: run(ours, *flags, f"--encoder={name}")
        for name in SentencePiece.ENCODERS
    }
    if llama2c:
        ways["llama2.c"] = lambda: run(os.path.join(llama2c, "tinystories.py"), cwd=where)
    return ways


def bench_scaling():
    """
    Tokens/s of train.py with one process and with several, each on one thread or one GPU, that
    share the same steps; efficiency: of so many times what one does. "apart" are as many runs that
    have nothing to do with each other: what the machine itself allows.
    """
    try:
        counts = sorted({int(n) for n in processes.split(",")} | {1})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise UserError(f"processes = {processes!r}: expected numbers with commas, like 1,2")
    if scaling_steps < 5:
        raise UserError(f"scaling_steps = {scaling_steps}: expected 5 or more")
    kinds = ("apart", "DDP", "FSDP")
    ways = [(n, kind) for n in counts for kind in (kinds if n > 1 else [""])]
    words = [*scaling.split(), f"--max_iters={scaling_steps}", "--log_interval=1", "--eval_iters=1"]
    words += ["--eval_interval=1000000", f"--device={device.type}", "--compile=False"]
    words += [f"--dtype={str(dtype).removeprefix('torch.')}"]
    speeds = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=folder or None) as where:
        random_shards(where, train_settings(words))
        for _ in range(scaling_rounds):
            for way in ways:
                speeds[way].append(speed_of(*way, [*words, f"--data_dir={where}"], where))
    one = statistics.median(speeds[1, ""])
    print(f"{'processes':<16} {'tokens/s':>10} {'each':>10} {'efficiency':>11}   of rounds")
    for (n, kind), found in speeds.items():
        speed = statistics.median(found)
        rounds = ", ".join(f"{x / (n * y):.0%}" for x, y in zip(found, speeds[1, ""], strict=True))
        name = f"{n} {kind}".strip()
        print(f"{name:<16} {speed:>10,.0f} {speed / n:>10,.0f} {speed / n / one:>11.0%}   {rounds}")


def random_shards(where, settings):
    """Shards of random tokens, which take as long as any, for a run of these settings."""
    paths = DataPaths(where, settings["vocab_source"], settings["vocab_size"])
    os.makedirs(paths.shards)
    n = settings["batch_size"] * settings["gradient_accumulation_steps"]
    for i, n_windows in enumerate((4, 4 * n * scaling_steps)):
        size = n_windows * settings["max_seq_len"] + 1
        ids = np.random.default_rng(i).integers(0, settings["vocab_size"], size)
        ids.astype("<u2").tofile(os.path.join(paths.shards, f"data0{i}.bin"))


def speed_of(n, kind, words, where):
    """Tokens/s of one run of n processes, or of n runs at once; the median of its steps."""
    launch = [sys.executable]
    if kind in ("DDP", "FSDP"):
        launch += f"-m torch.distributed.run --standalone --nproc_per_node={n}".split()
    words = [*words, "--fsdp"] if kind == "FSDP" else words
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = []
    for i in range(n if kind == "apart" else 1):
        command = [*launch, TRAIN, *words, f"--out_dir={where}/run{i}"]
        gpu = {"CUDA_VISIBLE_DEVICES": str(i)} if kind == "apart" and device.type == "cuda" else {}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        runs.append(subprocess.Popen(command, env=env | gpu, **pipes))
    total = 0.0
    for i, process in enumerate(runs):
        errors = process.communicate()[1]
        if process.returncode:
            raise UserError(f"{n} {kind} fails: {errors.strip()[-300:]}")
        with open(os.path.join(where, f"run{i}", "log.jsonl"), encoding="utf-8") as f:
            lines = [line for line in map(json.loads, f) if line["kind"] == "train"]
        total += statistics.median(line["tok_s"] for line in lines[3:])
        shutil.rmtree(os.path.join(where, f"run{i}"))
    return total


BENCHES = {
    "train": bench_train,
    "speedrun": bench_speedrun,
    "loader": bench_loader,
    "checkpoint": bench_checkpoint,
    "infer": bench_infer,
    "tokenizer": bench_tokenizer,
    "scaling": bench_scaling,
}
if what not in BENCHES:
    asked = f"unknown benchmark {what!r}" if what else "no benchmark is given"
    raise UserError(f"{asked}; expected one of: {', '.join(BENCHES)}")
if what == "train":
    tune_malloc()  # as train.py does
device = pick_device(device)
dtype = pick_dtype(dtype, device)
about = describe(device)
print(
    f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}, {dtype}",
    flush=True,
)
BENCHES[what]()
