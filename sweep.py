"""
Compare settings of train.py: run it for a grid or a list of settings, with several seeds each.

    python sweep.py experiments/lr.py --data_dir=data         # an experiment in this repository
    python sweep.py experiments/lr.py --dry_run               # only print its runs, hours and cost
    python sweep.py --base=config/story.py --grid="hidden_lr=0.01,0.02,0.04 batch_size=4,8"
    python sweep.py --runs="small: --dim=64; large: --dim=256 --n_layers=6" --jobs=2

A sweep file assigns the settings below. sweep.py first measures the speed of the runs and prints
how long they will take. Each run is a separate train.py process with its own folder in out_dir. Its
output goes to NAME.log beside the folder, and its result to a line of results.jsonl, which plot.py
draws:

    python plot.py out/sweeps/lr/results.jsonl

Ctrl-C stops the runs with a checkpoint. The same command then continues: it skips finished and
diverged runs, resumes interrupted ones and retries failed ones. You can add values and seeds to a
sweep; for any other change, choose another out_dir.
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
from collections import Counter
from dataclasses import dataclass
from itertools import product

from configurator import UserError, check_range, configure, split_words
from system.tuning import tune_process

# -----------------------------------------------------------------------------
# runs
title = ""  # title of the sweep, for pictures and tables
base = "config/speedrun_cpu.py"  # train.py arguments that all runs share
grid = ""  # all combinations of train.py settings: NAME=VALUE,VALUE ...
runs = ""  # runs by name (NAME: train.py arguments; ...), each with the grid
seeds = 3  # seeds per run
first_seed = 1337  # first seed; the others count up from it
# length of each run
equal_tokens = 0  # train on this many tokens; 0: use max_iters of base
equal_bytes = 0  # train on this many bytes of text; fair between vocabularies
equal_minutes = 0.0  # train for this many minutes, at a speed measured first
equal_flops = 0.0  # train with this many operations, see flops_per_token; same on every machine
# evaluation
evals = 10  # evaluations per run, evenly spaced; 0: use eval_interval of base
eval_windows = 0  # validation sequences; 0: use eval_iters of base
# files
data_dir = ""  # folder with the shards; empty: use data_dir of base
out_dir = ""  # output folder; empty: out/sweeps/NAME, from the sweep file
keep_checkpoints = False  # keep checkpoints of finished runs, not only model.bin
# hardware
jobs = 1  # runs at once, each with a share of the cores or with one GPU
device = "auto"  # cpu, cuda, cuda:1, mps, or auto (first of cuda, mps, cpu)
rounds = 3  # speed measurements per run (for equal_minutes)
patience = 30.0  # seconds to wait for a killed sweep's runs to save and exit
# cost estimate
price = 0.0  # dollars per hour for this machine
dry_run = False  # print the runs and the estimate, and exit
try:
    configure(globals())
except UserError as e:
    from training.settings import GROUPS, names_of

    name = str(e).partition("unknown setting --")[2].partition(":")[0]
    if name not in names_of(*GROUPS):
        raise
    raise UserError(
        f"--{name} is a setting of train.py: use --base='{base} --{name}=...' for all runs, or "
        f"--grid='{name}=...' to vary it"
    ) from None
# -----------------------------------------------------------------------------

tune_process()  # like train.py, so that measured speeds are the same

import torch

from dataset import DataPaths, read_sidecar
from report.sweeps import FIELDS, read_results
from report.tables import print_table
from system.files import atomic_write, read_json, remove, write_json
from system.hardware import pick_device
from system.progress import print_line, progress
from system.threads import Threads
from training.rundir import WORTH_KEEPING, FolderInUse, RunDir
from training.runlog import RunLog
from training.runs import (
    changed_settings,
    flops_of_step,
    same_run,
    shards_hint,
    tokens_per_second,
    tokens_per_step,
    work_of,
)
from training.settings import GROUPS, SAME_RESULT, TRAIN, args_of, check, resolved

LENGTHS = "equal_tokens", "equal_bytes", "equal_minutes", "equal_flops"
START_UP_S = 8  # guessed time to load torch and the data, and to write files
# for a mere estimate, a CPU times no steps with more operations, and none after so many seconds
SLOW_STEP, ESTIMATE_S = 3e11, 20
CPU_SPEED = 1e11  # operations per second, assumed for steps that are not timed
BYTES_PER_TOKEN = 4  # assumed in a dry run without shards


@dataclass(eq=False)
class PlannedRun:
    name: str
    varied: dict  # {setting: value} that distinguish it from the other runs
    row: list  # its arguments from `runs`
    arguments: list  # all arguments of train.py except out_dir
    config: dict  # all settings of train.py
    speed: float = 0.0  # tokens/s; 0: unknown
    seconds: float = START_UP_S  # estimate of the whole run

    @property
    def folder(self):
        return os.path.join(sweep_dir, self.name)

    @property
    def output(self):
        return f"{self.folder}.log"

    def set(self, **settings):
        self.arguments += [f"--{name}={value}" for name, value in settings.items()]
        self.config |= settings

    def logged(self):
        """Return the log in its folder, or an empty log if the folder is of another run."""
        log = RunLog(self.folder).read()
        is_same = log.start and same_run(log.start["config"], self.config)
        return log if is_same else RunLog(self.folder)


# ---- the plan


def check_settings():
    lengths = {name: globals()[name] for name in LENGTHS}
    check_range(1, seeds=seeds, jobs=jobs, rounds=rounds)
    check_range(0, **lengths, first_seed=first_seed, evals=evals, eval_windows=eval_windows)
    check_range(0, patience=patience, price=price)
    given = [name for name, value in lengths.items() if value]
    if len(given) > 1:
        raise UserError(f"{given[0]} cannot be used with {given[1]}: use only one of them")
    if not grid.strip() and not runs.strip():
        raise UserError(
            "nothing to sweep: pass a file such as experiments/lr.py, or use "
            '--grid="hidden_lr=0.01,0.02" or --runs="NAME: train.py arguments; ..."'
        )


def grid_axes():
    """Return the grid as {setting: [values as text]}."""
    axes = {}
    for part in split_words(grid, "grid"):
        name, equals, values = part.lstrip("-").partition("=")
        values = values.split(",")
        if not equals or not all(values):
            raise UserError(f"grid = {part!r}: expected NAME=VALUE,VALUE")
        if name == "run" or name in SAME_RESULT or name in axes:
            raise UserError(
                f"grid = {part!r}: expected a setting of train.py that changes the run, once"
            )
        axes[name] = values
    return axes


def listed_runs():
    """Return `runs` as [(name, [arguments])], or one unnamed run if it is empty."""
    rows = []
    for line in filter(str.strip, re.split(r"[;\n]", runs)):
        name, colon, arguments = line.partition(":")
        if not colon or not name.strip():
            raise UserError(f"runs = {line.strip()!r}: expected NAME: train.py arguments")
        rows.append((name.strip(), split_words(arguments, "runs")))
    return rows or [("", [])]


def check_run(config, varied):
    """Raise UserError if a run's settings conflict with each other or with the sweep's."""
    label = ", ".join(f"{k} = {v}" for k, v in varied.items())
    try:
        check(config)
        args_of(config)
        if dials := [name for name in GROUPS["dial"] if config[name]]:
            raise UserError(
                f"{dials[0]} cannot be used with sweep.py: use the settings that it chooses, which "
                f"train.py prints"
            )
        if config["on_finish"]:
            raise UserError("on_finish cannot be used with sweep.py: leave it out")
    except UserError as e:
        raise UserError(f"{label}: {e}") from None
    if any(globals()[name] for name in LENGTHS) and config["max_minutes"]:
        raise UserError(
            f"{label}: max_minutes = {config['max_minutes']:g} cannot be used with "
            f"{', '.join(LENGTHS[:-1])} or {LENGTHS[-1]}: use only one of them"
        )
    if equal_minutes and config["compile"] == "auto":
        raise UserError(
            "equal_minutes cannot be used with compile = auto: use --compile=True or "
            "--compile=False in --base"
        )
    if eval_windows % config["batch_size"]:
        raise UserError(
            f"eval_windows = {eval_windows}: expected a multiple of batch_size = "
            f"{config['batch_size']}, so that all runs are evaluated on the same text"
        )


def plan(device_name):
    """Return [PlannedRun] in the order of execution, seeds outermost, without their lengths."""
    planned, axes = {}, grid_axes()
    shared = split_words(base, "base")
    if data_dir:
        shared.append(f"--data_dir={os.path.abspath(data_dir)}")
    shared += [f"--device={device_name}", "--keep_last=1", "--picture=False"]
    seed_values = [None] if "seed" in axes else range(first_seed, first_seed + seeds)
    for seed, (name, row), values in product(seed_values, listed_runs(), product(*axes.values())):
        cell = [f"--{axis}={value}" for axis, value in zip(axes, values, strict=True)]
        arguments = [*shared, *row, *cell]
        config = dict(resolved(tuple(arguments)))
        varied = ({"run": name} if name else {}) | {axis: config[axis] for axis in axes}
        run = PlannedRun("", varied, row, arguments, config)
        if seed is not None:
            varied["seed"] = seed
            run.set(seed=seed)
        check_run(config, varied)
        parts = (value if name == "run" else f"{name}={value}" for name, value in varied.items())
        run.name = re.sub(r"[^\w.=+-]+", "_", "_".join(parts))
        if run.name in planned:
            raise UserError(f"two runs of this sweep are named {run.name}: remove one of them")
        planned[run.name] = run
    return list(planned.values())


# ---- lengths


def measure(planned, torch_device):
    """
    Set the speed of each run, in tokens/s, if its step can be measured. It is the median of several
    rounds over all runs, because a machine's speed drifts. speeds.json keeps the speeds: lengths
    depend on them, and a resumed sweep must plan the same runs again.
    """
    path = os.path.join(sweep_dir, "speeds.json")
    known = read_json(path) if os.path.exists(path) else {}
    # no compilation for a mere estimate
    changes = {} if equal_minutes else {"compile": "False"}
    configs = {run: run.config | changes for run in planned}
    keys = {run: work_of(config, threads) for run, config in configs.items()}
    new = {key: configs[run] for run, key in keys.items() if key not in known}
    speeds, guessed, started = {key: [] for key in new}, False, time.monotonic()
    todo = list(new.items()) * (rounds if equal_minutes else 1)
    for key, config in progress(
        todo, desc="measuring speeds", unit="run", disable=not todo, leave=False
    ):
        n_flops = flops_of_step(config)
        is_long = n_flops > SLOW_STEP or time.monotonic() - started > ESTIMATE_S
        if torch_device.type == "cpu" and is_long and not equal_minutes:
            speeds[key].append(tokens_per_step(config) * CPU_SPEED / n_flops)
            guessed = True
            continue
        try:
            budget_s = 2.0 if equal_minutes else 0.5
            speeds[key].append(tokens_per_second(config, torch_device, budget_s))
        except (RuntimeError, ValueError) as e:  # such as little GPU memory: train.py adapts
            print_line(f"warning: cannot measure a step: {str(e).splitlines()[0]}")
    if guessed:
        print("note: some runs are too slow to time here; assuming 100 billion operations/s")
    known |= {key: round(statistics.median(s), 1) for key, s in speeds.items() if s}
    if todo and not dry_run:
        write_json(path, known)
    if equal_minutes and set(keys.values()) - known.keys():
        raise UserError("equal_minutes needs the speed of every run, and some cannot be measured")
    for run, key in keys.items():
        run.speed = known.get(key, 0.0)


def shards_of(config):
    """Return the sidecar's list of shards, validation first, or [] without a sidecar."""
    paths = DataPaths(config["data_dir"], config["vocab_source"], config["vocab_size"])
    return (read_sidecar(paths.shards) or {"shards": []})["shards"]


def tokens_in(n_bytes, config):
    """Return how many tokens n_bytes of training text have in a run's vocabulary."""
    shards = shards_of(config)[1:]
    if not shards:
        if not dry_run:
            paths = DataPaths(config["data_dir"], config["vocab_source"], config["vocab_size"])
            raise UserError(
                f"{paths.shards}/shards.json does not exist, but equal_bytes needs it; make the "
                f"shards again"
            )
        return n_bytes / BYTES_PER_TOKEN
    return n_bytes * sum(s["tokens"] for s in shards) / sum(s["bytes"] for s in shards)


def set_length(run):
    """Set a run's length and evaluations, and estimate its time."""
    config, size = run.config, tokens_per_step(run.config)
    n_tokens = equal_tokens or equal_minutes * 60 * run.speed
    if equal_bytes:
        n_tokens = tokens_in(equal_bytes, config)
    if equal_flops:
        n_tokens = equal_flops * size / flops_of_step(config)
    if n_tokens:
        run.set(max_iters=max(1, round(n_tokens / size)))
    if eval_windows:
        run.set(eval_iters=math.ceil(eval_windows / config["batch_size"]))
    if evals and not config["max_minutes"]:
        run.set(eval_interval=math.ceil(config["max_iters"] / evals))
    if not run.speed:
        return
    train_s = 60 * config["max_minutes"] or config["max_iters"] * size / run.speed
    n_valid = config["eval_iters"] * config["batch_size"] * config["max_seq_len"]
    n_valid = min([n_valid, *(shard["tokens"] for shard in shards_of(config)[:1])])
    n_evals = math.ceil(train_s * run.speed / size / config["eval_interval"])
    run.seconds += train_s + n_evals * n_valid / (3 * run.speed)  # a forward is 1/3 of a step


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_estimate(planned, todo):
    rows = []
    for run in planned:
        n, minutes = run.config["max_iters"], run.config["max_minutes"]
        steps = f"{minutes:g} min" if minutes else f"{n:,}"
        tokens = "" if minutes else f"{n * tokens_per_step(run.config):,}"
        left = duration(run.seconds) if run in todo else "done"
        rows.append([run.name, steps, tokens, f"{run.speed:,.0f}", left])
    print_table(["run", "steps", "tokens", "tokens/s", "time"], rows)
    seconds = [run.seconds for run in todo]
    wall_s = max([sum(seconds) / jobs, *seconds])
    cost = f", {price * wall_s / 3600:.2f} dollars" if price else ""
    at_once = f" with {jobs} at once" if jobs > 1 else ""
    print(
        f"{len(todo)} of {len(planned)} runs to do in {sweep_dir}, "
        f"about {duration(wall_s)}{cost}{at_once}",
        flush=True,
    )


# ---- results


class Results:
    """results.jsonl of a sweep: one line for each run that has ended, in the sweep's order."""

    def __init__(self, planned):
        self.path = os.path.join(sweep_dir, "results.jsonl")
        self.planned, self.lines = planned, {}
        if os.path.exists(self.path):
            lines, bad = read_results(self.path)
            if bad:
                raise UserError(
                    f"{self.path} is damaged: line {bad[0]} is not the result of a run; delete "
                    f"the line"
                )
            self.lines = {line["name"]: line for line in lines}

    def in_order(self):
        return [self.lines[run.name] for run in self.planned if run.name in self.lines]

    def check(self):
        """Raise UserError if there are results of runs that do not belong to this sweep."""
        configs = {run.name: run.config for run in self.planned}
        for name, line in self.lines.items():
            old, new = line["config"], configs.get(name)
            if not new:
                difference = "which is not in this sweep"
            elif changed := changed_settings(new, old):
                setting = changed[0]
                difference = f"with {setting} = {old.get(setting)} instead of {new[setting]}"
            else:
                continue
            raise UserError(
                f"{self.path} already has a run {name}, {difference}; choose another --out_dir, or "
                f"delete the folder"
            )

    def save(self, line):
        """Write a line to results.jsonl, replacing an earlier one of the same run."""
        self.lines[line["name"]] = line
        with atomic_write(self.path, "w") as f:
            f.writelines(json.dumps(line) + "\n" for line in self.in_order())

    def save_ended(self, run):
        """Save the result of a run if it has finished or diverged; return whether it has."""
        line = result_of(run)
        if not line or dry_run:
            return bool(line)
        self.save(line)
        if not keep_checkpoints:
            for pattern in WORTH_KEEPING:
                for path in glob.glob(os.path.join(glob.escape(run.folder), pattern)):
                    remove(path)
        return True

    def save_failed(self, run, exit_status):
        """Save the result of a failed run, with the last line that it printed as its error."""
        with open(run.output, encoding="utf-8", errors="replace") as f:
            output = f.read().strip() or f"no message, exit status {exit_status}"
        error = output.splitlines()[-1].removeprefix("error: ")
        self.save({**common_fields(run), "status": "failed", "error": error})


def common_fields(run):
    """Return the fields of results.jsonl that do not depend on how the run ended."""
    return {
        "name": run.name,
        "sweep": os.path.basename(sweep_dir),
        "title": title,
        "varied": run.varied,
        "arguments": " ".join(run.row),
        "seed": run.config["seed"],
        "config": run.config,
    }


def result_of(run):
    """Return the line for a run that has finished or diverged, otherwise None."""
    log = run.logged()
    is_done = log.end.get("reason") == "finished"
    if not (is_done and log.evals) and log.end.get("reason") != "diverged":
        return None
    final = log.evals[-1] if is_done else {}
    # the loss of uniform guessing; a model that is worse counts as diverged
    uniform = math.log(log.start["model_args"]["vocab_size"])
    return {
        **common_fields(run),
        "status": "diverged" if not is_done or final["val_loss"] > uniform else "finished",
        "steps": log.end["step"],
        "tokens": log.end["tokens"],
        "train_s": log.end["train_s"],
        "val_loss": final.get("val_loss"),
        "val_bpb": final.get("val_bpb"),
        "best_val_loss": log.best.get("val_loss"),
        "best_val_bpb": log.best.get("val_bpb"),
        "n_params": log.start["n_params"],
        "commit": log.start["commit"],
        "hardware": {k: log.start[k] for k in ("device_name", "threads", "platform", "torch")},
        "curve": [
            {k: line[k] for k in ("step", "tokens", "train_s", "val_loss", "val_bpb")}
            for line in log.evals
        ],
    }


def summary_of(line):
    """Return a line of text about a result."""
    if line["status"] == "failed":
        return f"{line['name']}: failed: {line['error']} (see {sweep_dir}/{line['name']}.log)"
    if line["status"] == "diverged":
        return f"{line['name']}: diverged at step {line['steps']}"
    bpb = f", {line['val_bpb']:.4f} bits per byte" if line["val_bpb"] else ""
    return f"{line['name']}: {line['val_loss']:.4f}{bpb}, {duration(line['train_s'])} of training"


# ---- running


class Runner:
    """Runs train.py in separate processes, `jobs` at once."""

    def __init__(self, results, folder, n_gpus):
        self.results, self.folder, self.n_gpus = results, folder, n_gpus
        self.running, self.stopping = {}, False  # {process: (run, slot)}
        self.libc = None if os.name == "nt" else ctypes.CDLL(None)

    def request_stop(self, signum, frame):
        """On the first Ctrl-C, stop the runs with a checkpoint; on the second, kill them."""
        is_first, self.stopping = not self.stopping, True
        for process in list(self.running):
            process.terminate() if is_first else process.kill()
        if is_first:
            with contextlib.suppress(RuntimeError):  # another line is being printed
                print_line("stopping the runs with a checkpoint; press Ctrl-C again to kill them")

    def before_exec(self):
        """Make the new process stop with a checkpoint if the sweep is killed (Linux only)."""
        with contextlib.suppress(AttributeError):
            self.libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def start(self, run, slot):
        """Start or resume a run in a slot (0 to jobs - 1) and return its process."""
        environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
        if self.n_gpus > 1:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpus = gpus if len(gpus) == self.n_gpus else list(map(str, range(self.n_gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % self.n_gpus]
        command = [sys.executable, TRAIN, *run.arguments, f"--out_dir={run.folder}"]
        if run.logged().start:
            command.append("--resume=auto")
        options = {}
        if os.name != "nt":  # only the sweep gets Ctrl-C, and then stops its runs
            options = {
                "start_new_session": True,
                "preexec_fn": self.before_exec,
                "pass_fds": [self.folder.lock_file],
            }
        with open(run.output, "a", encoding="utf-8") as f:
            return subprocess.Popen(command, stdout=f, stderr=f, env=environment, **options)

    def finish(self, run, exit_status):
        """Save the result of a run that has exited, and return a line of text about it."""
        if not self.results.save_ended(run):
            if self.stopping:
                return f"{run.name}: stopped"
            self.results.save_failed(run, exit_status)
        return summary_of(self.results.lines[run.name])

    def run_all(self, todo):
        """Execute runs and print the outcome of each."""
        waiting, slots = list(todo), list(range(jobs))
        total_s = round(sum(run.seconds for run in todo))
        bar = progress(total=total_s, unit="s", desc="of the estimate", dynamic_ncols=True)
        while (waiting and not self.stopping) or self.running:
            while waiting and slots and not self.stopping:
                run, slot = waiting.pop(0), slots.pop(0)
                process = self.start(run, slot)
                self.running[process] = run, slot
                if self.stopping:  # the signal came while the run was starting
                    process.terminate()
            time.sleep(0.1)
            for process in [p for p in self.running if p.poll() is not None]:
                run, slot = self.running.pop(process)
                slots.append(slot)
                print_line(self.finish(run, process.returncode))
                if not self.stopping:
                    bar.update(round(run.seconds))
        bar.close()


def lock_folder():
    """Lock the sweep's folder for it and its runs. Raises UserError if another sweep uses it."""
    for attempt in range(1 + int(10 * patience)):
        try:
            return RunDir(sweep_dir)
        except FolderInUse:
            if attempt == 5:
                print(f"waiting: another sweep, or runs of a killed one, still use {sweep_dir}")
        time.sleep(0.1)
    raise UserError(f"another sweep is using {sweep_dir}: wait for it, or choose another --out_dir")


def name_of_sweep():
    """Return the name of the sweep's file, or without a file its base and what it varies."""
    files = [arg for arg in sys.argv[1:] if arg.endswith(".py") and not arg.startswith("-")]
    if files:
        return os.path.splitext(os.path.basename(files[-1]))[0]
    bases = [os.path.splitext(os.path.basename(w))[0] for w in base.split() if w.endswith(".py")]
    names = [*bases, *grid_axes(), *(name for name, _ in listed_runs() if name)]
    return re.sub(r"[^\w.=+-]+", "_", "-".join(names))[:100]


# ---- the sweep

check_settings()
torch_device = pick_device(device)
device_name = torch_device.type if device == "auto" else device
threads = max(1, torch.get_num_threads() // jobs)  # maximum for each run
torch.set_num_threads(threads)
Threads(torch_device)
sweep_dir = out_dir or os.path.join("out", "sweeps", name_of_sweep())

planned = plan(device_name)
hints = [shards_hint(run.config, run.config["data_dir"]) for run in planned]
hints = list(dict.fromkeys(filter(None, hints)))
if hints and not dry_run:
    config = planned[0].config
    paths = DataPaths(config["data_dir"], config["vocab_source"], config["vocab_size"])
    others = paths.other_shards_hint() and f"{paths.other_shards_hint()} in --base"
    raise UserError(f"this sweep needs shards that do not exist; run: {' && '.join(hints)}{others}")
folder = None if dry_run else lock_folder()
results = Results(planned)
measure(planned, torch_device)
for run in planned:
    set_length(run)
results.check()
todo = []
for run in planned:
    # a run may have ended after its sweep was killed
    is_saved = run.name in results.lines and results.lines[run.name]["status"] != "failed"
    if not is_saved and not results.save_ended(run):
        todo.append(run)
print_estimate(planned, todo)
if dry_run:
    for hint in hints:
        print(f"note: some runs need shards that do not exist; run: {hint}")
    raise SystemExit

runner = Runner(results, folder, torch.cuda.device_count() if device_name == "cuda" else 0)
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, runner.request_stop)
if todo:
    runner.run_all(todo)
ended = sorted(results.in_order(), key=lambda line: list(FIELDS).index(line["status"]))
for line in ended:
    print_line(summary_of(line))
counts = Counter(line["status"] for line in ended)
if counts:
    print(", ".join(f"{n} {status}" for status, n in counts.items()))
n_failed = counts["failed"]
if runner.stopping:
    print("stopped; to continue, run the same command again")
elif n_failed:
    failed = "1 run" if n_failed == 1 else f"{n_failed} runs"
    raise UserError(f"{failed} failed; to retry, run the same command again")
else:
    print(f"wrote {results.path}; next: python plot.py {shlex.quote(results.path)}")
