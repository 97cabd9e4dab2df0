"""
Many runs of train.py: a grid or a list of settings, each with several seeds.

    python sweep.py experiments/lr.py --data_dir=data         # an experiment of this repository
    python sweep.py experiments/lr.py --dry_run               # only its runs, hours and cost
    python sweep.py --base=config/story.py --grid="hidden_lr=0.01,0.02,0.04 batch_size=4,8"
    python sweep.py --runs="small: --dim=64; large: --dim=256 --n_layers=6" --jobs=2

A sweep is a file of the settings below. sweep.py first measures the speed of the runs and prints
how long they will take. Each run is a train.py of its own with a folder in out_dir; its output goes
to NAME.log beside the folder, its result to a line of results.jsonl, which plot.py draws:

    python plot.py out/sweeps/lr/results.jsonl

Ctrl-C stops the runs with a checkpoint. The same command then continues: it skips finished runs,
resumes interrupted ones and repeats failed ones. A run that diverged has a result and is not
repeated. You may add values and seeds to a sweep; to change what it has, give another out_dir.
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
# what to run
title = ""  # a line for pictures
base = "config/speedrun_cpu.py"  # arguments of train.py that all runs share
grid = ""  # NAME=VALUE,VALUE ... of train.py's settings: all combinations
runs = ""  # NAME: arguments of train.py; ... or one a line; with a grid, each with all of it
seeds = 3  # runs of each
first_seed = 1337
equal_tokens = 0  # each run gets the steps that make this many tokens; 0: max_iters, as in base
equal_bytes = 0  # ... that read this many bytes of text, for runs with different vocabularies
equal_minutes = 0.0  # ... that it makes in this many minutes at its speed, which is measured first
evals = 10  # evaluations of a run, about evenly spaced; 0: eval_interval, as in base
eval_windows = 0  # validation sequences, evenly spaced; 0: eval_iters batches, as in base
# how
data_dir = ""  # with the shards; empty: as in base
out_dir = ""  # empty: out/sweeps/NAME, after the sweep's file
jobs = 1  # runs at once: each with its share of the cores, or with one of the GPUs
device = "auto"
rounds = 3  # in which speeds are measured for equal_minutes
patience = 30.0  # seconds to wait for the runs of a killed sweep, which save their last step
keep_checkpoints = False  # of finished runs; their model.bin always stays
# before anything is spent
price = 0.0  # dollars an hour for the machine, for the estimate
dry_run = False  # print the list and the estimate, and stop
try:
    configure(globals())
except UserError as e:
    from training.settings import GROUPS, names_of

    name = str(e).partition("unknown setting --")[2].partition(":")[0]
    if name not in names_of(*GROUPS):
        raise
    raise UserError(
        f"--{name} is a setting of train.py, for all runs: --base='{base} --{name}=...'; to vary "
        f"it: --grid='{name}=...'"
    ) from None
# -----------------------------------------------------------------------------

tune_process()  # as train.py does, whose speed is measured here

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
    tokens_of_step,
    tokens_per_second,
    work_of,
)
from training.settings import SAME_RESULT, TRAIN, args_of, check, resolved

START_UP_S = 8  # of a run: loading torch and the data, writing its files; a guess
# an estimate alone tries no step of more operations, and none after so many seconds
SLOW_STEP, ESTIMATE_S = 3e11, 20
CPU_SPEED = 1e11  # operations a second, assumed instead
BYTES_PER_TOKEN = 4  # assumed for the estimate while there are no shards


@dataclass(eq=False)
class PlannedRun:
    name: str
    varied: dict  # what tells it from the other runs
    row: list  # its own arguments, without those of all runs and of the grid
    arguments: list  # all arguments of train.py except out_dir
    config: dict  # all settings of train.py
    speed: float = 0.0  # tokens/s; 0: unknown
    seconds: float = START_UP_S  # estimate

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
        """The log in its folder; an empty one if that is of another run."""
        log = RunLog(self.folder).read()
        is_ours = log.start and same_run(log.start["config"], self.config)
        return log if is_ours else RunLog(self.folder)


# ---- the plan


def check_settings():
    lengths = {name: globals()[name] for name in ("equal_tokens", "equal_bytes", "equal_minutes")}
    check_range(1, seeds=seeds, jobs=jobs, rounds=rounds)
    check_range(0, **lengths, first_seed=first_seed, evals=evals, eval_windows=eval_windows)
    check_range(0, patience=patience, price=price)
    given = [name for name, value in lengths.items() if value]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} exclude each other: give one of them")
    if not grid.strip() and not runs.strip():
        raise UserError(
            "nothing to sweep: name a file such as experiments/lr.py, or give "
            '--grid="hidden_lr=0.01,0.02" or --runs="NAME: arguments of train.py; ..."'
        )


def axes_of_grid():
    """The grid as {setting: [values as text]}."""
    axes = {}
    for part in split_words(grid, "grid"):
        name, equals, values = part.lstrip("-").partition("=")
        values = values.split(",")
        if not equals or not all(values):
            raise UserError(f"grid: {part!r}: expected NAME=VALUE,VALUE")
        if name == "run" or name in SAME_RESULT or name in axes:
            raise UserError(
                f"grid: {part!r}: expected a setting of train.py that changes the run, once"
            )
        axes[name] = values
    return axes


def listed_runs():
    """The list of runs as [(name, [arguments])]; one without a name if there is no list."""
    rows = []
    for line in filter(str.strip, re.split(r"[;\n]", runs)):
        name, colon, arguments = line.partition(":")
        if not colon or not name.strip():
            raise UserError(f"runs: {line.strip()!r}: expected NAME: arguments of train.py")
        rows.append((name.strip(), split_words(arguments, "runs")))
    return rows or [("", [])]


def check_run(config, varied):
    """Raise UserError if a run's settings do not fit together, or not with those of the sweep."""
    about = ", ".join(f"{k} = {v}" for k, v in varied.items())
    try:
        check(config)
        args_of(config)
        if config["on_finish"]:
            raise UserError("on_finish is not for the runs of a sweep: leave it out")
    except UserError as e:
        raise UserError(f"{about}: {e}") from None
    if (equal_tokens or equal_bytes or equal_minutes) and config["max_minutes"]:
        raise UserError(
            f"{about}: max_minutes = {config['max_minutes']:g} would end the run, and so do "
            f"equal_tokens, equal_bytes and equal_minutes: leave it out"
        )
    if equal_minutes and config["compile"] == "auto":
        raise UserError(
            "equal_minutes measures speeds first and cannot know what --compile=auto will do: put "
            "--compile=True or False into base"
        )
    if eval_windows % config["batch_size"]:
        raise UserError(
            f"eval_windows = {eval_windows} is not a multiple of batch_size = "
            f"{config['batch_size']}: the runs would be evaluated on different text"
        )


def plan(device_name):
    """[PlannedRun] in the order in which they are done, seeds outermost, without their length."""
    planned, axes = {}, axes_of_grid()
    shared = split_words(base, "base")
    if data_dir:
        shared.append(f"--data_dir={os.path.abspath(data_dir)}")
    shared += [f"--device={device_name}", "--keep_last=1", "--picture=False"]
    seed_values = [None] if "seed" in axes else range(first_seed, first_seed + seeds)
    for seed, (row, own), values in product(seed_values, listed_runs(), product(*axes.values())):
        of_grid = [f"--{name}={value}" for name, value in zip(axes, values, strict=True)]
        arguments = [*shared, *own, *of_grid]
        config = dict(resolved(tuple(arguments)))
        varied = ({"run": row} if row else {}) | {name: config[name] for name in axes}
        run = PlannedRun("", varied, own, arguments, config)
        if seed is not None:
            varied["seed"] = seed
            run.set(seed=seed)
        check_run(config, varied)
        parts = (value if name == "run" else f"{name}={value}" for name, value in varied.items())
        run.name = re.sub(r"[^\w.=+-]+", "_", "_".join(parts))
        if run.name in planned:
            raise UserError(f"two runs of this sweep are {run.name}: leave one of them out")
        planned[run.name] = run
    return list(planned.values())


# ---- lengths


def measure(planned, torch_device):
    """
    Set the speeds of the runs, in tokens/s, as far as a step of theirs can be measured. Each is the
    median of several rounds over all of them, since a machine's speed wanders. Speeds are kept in
    speeds.json: lengths depend on them, and a sweep that continues must plan the same runs again.
    """
    path = os.path.join(sweep_dir, "speeds.json")
    known = read_json(path) if os.path.exists(path) else {}
    # an estimate does not wait for compilation
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
            speeds[key].append(tokens_of_step(config) * CPU_SPEED / n_flops)
            guessed = True
            continue
        try:
            budget_s = 2.0 if equal_minutes else 0.5
            speeds[key].append(tokens_per_second(config, torch_device, budget_s))
        except (RuntimeError, ValueError) as e:  # a GPU's memory; train.py adapts, or says why not
            print_line(f"a step cannot be measured: {str(e).splitlines()[0]}")
    if guessed:
        print("some runs are too slow to try here: assuming 100 billion operations a second")
    known |= {key: round(statistics.median(s), 1) for key, s in speeds.items() if s}
    if todo and not dry_run:
        write_json(path, known)
    if equal_minutes and set(keys.values()) - known.keys():
        raise UserError("equal_minutes needs the speeds of all runs, and some cannot be measured")
    for run, key in keys.items():
        run.speed = known.get(key, 0.0)


def shards_of(config):
    """The sidecar's list of shards, the one for validation first; [] if it is absent."""
    paths = DataPaths(config["data_dir"], config["vocab_source"], config["vocab_size"])
    return (read_sidecar(paths.shards) or {"shards": []})["shards"]


def tokens_in(n_bytes, config):
    """The training tokens that a run's vocabulary makes of n_bytes of text."""
    shards = shards_of(config)[1:]
    if not shards:
        if not dry_run:
            raise UserError("equal_bytes needs shards.json beside the shards: make them again")
        return n_bytes / BYTES_PER_TOKEN
    return n_bytes * sum(s["tokens"] for s in shards) / sum(s["bytes"] for s in shards)


def give_length(run):
    """Set a run's length and its evaluations, and estimate its seconds."""
    config, size = run.config, tokens_of_step(run.config)
    n_tokens = equal_tokens or equal_minutes * 60 * run.speed
    if equal_bytes:
        n_tokens = tokens_in(equal_bytes, config)
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
    run.seconds += train_s + n_evals * n_valid / (3 * run.speed)  # forward is a third of a step


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_estimate(planned, todo):
    rows = []
    for run in planned:
        n, minutes = run.config["max_iters"], run.config["max_minutes"]
        steps = f"{minutes:g} min" if minutes else f"{n:,}"
        tokens = "" if minutes else f"{n * tokens_of_step(run.config):,}"
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
    """results.jsonl of a sweep: a line for each run that has ended, in the sweep's order."""

    def __init__(self, planned):
        self.path = os.path.join(sweep_dir, "results.jsonl")
        self.planned, self.lines = planned, {}
        if os.path.exists(self.path):
            lines, bad = read_results(self.path)
            if bad:
                raise UserError(
                    f"{self.path}, line {bad[0]} is not the result of a run: delete the line"
                )
            self.lines = {line["name"]: line for line in lines}

    def in_order(self):
        return [self.lines[run.name] for run in self.planned if run.name in self.lines]

    def check(self):
        """Raise UserError for results of runs that are not those of this sweep."""
        configs = {run.name: run.config for run in self.planned}
        for name, line in self.lines.items():
            old, new = line["config"], configs.get(name)
            if not new:
                why = "which this sweep does not have"
            elif differences := changed_settings(new, old):
                changed = differences[0]
                why = f"with {changed} = {old.get(changed)} and not {new[changed]}"
            else:
                continue
            raise UserError(
                f"{self.path} has a run {name}, {why}: give another --out_dir, or delete the folder"
            )

    def keep(self, line):
        """Write a line to results.jsonl, in place of an earlier one of its run."""
        self.lines[line["name"]] = line
        with atomic_write(self.path, "w") as f:
            f.writelines(json.dumps(line) + "\n" for line in self.in_order())

    def keep_ended(self, run):
        """Keep the result of a run that has finished or diverged; returns whether it has."""
        line = result_of(run)
        if not line or dry_run:
            return bool(line)
        self.keep(line)
        if not keep_checkpoints:
            for pattern in WORTH_KEEPING:
                for path in glob.glob(os.path.join(glob.escape(run.folder), pattern)):
                    remove(path)
        return True

    def keep_failed(self, run, exit_status):
        """Keep the last line that a run printed as its error."""
        with open(run.output, encoding="utf-8", errors="replace") as f:
            output = f.read().strip() or f"it ended without a message, with status {exit_status}"
        error = output.splitlines()[-1].removeprefix("error: ")
        self.keep({**about(run), "status": "failed", "error": error})


def about(run):
    """What the lines of all runs have in results.jsonl."""
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
    """The line of a run that has finished or diverged; otherwise None."""
    log = run.logged()
    is_done = log.end.get("reason") == "finished"
    if not (is_done and log.evals) and log.end.get("reason") != "diverged":
        return None
    final = log.evals[-1] if is_done else {}
    # the loss of a model that knows nothing; one that is worse has not learned
    uniform = math.log(log.start["model_args"]["vocab_size"])
    return {
        **about(run),
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


def sentence_of(line):
    """What to print about a result."""
    if line["status"] == "failed":
        return f"{line['name']}: failed: {line['error']} (see {sweep_dir}/{line['name']}.log)"
    if line["status"] == "diverged":
        return f"{line['name']}: diverged at step {line['steps']}"
    bpb = f", {line['val_bpb']:.4f} bits per byte" if line["val_bpb"] else ""
    return f"{line['name']}: {line['val_loss']:.4f}{bpb}, {duration(line['train_s'])} of training"


# ---- running


class Runner:
    """Runs of train.py in processes of their own, `jobs` at once."""

    def __init__(self, results, folder, n_gpus):
        self.results, self.folder, self.n_gpus = results, folder, n_gpus
        self.running, self.stopping = {}, False  # {process: (run, slot)}
        self.libc = None if os.name == "nt" else ctypes.CDLL(None)

    def request_stop(self, signum, frame):
        """The first Ctrl-C stops the runs after their step, with a checkpoint; a second kills."""
        is_first, self.stopping = not self.stopping, True
        for process in list(self.running):
            process.terminate() if is_first else process.kill()
        if is_first:
            with contextlib.suppress(RuntimeError):  # while another line is printed
                print_line("stopping the runs, each with a checkpoint; Ctrl-C again kills them")

    def before_exec(self):
        """In the process of a run: stop with a checkpoint if the sweep is killed (Linux)."""
        with contextlib.suppress(AttributeError):
            self.libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def begin(self, run, slot):
        """Start or resume a run in a slot, from 0 to jobs - 1; returns the process."""
        environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
        if self.n_gpus > 1:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpus = gpus if len(gpus) == self.n_gpus else list(map(str, range(self.n_gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % self.n_gpus]
        command = [sys.executable, TRAIN, *run.arguments, f"--out_dir={run.folder}"]
        if run.logged().start:
            command.append("--resume=auto")
        options = {}
        if os.name != "nt":  # Ctrl-C goes to the sweep, which stops its runs
            options = {
                "start_new_session": True,
                "preexec_fn": self.before_exec,
                "pass_fds": [self.folder.lock_file],
            }
        with open(run.output, "a", encoding="utf-8") as f:
            return subprocess.Popen(command, stdout=f, stderr=f, env=environment, **options)

    def finish(self, run, exit_status):
        """Keep what became of a run whose process has ended; returns a sentence about it."""
        if not self.results.keep_ended(run):
            if self.stopping:
                return f"{run.name}: stopped"
            self.results.keep_failed(run, exit_status)
        return sentence_of(self.results.lines[run.name])

    def run_all(self, todo):
        """Do some runs, and print what came of each."""
        waiting, slots = list(todo), list(range(jobs))
        total_s = round(sum(run.seconds for run in todo))
        bar = progress(total=total_s, unit="s", desc="of the estimate", dynamic_ncols=True)
        while (waiting and not self.stopping) or self.running:
            while waiting and slots and not self.stopping:
                run, slot = waiting.pop(0), slots.pop(0)
                process = self.begin(run, slot)
                self.running[process] = run, slot
                if self.stopping:  # the signal came while the run began
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
    """The folder of the sweep, locked for it and its runs. UserError if another sweep has it."""
    for attempt in range(1 + int(10 * patience)):
        try:
            return RunDir(sweep_dir)
        except FolderInUse:
            if attempt == 5:
                print(f"waiting: a sweep, or runs of a killed one, are still in {sweep_dir}")
        time.sleep(0.1)
    raise UserError(f"another sweep is at work in {sweep_dir}: wait for it, or give an --out_dir")


def name_of_sweep():
    """The name of its file; of a sweep without one, what it varies and of which base."""
    files = [word for word in sys.argv[1:] if word.endswith(".py") and not word.startswith("-")]
    if files:
        return os.path.splitext(os.path.basename(files[-1]))[0]
    bases = [os.path.splitext(os.path.basename(w))[0] for w in base.split() if w.endswith(".py")]
    names = [*bases, *axes_of_grid(), *(name for name, _ in listed_runs() if name)]
    return re.sub(r"[^\w.=+-]+", "_", "-".join(names))[:100]


# ---- the sweep

check_settings()
torch_device = pick_device(device)
device_name = torch_device.type if device == "auto" else device
threads = max(1, torch.get_num_threads() // jobs)  # of each run, at most
torch.set_num_threads(threads)
Threads(torch_device)
sweep_dir = out_dir or os.path.join("out", "sweeps", name_of_sweep())

planned = plan(device_name)
hints = [shards_hint(run.config, run.config["data_dir"]) for run in planned]
hints = list(dict.fromkeys(filter(None, hints)))
if hints and not dry_run:
    config = planned[0].config
    paths = DataPaths(config["data_dir"], config["vocab_source"], config["vocab_size"])
    others = paths.others() and f"{paths.others()}, in --base"
    raise UserError(
        f"there are no shards for this sweep; make them with: {' && '.join(hints)}{others}"
    )
folder = None if dry_run else lock_folder()
results = Results(planned)
measure(planned, torch_device)
for run in planned:
    give_length(run)
results.check()
todo = []
for run in planned:
    # a run may have ended after its sweep was killed
    is_kept = run.name in results.lines and results.lines[run.name]["status"] != "failed"
    if not is_kept and not results.keep_ended(run):
        todo.append(run)
print_estimate(planned, todo)
if dry_run:
    for hint in hints:
        print(f"there are no shards for some of it; make them with: {hint}")
    raise SystemExit

runner = Runner(results, folder, torch.cuda.device_count() if device_name == "cuda" else 0)
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, runner.request_stop)
if todo:
    runner.run_all(todo)
ended = sorted(results.in_order(), key=lambda line: list(FIELDS).index(line["status"]))
for line in ended:
    print_line(sentence_of(line))
counts = Counter(line["status"] for line in ended)
if counts:
    print(", ".join(f"{n} {status}" for status, n in counts.items()))
n_failed = counts["failed"]
if runner.stopping:
    print("stopped; the same command continues")
elif n_failed:
    raise UserError(f"{n_failed} runs failed; the same command tries them again")
else:
    print(f"wrote {results.path}; next: python plot.py {shlex.quote(results.path)}")
