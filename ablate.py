"""
The ablation table: what each choice of the final recipe is worth.

    python ablate.py --data_dir=data                             # train what is missing, print
    python ablate.py --data_dir=data --write=doc/ablations.md    # and write the table there
    python ablate.py --only=recipe,no-qk_norm --kinds=tokens     # some rows, one kind of run

Each row of ROWS is trained at equal text (the tokens of the recipe, however the row cuts them) and
at equal time, and with further seeds where the first leaves it close to the recipe. Equal time is
as many tokens as the row gets through while the recipe gets through its own: their speeds are
measured first, in turn, since a machine's speed wanders by more than they differ. Results are lines
of results.jsonl in out_dir; what is there already is not done again, so a stopped ablation goes on.
To add an option: a row.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields

from system.memory import tune_malloc

tune_malloc()  # as train.py does

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from configurator import UserError, configure  # noqa: E402
from dataset import DataPaths, read_sidecar  # noqa: E402
from model import ModelArgs  # noqa: E402
from system.files import atomic_write  # noqa: E402
from system.hardware import describe, git_commit, pick_device  # noqa: E402
from training.runs import (  # noqa: E402
    SAME_WORK,
    compare,
    pooled_sd,
    read_run,
    same_run,
    seconds_of,
    shards_hint,
    start,
    stepper,
    tokens_of_step,
    train_settings,
)

# -----------------------------------------------------------------------------
data_dir = "data"  # with the shards of all vocabularies that rows name
out_dir = "ablations"  # results.jsonl goes here
# what rows differ from, words of train.py; short runs want smaller steps than those of ten minutes
recipe = "config/speedrun_cpu.py --batch_size=4"
seeds = 3  # runs of each row and kind, at most
clear = 0.012  # bits per byte; a row whose first run is further from the recipe's needs no second
first_seed = 1337
tokens = 800_000  # of the recipe's runs: about a minute on two cores
rounds = 5  # in which the speeds of a row and of the recipe are measured in turn
eval_windows = 2000  # validation sequences at most, evenly spaced; the whole of a shorter text
compile = "True"  # as in the recipe's own longer runs; compilation is no training time
device = "auto"
only = ""  # names of rows, with commas; empty: all
kinds = "tokens,time"  # tokens: equal text; time: equal time
jobs = 1  # runs at once, each with its part of the cores
write = ""  # the table goes to this file, such as doc/ablations.md, and not to the screen
given = configure(globals())
# -----------------------------------------------------------------------------

# name -> words of train.py's command line. Rows that leave the recipe as it is are passed over, so
# that every option can stand among those removed and those added.
ROWS = {
    "recipe": "",
    # options removed
    "no-qk_norm": "qk_norm=False",
    "norm_gains": "norm_gains=True",
    "untied": "tie_embeddings=False",
    "swiglu": "activation=swiglu",
    "relu2": "activation=relu2",
    "no-embedding_norm": "embedding_norm=False",
    "no-residual_scalars": "residual_scalars=False",
    "no-bigram": "bigram_rows=0",
    "no-window": "sliding_window=0",
    "no-value_embeddings": "value_embeddings=0",
    "no-smear": "smear=False",
    "no-neuron_beta": "neuron_beta=0",
    "no-momentum_warmup": "momentum_warmup=0",
    "no-grad_clip": "grad_clip=0",
    "adamw-2e-3": "optimizer=adamw base_learning_rate=2e-3 warmup_iters=20",
    "adamw-6e-3": "optimizer=adamw base_learning_rate=6e-3 warmup_iters=20",
    "float32": "dtype=float32",
    # options added
    "zero_init": "zero_init=True",
    "untied-zero_init": "tie_embeddings=False zero_init=True",
    "softcap": "logit_softcap=15",
    "dropout": "dropout=0.1",
    "decay": "muon_weight_decay=0.1",
    "warmup": "warmup_iters=20",
    # more or less of one
    "bigram-4096": "bigram_rows=4096",
    "window-128": "sliding_window=128",
    "heads-4": "n_heads=4",
    "hidden_lr-0.01": "hidden_lr=0.01",
    "hidden_lr-0.04": "hidden_lr=0.04",
    "cosine": "cooldown_shape=cosine",
    "batch-2": "batch_size=2",
    "batch-8": "batch_size=8",
    "context-512": "max_seq_len=512 batch_size=8",
    "vocab-2048": "vocab_size=2048",
    "vocab-8192": "vocab_size=8192",
    # presets of the architecture, with the recipe's sizes
    "arch-portable": "arch=portable",
    "arch-llama": "arch=llama",
}
KINDS = ("tokens", "time")
SAME_SPEED = 0.01  # a difference that cannot be told from none
SIZES = "dim n_layers n_heads n_kv_heads vocab_size hidden_dim multiple_of max_seq_len".split()


def words_of(name):
    """The words of a row for train.py, behind those of the recipe."""
    words = [f"--{word}" for word in ROWS[name].split()]
    if words and words[0].startswith(
        "--arch="
    ):  # the preset as it is, without the recipe's options
        plain = train_settings(["--arch=llama"])
        named = train_settings(words)
        options = [f.name for f in fields(ModelArgs) if f.name in plain and f.name not in SIZES]
        words += [f"--{option}={named[option]}" for option in options]
    return words


def tokens_per_byte(settings):
    """Training tokens a byte of a run's vocabulary; None where the shards do not say."""
    paths = DataPaths(data_dir, settings["vocab_source"], settings["vocab_size"])
    meta = read_sidecar(paths.shards)
    if not meta:
        return None
    n_tokens, n_bytes = (sum(s[k] for s in meta["shards"][1:]) for k in ("tokens", "bytes"))
    return n_tokens / n_bytes


def words_of_run(name, seed=first_seed):
    """The words of train.py for a run of a row, but for its length."""
    return [
        *recipe.split(),
        f"--data_dir={os.path.abspath(data_dir)}",
        f"--device={device}",
        f"--compile={compile}",
        f"--seed={seed}",
        "--eval_interval=1000000000",  # at the end alone
        "--keep_last=1",
        "--picture=False",
        *words_of(name),
    ]


def run_words(name, kind, seed):
    """All words of train.py for one run."""
    words = words_of_run(name, seed)
    settings, base = train_settings(words), train_settings(words_of_run("recipe", seed))
    n_tokens = tokens
    if kind == "time":
        n_tokens *= speeds[name]
    elif settings["vocab_size"] != base["vocab_size"]:  # the same text has another number of tokens
        ratios = tokens_per_byte(settings), tokens_per_byte(base)
        if None not in ratios:
            n_tokens *= ratios[0] / ratios[1]
    n_steps = max(1, round(n_tokens / tokens_of_step(settings)))
    eval_iters = math.ceil(eval_windows / settings["batch_size"])
    return [*words, f"--max_iters={n_steps}", f"--eval_iters={eval_iters}"]


def relative_speed(settings, base):
    """Tokens/s of training with some settings, to those with `base`; the median of `rounds`."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    ratios, both = [], []
    for each in (base, settings):
        step = stepper(each, device)
        seconds_of(step, 2, device)  # which compiles it
        n = max(1, round(1 / seconds_of(step, 1, device)))
        both.append((step, tokens_of_step(each), n))
    for _ in range(rounds):
        found = [n * size / seconds_of(step, n, device) for step, size, n in both]
        ratios.append(found[1] / found[0])
    return statistics.median(ratios)


def read_results():
    """The lines of results.jsonl; one that was cut off is dropped."""
    found = []
    if os.path.exists(results_path):
        with open(results_path, encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return found


def result_of(name, kind, seed, words):
    """Train one run; its line of results.jsonl, with "error" where it failed."""
    about = {
        "row": name,
        "kind": kind,
        "seed": seed,
        "config": train_settings(words),
        "hardware": describe(device),
        "commit": git_commit(),
    }
    threads = {}
    if jobs > 1:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    environment = {
        **os.environ,
        **threads,
        "TQDM_DISABLE": "1",
        "TORCHINDUCTOR_CACHE_DIR": os.path.abspath(os.path.join(out_dir, "compiled")),
    }
    with tempfile.TemporaryDirectory(dir=out_dir) as where:
        done = start(
            words, where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        run = read_run(where)
    if done.returncode or not run:
        lines = (done.stderr.strip() or "it ended early").splitlines()
        return {**about, "error": lines[-1].removeprefix("error: ")}
    last = run["evals"][-1]
    if last["val_bpb"] is None:
        return {**about, "error": f"without a tokenizer in {data_dir} bytes are unknown"}
    return {**about, **{k: v for k, v in last.items() if k != "kind"}}


def summary(results):
    """
    ([(row, {kind: comparison})], best first; {kind: standard deviation of one run or None}), from
    lines of results.
    """
    values = {}
    for r in results:
        if "error" not in r:
            values.setdefault((r["row"], r["kind"]), []).append(r["val_bpb"])
    noise = {kind: pooled_sd([v for (_, k), v in values.items() if k == kind]) for kind in KINDS}
    rows = []
    for name in dict.fromkeys(name for name, _ in values):
        compared = {
            kind: compare(values[name, kind], values["recipe", kind], noise[kind])
            for kind in KINDS
            if (name, kind) in values and ("recipe", kind) in values
        }
        if compared:
            rows.append((name, compared))

    def rank(row):
        return row[1].get("time", row[1].get("tokens"))["difference"]

    return sorted(rows, key=rank), noise


def cells(compared, is_recipe):
    """Three cells of the table: bits per byte and number of runs, difference, beyond noise."""
    if compared is None:
        return ["", "", ""]
    mean = f"{compared['mean']:.4f} ({compared['n']})"
    if is_recipe:
        return [mean, "", ""]
    verdict = {None: "?", True: "yes", False: "no"}[compared["beyond_noise"]]
    return [mean, f"{compared['difference']:+.4f}", verdict]


def markdown(results, left_out):
    """The whole of doc/ablations.md."""
    about = results[0]["hardware"] if results else describe(device)
    commits = ", ".join(sorted({r["commit"][:9] + r["commit"][40:] for r in results} - {""}))
    flags = [
        f"--{name}={globals()[name]}" for name in sorted(given - {"data_dir", "out_dir", "write"})
    ]
    command = " ".join(["python ablate.py", *flags, "--write=doc/ablations.md"])
    rows, noise = summary(results)
    limits = {
        "tokens": f"on equal text ({tokens:,} tokens of the recipe's vocabulary; other "
        "vocabularies cut the same text into more or fewer)",
        "time": "for equal time (as many tokens as it gets through while the recipe gets through "
        f"{tokens:,}; the speeds are measured in turn, and one within {SAME_SPEED:.0%} counts as "
        "the recipe's)",
    }
    of_one_run = " and ".join(
        f"{noise[kind]:.4f} at equal {'text' if kind == 'tokens' else 'time'}"
        for kind in KINDS
        if noise[kind] is not None
    )
    verdicts = "whether it is *beyond noise* one seed cannot say."
    if of_one_run:
        verdicts = (
            "*beyond noise* says whether it is larger than two standard errors of it. A single run "
            f"deviates by {of_one_run} (standard deviation, pooled over the rows with several "
            "seeds); of many rows one in twenty passes by luck, of few more."
        )
    several = f", {seeds} where the first is within {clear:g} of the recipe's, else one"
    if seeds == 1:
        several = ""
    lines = [
        "# What each choice is worth",
        "",
        "Written by ablate.py: change the rows there, not the table here.",
        "",
        f"The recipe is `{recipe}`. Each row changes what it names and nothing else, and is "
        f"trained {' and '.join(limits[kind] for kind in KINDS if kind in wanted_kinds)}. The "
        "schedule of each run ends with it. Figures are validation bits per byte at the end of the "
        f"run: lower is better. In brackets is the number of seeds they are the mean of{several}.",
        "",
        f"*Difference* is to the recipe; {verdicts} The rates are tuned for the recipe, not for "
        "each row, and short runs favour what learns fast. Rows that the recipe has already are "
        "left out.",
        "",
        f"Machine: {about['device_name']}, {about['threads']} threads, {about['platform']}, torch "
        f"{about['torch']}" + (f"; commit {commits}." if commits else "."),
        "",
        "| row | settings | equal text | difference | beyond noise | equal time | difference | "
        "beyond noise | tok/s, relative |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, compared in rows:
        settings = f"`{ROWS[name]}`" if ROWS[name] else "the recipe"
        row, speed = [name, settings], f"{speeds[name]:.2f}" if name in speeds else ""
        for kind in KINDS:
            row += cells(compared.get(kind), name == "recipe")
        lines.append(f"| {' | '.join([*row, speed])} |")
    where = os.path.abspath(data_dir)
    failed = {(r["row"], r["error"].replace(where, "data")) for r in results if "error" in r}
    notes = [f"- a run of {name}, which failed: {error}" for name, error in sorted(failed)]
    notes += [f"- {name} is not measured, for want of its shards" for name in left_out]
    if notes:
        lines += ["", "Not in the table:", "", *notes]
    lines += [
        "",
        "To make it again, with the shards of every vocabulary in data (or in another folder, with "
        "--data_dir; what is in --out_dir already is not trained again):",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


names = [name.strip() for name in only.split(",") if name.strip()] or list(ROWS)
wanted_kinds = kinds.split(",")
for setting, wanted, known in (("only", names, ROWS), ("kinds", wanted_kinds, KINDS)):
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"{setting} = {unknown[0]!r}: expected names of {', '.join(known)}")
if seeds < 1 or tokens < 1 or rounds < 1 or jobs < 1:
    raise UserError("seeds, tokens, rounds and jobs must be above 0")
if not clear >= 0:
    raise UserError(f"clear = {clear}: expected 0 or above")
if "recipe" not in names:  # the others are compared with it
    names.insert(0, "recipe")
device = pick_device(device)
os.makedirs(out_dir, exist_ok=True)
results_path = os.path.join(out_dir, "results.jsonl")
if hint := shards_hint(train_settings(recipe.split()), data_dir):
    raise UserError(f"{data_dir} lacks the shards of {recipe}; make them with: {hint}")

base, left_out, measured = train_settings(recipe.split()), [], []
for name in names:
    settings = train_settings([*recipe.split(), *words_of(name)])
    if name != "recipe" and {**settings, "arch": ""} == {**base, "arch": ""}:
        continue  # what the recipe is already
    if hint := shards_hint(settings, data_dir):
        left_out.append(name)
        print(f"{name} is left out, {data_dir} lacks its shards; make them with: {hint}")
    else:
        measured.append(name)

earlier, results = read_results(), []


def results_of(name, kind):
    return [r for r in results if (r["row"], r["kind"]) == (name, kind) and "error" not in r]


def is_wanted(name, kind):
    """
    Whether a row gets this seed: its first, or its first came close to the recipe's; the recipe
    gets all.
    """
    ours, recipes = results_of(name, kind), results_of("recipe", kind)
    if not ours or not recipes or name == "recipe":
        return True
    return abs(ours[0]["val_bpb"] - recipes[0]["val_bpb"]) <= clear


def keep(result):
    """Put a line into results.jsonl."""
    earlier.append(result)
    with atomic_write(results_path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in earlier)


def speed_of(name):
    """The relative speed of a row, measured if that was not done before."""
    settings, base = train_settings(words_of_run(name)), train_settings(words_of_run("recipe"))
    if {key for key in settings if settings[key] != base[key]} <= SAME_WORK:
        return 1.0
    for r in earlier:
        if r["kind"] == "speed" and same_run(r["config"], settings) and same_run(r["base"], base):
            return r["ratio"]
    ratio = relative_speed(settings, base)
    if abs(ratio - 1) < SAME_SPEED:
        ratio = 1.0
    print(f"{name}: {ratio:.3f} of the recipe's speed", flush=True)
    about = {"row": name, "kind": "speed", "config": settings, "base": base, "ratio": ratio}
    keep({**about, "hardware": describe(device), "commit": git_commit()})
    return ratio


def train_all(todo, kind, seed):
    """Train one run of each of [(row, words)]; results go to the file as they come."""
    pool = ThreadPoolExecutor(jobs)
    bar = tqdm(total=len(todo), unit="run", desc=f"equal {kind}, seed {seed}")
    try:
        for future in as_completed(
            pool.submit(result_of, name, kind, seed, words) for name, words in todo
        ):
            result = future.result()
            bar.update()
            said = f"{result['val_bpb']:.4f}" if "error" not in result else result["error"]
            tqdm.write(f"{result['row']}, equal {kind}, seed {seed}: {said}")
            results.append(result)
            keep(result)
    finally:  # Ctrl-C reaches the runs as well
        pool.shutdown(cancel_futures=True)
        bar.close()


most = len(measured) * len(wanted_kinds) * seeds
print(
    f"{len(measured)} rows, {most} runs of {tokens:,} tokens at most, with what is done", flush=True
)
speeds = {}
if "time" in wanted_kinds:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath(os.path.join(out_dir, "compiled"))
    speeds = {name: speed_of(name) for name in tqdm(measured, unit="row", desc="speeds")}
# seeds outermost: a stopped ablation has whole rows, and a slow hour falls on all of them
for seed in range(first_seed, first_seed + seeds):
    for kind in wanted_kinds:
        todo = []
        for name in measured:
            if is_wanted(name, kind):
                words = run_words(name, kind, seed)
                settings = train_settings(words)
                same = (r for r in earlier if same_run(r["config"], settings))
                if found := [r for r in same if "val_bpb" in r]:
                    results.append({**found[-1], "row": name, "kind": kind})
                else:
                    todo.append((name, words))
        if todo:
            train_all(todo, kind, seed)

text = markdown(results, left_out)
if write:
    with atomic_write(write, "w") as f:
        f.write(text)
    print(f"wrote {write}")
else:
    print(text)
