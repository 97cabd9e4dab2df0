"""
Measure tokens/s of the C engine and of its peers, on models of random weights.

    python -m bench.infer                       # ours alone; `make run` builds it
    python -m bench.infer --peer=LLAMA_BENCH    # and llama.cpp's llama-bench; needs .[export]
    python -m bench.infer --llama2c=PATH        # and run.c of a checkout of karpathy/llama2.c

To add a case, add a row to CASES.
"""

import json
import math
import os
import re
import statistics
from functools import partial

from bench.common import alternate, open_device, output_of, ratio
from bench.random_models import VOCABULARIES, fake_tokenizer, random_transformer
from configurator import UserError, check_range, configure
from formats.gguf import write_gguf
from formats.modelbin import DTYPES, export_model

# -----------------------------------------------------------------------------
engine = "run"  # our engine, built by make run
peer = ""  # path of llama.cpp's llama-bench
llama2c = ""  # path of a checkout of karpathy/llama2.c
cases = ""  # rows of CASES to measure, such as 0,2; empty: all
infer_rounds = 3  # rounds, in which ours and the peer alternate
threads = 2
models = "out/random"  # folder for the random models, which are kept
configure(globals())
# -----------------------------------------------------------------------------

# model, dtype, task, number of tokens, compared with
CASES = (
    ("110M", "int8", "decode", 128, "llama.cpp"),
    ("15M", "int8", "decode", 128, "llama.cpp"),
    ("360M", "int8", "decode", 128, "llama.cpp"),
    ("110M", "int4", "decode", 128, "llama.cpp"),
    ("110M", "fp32", "decode", 128, "llama2.c"),
    ("110M", "int8", "prefill", 128, "llama.cpp"),
    ("15M", "int8", "16 stories", 128, "one story"),
    ("260K", "fp32", "decode", 512, "llama2.c"),  # its clock counts whole milliseconds
    ("15M", "fp32", "decode", 128, "llama2.c"),
    ("15M", "fp32", "story", 256, "llama2.c"),  # sampled with top-p 0.9, and printed
    ("110M", "fp32", "story", 256, "llama2.c"),
    ("260K", "fp32", "story", 512, "llama2.c"),
)
GGUF_TYPES = {"int8": "q8_0", "int4": "q4_0"}


def model_file(name, kind):
    """Return the path of a model, writing it if missing; kind: one of DTYPES or GGUF_TYPES."""
    path = os.path.join(models, f"{name}_{kind}.{'bin' if kind in DTYPES else 'gguf'}")
    if not os.path.exists(path):
        print(f"writing {path}", flush=True)
        model = random_transformer(name)
        if kind in DTYPES:
            export_model(model, path, dtype=kind)
        else:
            write_gguf(model, path, kind, fake_tokenizer(model.args.vocab_size), {})
    return path


def run(*command):
    return output_of(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def number_in(pattern, text, program):
    match = re.search(pattern, text)
    if not match:
        raise UserError(f"{program} did not print {pattern!r}: {text[-200:]!r}")
    return float(match[1])


def our_speed(name, kind, task, n):
    """Return (our tokens/s, decoding's percentage of the memory bandwidth)."""
    binary = os.path.abspath(engine)
    if task == "story":
        return story_speed(binary, name, kind, n), math.nan
    stories = "16" if task == "16 stories" else "1"
    # without -j, the engine chooses its number of threads
    text = run(binary, model_file(name, kind), "--bench", "-n", str(n), "-b", stories)
    line = "prefill" if task == "prefill" else "decode"
    speed = number_in(rf"{line}: ([0-9.]+) tok/s", text, engine)
    return speed, number_in(r"decode \(([0-9.]+) %\)", text, engine)


def llama_cpp_speed(name, kind, task, n):
    path = model_file(name, GGUF_TYPES[kind])
    sizes = ["-p", str(n), "-n", "0"] if task == "prefill" else ["-p", "0", "-n", str(n)]
    text = run(peer, "-m", path, "-t", str(threads), "-r", "3", "-o", "json", *sizes)
    return json.loads(text[text.index("[") : text.rindex("]") + 1])[0]["avg_ts"]


def story_speed(binary, name, kind, n, *options):
    """Return the tokens/s that our engine or llama2.c's reports for a story."""
    tokenizer = os.path.join(models, f"tok{VOCABULARIES[name]}.bin")
    fake_tokenizer(VOCABULARIES[name]).export(tokenizer)
    path = model_file(name, kind)
    text = run(binary, path, "-z", tokenizer, "-s", "1", "-n", str(n), *options)
    return number_in(r"achieved tok/s: ([0-9.]+)", text, binary)


def llama2c_speed(name, kind, task, n):
    """Return the tokens/s of llama2.c's run.c, built as by its `make runomp`."""
    binary = os.path.join(models, "llama2c_run")
    if not os.path.exists(binary):
        flags = ["-Ofast", "-fopenmp", "-march=native", os.path.join(llama2c, "run.c"), "-lm"]
        run("cc", *flags, "-o", binary)
    return story_speed(binary, name, kind, n, "-t", "1" if task == "story" else "0")


def measure(row):
    """Measure a row of CASES and print its line of the table."""
    *case, other = row
    name, kind, task, n = case
    measures = {"ours": partial(our_speed, *case)}
    if other == "one story":
        measures["peer"] = lambda: our_speed(name, kind, "decode", n)[0]
    elif peer and other == "llama.cpp":
        measures["peer"] = partial(llama_cpp_speed, *case)
    elif llama2c and other == "llama2.c":
        measures["peer"] = partial(llama2c_speed, *case)
    results = alternate(measures, infer_rounds)
    ours, shares = zip(*results["ours"], strict=True)
    print(f"{name:<6} {kind:<6} {task:<11} {statistics.median(ours):>9,.0f}", end="")
    print(f"{statistics.median(shares):>8.0f} %" if task == "decode" else " " * 10, end="")
    if theirs := results.get("peer"):
        print(f" {statistics.median(theirs):>9,.0f} {ratio(ours, theirs):>6.2f}x  {other}", end="")
    print(flush=True)


all_rows = [str(n) for n in range(len(CASES))]
rows = cases.split(",") if cases else all_rows
if not os.path.exists(engine):
    raise UserError(f"engine = {engine!r} does not exist; run: make run")
if not set(rows) <= set(all_rows):
    raise UserError(f"cases = {cases!r}: expected one or more of {','.join(all_rows)}")
check_range(1, infer_rounds=infer_rounds)
os.makedirs(models, exist_ok=True)
open_device()
print(
    f"tokens/s with {threads} threads, random weights, medians of {infer_rounds} rounds in "
    "which ours and the peer alternate; of memory: share of the bandwidth that the same threads "
    "reach when they only read, in the best of three patterns\n"
    f"{'model':<6} {'format':<6} {'task':<11} {'ours':>9} {'of memory':>9} {'peer':>9}   ratio"
)
for row in rows:
    measure(CASES[int(row)])
