"""
Many runs of train.py: a grid or a list of settings, each with several seeds.

    python sweep.py experiments/lr.py --data_dir=data         # an experiment of this repository
    python sweep.py experiments/lr.py --dry_run               # its runs, hours and cost alone
    python sweep.py --base=config/story.py --grid="hidden_lr=0.01,0.02,0.04 batch_size=4,8"
    python sweep.py --runs="small: --dim=64; large: --dim=256 --n_layers=6" --jobs=2

A sweep is a file of the settings below. First the speed of its runs is measured, and what they
will take is printed. Every run is a train.py of its own with a folder in out_dir (its words go to
NAME.log beside it), and a line of results.jsonl there, which plot.py draws:

    python plot.py out/sweeps/lr/results.jsonl

Ctrl-C stops the runs with a checkpoint. The same command then goes on: finished runs are passed
over, half ones resumed, failed ones tried again. A run that diverged has a result as well, and is
not done again. More values and seeds can be added to a sweep; one that changes what it has needs
another out_dir.
"""

import contextlib
import ctypes
import glob
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from itertools import product

from system.memory import tune_malloc

tune_malloc()  # as train.py does

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from configurator import UserError, configure  # noqa: E402
from dataset import DataPaths, read_sidecar  # noqa: E402
from model import ModelArgs  # noqa: E402
from optim import OPTIMIZERS  # noqa: E402
from system.files import atomic_write, read_json, remove, write_json  # noqa: E402
from system.hardware import pick_device  # noqa: E402
from training.rundir import WORTH_KEEPING, FolderInUse, RunDir  # noqa: E402
from training.runs import (  # noqa: E402
    OF_THE_START,
    SAME_WORK,
    TRAIN,
    args_of,
    model_of,
    read_log,
    same_run,
    seconds_of,
    shards_hint,
    stepper,
    tokens_of_step,
    train_settings,
)

# -----------------------------------------------------------------------------
# what is run
title = ""  # a line for pictures
base = "config/speedrun_cpu.py"  # words of train.py that all runs share
grid = ""  # NAME=VALUE,VALUE ... of settings of train.py: all combinations
runs = ""  # NAME: words of train.py; ... or a line each: a list; with a grid, each with all of it
seeds = 3  # runs of each
first_seed = 1337
equal_tokens = 0  # each run gets the steps that make so many tokens; 0: max_iters, as base says
equal_minutes = 0.0  # each gets the steps that its speed, measured first, makes in so many minutes
evals = 10  # evaluations of a run, about evenly spaced; 0: eval_interval, as base says
eval_windows = 0  # validation sequences, evenly spaced; 0: eval_iters batches, as base says
# how
data_dir = ""  # with the shards; empty: as base says
out_dir = ""  # empty: out/sweeps/NAME, of the sweep's file
jobs = 1  # runs at once: each with its part of the cores, or with one of the GPUs
device = "auto"
rounds = 3  # in which speeds are measured for equal_minutes
patience = 30.0  # seconds to wait for runs of a sweep that was killed, which save their last step
keep_checkpoints = False  # of finished runs, whose model.bin stays in any case
# before anything is spent
price = 0.0  # dollars of the machine an hour, for the estimate
dry_run = False  # print the list and the estimate, and stop
configure(globals())
# -----------------------------------------------------------------------------

OF_THE_WORK = {f.name for f in fields(ModelArgs)} - SAME_WORK | set(
    "batch_size gradient_accumulation_steps optimizer dtype compile attention fp8_head "
    "activation_checkpointing neuron_beta".split()
)
OF_LENGTH = "max_iters eval_iters eval_interval".split()  # settings
START_UP_S = 8  # of a run: loading torch and the data, writing what it leaves; a guess
SLOW_STEP = 3e11  # operations; on a CPU such a step is not tried for an estimate alone
CPU_SPEED = 1e11  # operations a second that are then taken for granted


def check_settings():
    for name, least in (
        ("seeds", 1),
        ("first_seed", 0),
        ("equal_tokens", 0),
        ("equal_minutes", 0),
        ("evals", 0),
        ("eval_windows", 0),
        ("jobs", 1),
        ("rounds", 1),
        ("patience", 0),
        ("price", 0),
    ):
        if not least <= globals()[name] < math.inf:
            raise UserError(f"{name} = {globals()[name]}: expected at least {least}")
    if equal_tokens and equal_minutes:
        raise UserError("equal_tokens and equal_minutes exclude each other: give one of them")
    if out_dir and os.path.isfile(out_dir):
        raise UserError(f"out_dir = {out_dir} is a file: name a folder")
    if not grid.strip() and not runs.strip():
        raise UserError(
            "nothing to sweep: name a file such as experiments/lr.py, or give "
            '--grid="hidden_lr=0.01,0.02" or --runs="NAME: words of train.py; ..."'
        )


def split(text, what):
    """The words of a setting, as a shell would split them."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{what}: {text!r} cannot be split into words ({e})") from None


def axes():
    """The grid as [(name, [values as text])]."""
    found = []
    for part in split(grid, "grid"):
        name, equals, values = part.lstrip("-").partition("=")
        values = values.split(",")
        if not equals or not all(values):
            raise UserError(f"grid: {part!r}: expected NAME=VALUE,VALUE")
        if name in ("run", *OF_THE_START, *dict(found)):
            raise UserError(
                f"grid: {part!r}: expected a setting of train.py that makes runs different, once"
            )
        found.append((name, values))
    return found


def listed():
    """The list of runs as [(name, [words])]; one without a name where there is no list."""
    found = []
    for line in re.split(r"[;\n]", runs):
        if not line.strip():
            continue
        name, colon, words = line.partition(":")
        if not colon or not name.strip():
            raise UserError(f"runs: {line.strip()!r}: expected NAME: words of train.py")
        found.append((name.strip(), split(words, "runs")))
    return found or [("", [])]


def check_model(config, varied):
    """Raise UserError where the numbers of a run's model do not fit together."""
    about = ", ".join(f"{k} = {v}" for k, v in varied.items())
    try:
        args_of(config)
    except ValueError as e:
        raise UserError(f"{about}: {e}") from None
    if (equal_tokens or equal_minutes) and config["max_minutes"]:
        raise UserError(
            f"{about}: max_minutes = {config['max_minutes']:g} leaves nothing to equal_tokens and "
            f"equal_minutes: leave it out"
        )
    if equal_minutes and config["compile"] == "auto":
        raise UserError(
            "equal_minutes measures speeds first, and cannot know what --compile=auto will do: put "
            "--compile=True or False into base"
        )
    if eval_windows and config["batch_size"] > 0 and eval_windows % config["batch_size"]:
        raise UserError(
            f"eval_windows = {eval_windows} is no multiple of batch_size = {config['batch_size']}: "
            f"the runs would be evaluated on different text"
        )


def plan():
    """[run] in the order in which they are done, seeds outermost: a dict of each, without length"""
    planned, names = [], set()
    of_all = split(base, "base")
    if data_dir:
        of_all.append(f"--data_dir={os.path.abspath(data_dir)}")
    has_seeds = any(name == "seed" for name, _ in axes())
    for seed in [None] if has_seeds else range(first_seed, first_seed + seeds):
        for (row, row_words), values in product(listed(), product(*(v for _, v in axes()))):
            varied = {"run": row} if row else {}
            varied |= {name: value for (name, _), value in zip(axes(), values, strict=True)}
            if seed is not None:
                varied["seed"] = seed
            settings = [f"--{name}={value}" for name, value in varied.items() if name != "run"]
            words = [*of_all, f"--device={device}", "--keep_last=1", "--picture=False"]
            words += [*row_words, *settings]
            config = train_settings(words)
            check_model(config, varied)
            varied = {name: config.get(name, value) for name, value in varied.items()}
            parts = (
                value if name == "run" else f"{name}={value}" for name, value in varied.items()
            )
            name = re.sub(r"[^\w.=+-]+", "_", "_".join(parts))
            if name in names:
                raise UserError(f"two runs of this sweep are {name}: leave one of them out")
            names.add(name)
            planned.append({"name": name, "varied": varied, "words": words, "config": config})
    return planned


def work_of(config):
    """A key of what decides the speed of a run's steps."""
    kept = {k: v for k, v in config.items() if k in OF_THE_WORK}
    return json.dumps([kept, device, threads], sort_keys=True)


def flops_of_step(config):
    with torch.device("meta"):
        return model_of(config).flops_per_token() * tokens_of_step(config)


def measure(planned, n_rounds):
    """
    Tokens/s of every kind of run, by work_of: medians of n_rounds in which they come in turn, since
    a machine's speed wanders. Measured once: the lengths of the runs depend on it, and a sweep that
    goes on must find the runs it has. On disk in speeds.json.
    """
    path = os.path.join(out_dir, "speeds.json")
    known = read_json(path) if os.path.exists(path) else {}
    kinds = {work_of(run["config"]): run["config"] for run in planned}
    missing = {key: config for key, config in kinds.items() if key not in known}
    found, guessed = {key: [] for key in missing}, set()
    todo = [item for _ in range(n_rounds) for item in missing.items()]
    for key, config in tqdm(todo, desc="measuring speeds", disable=not todo, leave=False):
        n_flops = flops_of_step(config)
        if config["optimizer"] not in OPTIMIZERS or n_flops <= 0:
            continue  # train.py says what is wrong with it
        if device_here.type == "cpu" and n_flops > SLOW_STEP and not equal_minutes:
            found[key].append(tokens_of_step(config) * CPU_SPEED / n_flops)
            guessed.add(config["dim"])
            continue
        torch.manual_seed(1)
        try:
            step = stepper(config, device_here)
            seconds_of(step, 1, device_here)  # which compiles it, where that is asked for
            budget_s = 2.0 if equal_minutes else 0.5
            n = min(50, max(1, round(budget_s / seconds_of(step, 1, device_here))))
            found[key].append(n * tokens_of_step(config) / seconds_of(step, n, device_here))
        except (RuntimeError, ValueError) as e:  # a GPU's memory; train.py finds a way, or says why
            tqdm.write(f"a step cannot be measured: {str(e).splitlines()[0]}")
        step = None
    if guessed:
        dims = ", ".join(map(str, sorted(guessed)))
        print(f"too large to try here (dim {dims}): 100 billion operations a second are assumed")
    known |= {key: round(statistics.median(speeds), 1) for key, speeds in found.items() if speeds}
    if missing and not dry_run:
        write_json(path, known)
    if equal_minutes and len(kinds.keys() - known.keys()):
        raise UserError("equal_minutes needs the speeds of all runs, and some cannot be measured")
    return {key: known.get(key, 0.0) for key in kinds}


def give_length(run, speeds):
    """Add the words that decide a run's length and evaluations, and its "seconds", an estimate."""
    config = run["config"]
    size, speed = tokens_of_step(config), speeds[work_of(config)]
    run["speed"], run["seconds"] = speed, START_UP_S
    if size < 1:  # train.py says what is wrong with it
        return
    more, n_steps = [], config["max_iters"]
    if equal_tokens or equal_minutes:
        n_tokens = equal_tokens or equal_minutes * 60 * speed
        n_steps = max(1, round(n_tokens / size))
        more.append(f"--max_iters={n_steps}")
    if eval_windows:
        more.append(f"--eval_iters={math.ceil(eval_windows / config['batch_size'])}")
    if evals and not config["max_minutes"]:
        more.append(f"--eval_interval={math.ceil(n_steps / evals)}")
    run["words"] += more
    run["config"] = config = train_settings(run["words"])
    if not speed:
        return
    train_s = 60 * config["max_minutes"] or n_steps * size / speed
    meta = read_sidecar(
        DataPaths(config["data_dir"], config["vocab_source"], config["vocab_size"]).shards
    )
    n_valid = config["eval_iters"] * config["batch_size"] * config["max_seq_len"]
    if meta:
        n_valid = min(n_valid, meta["shards"][0]["tokens"])
    n_evals = evals or math.ceil(n_steps / config["eval_interval"])
    # forward alone is a third of a step
    run["seconds"] += train_s + n_evals * n_valid / (3 * speed)


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_results():
    """{name: line} of results.jsonl; UserError where it has something else."""
    found = {}
    if os.path.exists(results_path):
        with open(results_path, encoding="utf-8", errors="replace") as f:
            for number, text in enumerate(f, 1):
                try:
                    line = json.loads(text)
                    if not isinstance(line["config"], dict):
                        raise TypeError
                    found[line["name"]] = line
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{results_path}, line {number} is no result of a run: delete the line"
                    ) from None
    return found


def check_earlier(has_length):
    """Raise UserError where results.jsonl has runs that are not those of this sweep."""
    ours = {run["name"]: run["config"] for run in planned}
    for name, line in results.items():
        there, now = line["config"], ours.get(name)
        if now and not has_length:  # nor the number of evaluations
            now = {**now, **{k: there[k] for k in OF_LENGTH if k in there}}
        if not now:
            why = "which this sweep does not have"
        elif not same_run(there, now):
            changed = next(
                k for k in now if k in there and not same_run({k: there[k]}, {k: now[k]})
            )
            why = f"with {changed} = {there[changed]} and not {now[changed]}"
        else:
            continue
        raise UserError(
            f"{results_path} has a run {name}, {why}: give another --out_dir, or delete the folder"
        )


def keep(line):
    """Put a line into results.jsonl, in place of its run's earlier one, in the sweep's order."""
    results[line["name"]] = line
    with atomic_write(results_path, "w") as f:
        for run in planned:
            if run["name"] in results:
                f.write(json.dumps(results[run["name"]]) + "\n")


def result_of(run):
    """The line of a run that has ended, finished or diverged; None where its log has no end."""
    log = read_log(folder_of(run))
    reason = log.get("end", {}).get("reason")
    if not log.get("start") or not same_run(log["start"]["config"], run["config"]):
        return None
    if reason not in ("finished", "diverged"):
        return None
    start, end, evals = log["start"], log["end"], log["evals"]
    is_done = reason == "finished"
    if is_done and not evals:
        return None
    best = min(evals, key=lambda line: line["val_loss"], default={})
    final = evals[-1] if is_done else {}
    uniform = math.log(start["model_args"]["vocab_size"])
    return {
        "name": run["name"],
        "sweep": os.path.basename(out_dir),
        "title": title,
        "varied": run["varied"],
        # worse than not knowing anything is no result of learning
        "status": "diverged" if not is_done or final["val_loss"] > uniform else "finished",
        "seed": run["config"]["seed"],
        "steps": end["step"],
        "tokens": end["tokens"],
        "train_s": end["train_s"],
        "val_loss": final.get("val_loss"),
        "val_bpb": final.get("val_bpb"),
        "best_val_loss": best.get("val_loss"),
        "best_val_bpb": best.get("val_bpb"),
        "n_params": start["n_params"],
        "commit": start["commit"],
        "hardware": {k: start[k] for k in ("device_name", "threads", "platform", "torch")},
        "curve": [
            {k: line[k] for k in ("step", "tokens", "train_s", "val_loss", "val_bpb")}
            for line in evals
        ],
        "config": run["config"],
    }


def folder_of(run):
    return os.path.join(out_dir, run["name"])


def text_of(run):
    """Where the words of a run go."""
    return f"{folder_of(run)}.log"


def before_exec():
    """In the process of a run: it stops with a checkpoint where the sweep is killed (Linux)."""
    with contextlib.suppress(AttributeError, NameError, OSError):
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def begin(run, slot):
    """Start or resume a run in a slot, from 0 to jobs - 1."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
    if n_gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == n_gpus else list(map(str, range(n_gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % n_gpus]
    if run["config"]["compile"] != "False":
        environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath(os.path.join(out_dir, "compiled"))
    words = [*run["words"], f"--out_dir={folder_of(run)}"]
    log = read_log(folder_of(run))
    if log.get("start") and same_run(log["start"]["config"], run["config"]):
        words.append("--resume=auto")
    options = {}
    if os.name != "nt":  # Ctrl-C is for the sweep, which tells its runs
        options = {
            "start_new_session": True,
            "preexec_fn": before_exec,
            "pass_fds": [folder.lock_file],
        }
    with open(text_of(run), "a", encoding="utf-8") as f:
        return subprocess.Popen(
            [sys.executable, TRAIN, *words], stdout=f, stderr=f, env=environment, **options
        )


def last_line(run):
    """The last line that a run said."""
    with open(text_of(run), encoding="utf-8", errors="replace") as f:
        lines = f.read().strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it ended without a word"


def finish(run, status):
    """Keep the result of a run that has ended; returns what to say about it."""
    line = result_of(run)
    if line is None:
        if stopping:
            return f"{run['name']}: stopped"
        error = last_line(run)
        about = {k: run[k] for k in ("name", "varied", "config")}
        keep({**about, "status": "failed", "seed": run["config"]["seed"], "error": error})
        return f"{run['name']}: failed with status {status}: {error} ({text_of(run)})"
    keep(line)
    drop_checkpoints(run)
    return said(line)


def drop_checkpoints(run):
    """Delete the checkpoints of a run that has its result."""
    if not keep_checkpoints:
        where = glob.escape(folder_of(run))
        for pattern in WORTH_KEEPING:
            for path in glob.glob(os.path.join(where, pattern)):
                remove(path)


def said(line):
    if line["status"] == "diverged":
        return f"{line['name']}: diverged at step {line['steps']}"
    bpb = f", {line['val_bpb']:.4f} bits per byte" if line["val_bpb"] else ""
    return f"{line['name']}: {line['val_loss']:.4f}{bpb}, {duration(line['train_s'])} of training"


def request_stop(signum, frame):
    """First Ctrl-C: runs stop after their step, with a checkpoint; a second one ends them."""
    global stopping
    is_first, stopping = not stopping, True
    for process in list(running):
        process.terminate() if is_first else process.kill()
    if is_first:
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line
            tqdm.write("stopping the runs, with a checkpoint each; once more ends them at once")


def run_all(todo, total_s):
    """Do the runs of a list, `jobs` at once, and say what came out of each."""
    waiting, slots = list(todo), list(range(jobs))
    bar = tqdm(total=round(total_s), unit="s", desc="of the estimate", dynamic_ncols=True)
    while (waiting and not stopping) or running:
        while waiting and slots and not stopping:
            run, slot = waiting.pop(0), slots.pop(0)
            process = begin(run, slot)
            running[process] = run, slot
            if stopping:  # it was said while the run began
                process.terminate()
        time.sleep(0.1)
        for process in [p for p in running if p.poll() is not None]:
            run, slot = running.pop(process)
            slots.append(slot)
            tqdm.write(finish(run, process.returncode))
            bar.update(round(run["seconds"]))
    bar.close()


def lock_folder():
    """out_dir, locked for this sweep and its runs; UserError where another one is at work."""
    for attempt in range(1 + int(10 * patience)):
        try:
            return RunDir(out_dir)
        except FolderInUse:
            if attempt == 5:
                print(f"waiting: a sweep, or runs of one that was killed, are still in {out_dir}")
        time.sleep(0.1)
    raise UserError(f"another sweep is at work in {out_dir}: wait for it, or give an --out_dir")


check_settings()
device_here = pick_device(device)
device = device_here.type if device == "auto" else device
n_gpus = torch.cuda.device_count() if device == "cuda" else 0
threads = max(1, torch.get_num_threads() // jobs)
torch.set_num_threads(threads)
if not out_dir:
    files = [word for word in sys.argv[1:] if word.endswith(".py") and not word.startswith("-")]
    name = os.path.splitext(os.path.basename(files[-1]))[0] if files else "sweep"
    out_dir = os.path.join("out", "sweeps", name)
results_path = os.path.join(out_dir, "results.jsonl")
with contextlib.suppress(OSError, TypeError):  # not on Windows
    libc = ctypes.CDLL(None)

planned = plan()
hints = {}
for run in planned:
    if hint := shards_hint(run["config"], run["config"]["data_dir"]):
        hints[hint] = None
if hints and not dry_run:
    raise UserError(f"there are no shards for this sweep; make them with: {' && '.join(hints)}")
if not dry_run:
    folder = lock_folder()
results = read_results()
check_earlier(has_length=False)  # before anything is measured
speeds = measure(planned, rounds if equal_minutes else 1)
for run in planned:
    give_length(run, speeds)
check_earlier(has_length=True)
todo = []
for run in planned:
    earlier = results.get(run["name"])
    if not earlier or earlier["status"] == "failed":
        if not (line := result_of(run)):
            todo.append(run)
        elif not dry_run:  # the sweep was killed before it could keep it
            keep(line)
            drop_checkpoints(run)
total_s = sum(run["seconds"] for run in todo)
print(f"{'run':<52} {'steps':>9} {'tokens':>15} {'tokens/s':>10} {'time':>8}")
for run in planned:
    n, config = run["config"]["max_iters"], run["config"]
    steps = f"{config['max_minutes']:g} min" if config["max_minutes"] else f"{n:,}"
    tokens = "" if config["max_minutes"] else f"{n * tokens_of_step(config):,}"
    left = duration(run["seconds"]) if run in todo else "done"
    print(f"{run['name']:<52} {steps:>9} {tokens:>15} {run['speed']:>10,.0f} {left:>8}")
slowest = max((run["seconds"] for run in todo), default=0)
wall_s = max(total_s / jobs, slowest)
cost = f", {price * wall_s / 3600:.2f} dollars" if price else ""
print(
    f"{len(todo)} of {len(planned)} runs to do, about {duration(wall_s)}{cost}"
    + (f" with {jobs} at once" if jobs > 1 else ""),
    flush=True,
)
if dry_run:
    for hint in hints:
        print(f"there are no shards for some of it; make them with: {hint}")
    raise SystemExit

stopping, running = False, {}  # running: {process: (run, slot)}
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, request_stop)
if todo:
    run_all(todo, total_s)
lines = [results[run["name"]] for run in planned if run["name"] in results]
by_status = {s: [x for x in lines if x["status"] == s] for s in ("finished", "diverged", "failed")}
for line in by_status["finished"] + by_status["diverged"]:
    print(said(line))
for line in by_status["failed"]:
    print(f"{line['name']}: failed: {line['error']}")
print(", ".join(f"{len(found)} {status}" for status, found in by_status.items() if found))
if stopping:
    print("stopped; the same command goes on")
elif by_status["failed"]:
    raise UserError(f"{len(by_status['failed'])} runs failed; the same command tries them again")
else:
    print(f"wrote {results_path}; next: python plot.py {shlex.quote(results_path)}")
