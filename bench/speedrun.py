"""
Bits per byte against training time, of the plain recipe and of ours.

    python -m bench.speedrun --data_dir=data --minutes=10 --seeds=3

Three runs of train.py for each seed: the plain recipe, ours for the same time, and a sprint, ours
in a thirtieth of it. The tables and speedrun.json, speedrun.png in --out say how long ours needs to
the plain recipe's final value. Complete runs in --out are not repeated.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile

from bench.common import open_device
from configurator import UserError, check_range, configure
from report.curves import find_runs
from report.pictures import draw_runs
from report.tables import print_table
from system.files import write_json
from system.hardware import describe, git_commit
from training.runs import race, read_run, same_run, shards_hint
from training.settings import TRAIN, resolved

# -----------------------------------------------------------------------------
data_dir = "data"  # with the shards of both recipes' vocabularies
minutes = 10.0  # of training; the sprint has a thirtieth
seeds = 1  # runs of each recipe; medians are printed
out = "out/speedrun"  # folder of the runs and the results
plain = "config/plain_llama2c.py"  # the recipe to compare with
ours = "config/speedrun_cpu.py"  # our recipe
sprint = "config/sprint_cpu.py"  # our recipe for the plain one's value in a thirtieth of the time
plain_eval_interval = 50  # steps between evaluations in a run of ten minutes; others have as many
ours_eval_interval = 125  # likewise, of ours
eval_windows = 2000  # validation sequences at most, evenly spaced; the whole of a shorter text
device = "auto"
configure(globals())
# -----------------------------------------------------------------------------


def plan(torch_device):
    """
    Yield (recipe, minutes, out_dir, words of train.py, the settings that they stand for) for every
    run, one seed after the other.
    """
    scale = minutes / 10
    recipes = {
        "plain": (plain, minutes, max(1, round(plain_eval_interval * scale))),
        "ours": (ours, minutes, max(1, round(ours_eval_interval * scale))),
        "sprint": (sprint, minutes / 30, 1_000_000_000),  # evaluated at its end alone
    }
    for seed in range(1337, 1337 + seeds):
        for name, (recipe, length, interval) in recipes.items():
            words = [recipe, f"--data_dir={os.path.abspath(data_dir)}", f"--device={torch_device}"]
            words += [f"--max_minutes={length}", f"--eval_interval={interval}", f"--seed={seed}"]
            words.append("--picture=False")
            settings = resolved(tuple(words))
            n = math.ceil(eval_windows / settings["batch_size"])
            words.append(f"--eval_iters={n}")
            settings = settings | {"eval_iters": n}
            if hint := shards_hint(settings, data_dir):
                raise UserError(f"{data_dir} lacks the shards of {recipe}; make them with: {hint}")
            yield name, length, os.path.join(out, f"{name}-{seed}"), words, settings


def finished_run(name, length, where, words, settings):
    """The run of these words as runs.read_run returns it; trained first if it does not exist."""
    run = read_run(where)
    if run and same_run(run["start"]["config"], settings):
        print(f"{where} is complete", flush=True)
    else:
        print(f"training {name} for {length:.3g} minutes in {where}", flush=True)
        command = [sys.executable, TRAIN, *words, f"--out_dir={where}"]
        with tempfile.TemporaryDirectory() as cache:  # so that compilation is measured in full
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            failed = subprocess.run(command, env=environment).returncode
        run = read_run(where)
        if failed or not run:
            raise UserError(f"the run in {where} did not finish; the same command continues it")
    if run["evals"][-1]["val_bpb"] is None:
        raise UserError(f"{where}: without a tokenizer in {data_dir} bytes are unknown")
    return run


def print_times(result):
    labels = {
        "plain": "plain",
        "ours": "ours, the long run on its way",
        "sprint": "ours, a run that ends there",
    }
    rows = []
    for name, label in labels.items():
        rows.append([label])
        for clock in ("train_s", "all_s"):
            value = result[f"{name}_{clock}"]
            rows[-1].append(f"{value:,.0f} s" if math.isfinite(value) else "never")
            rows[-1].append(f"{result.get(f'{name}_{clock}_ratio', 1.0):.1f}x")
    print(
        f"final: plain {result['target']:.4f}, ours {result['ours_final']:.4f}, "
        f"ours in {minutes / 30:.2g} minutes {result['sprint_final']:.4f}\n\n"
        "training: without compilation and evaluations; all: from the start of the process, with "
        "compilation and one evaluation"
    )
    print_table(["to the plain recipe's final value", "training", "ratio", "all", "ratio"], rows)


def write_results(path, runs, result, races, torch_device):
    fields = ("step", "tokens", "time_s", "train_s", "val_loss", "val_bpb")

    def finite(values):
        return {k: v if math.isfinite(v) else None for k, v in values.items()}

    def facts(run):
        evals = [{k: line[k] for k in fields} for line in run["evals"]]
        return {"commit": run["start"]["commit"], "config": run["start"]["config"], "evals": evals}

    results = {
        "minutes": minutes,
        "hardware": describe(torch_device),
        "commit": git_commit(),
        "median": finite(result),
        "seeds": [finite(r) for r in races],
        "runs": {name: [facts(run) for run in of_name] for name, of_name in runs.items()},
    }
    write_json(path, results)
    print(f"wrote {path}")


if minutes <= 0:
    raise UserError(f"minutes = {minutes}: expected a number above 0")
check_range(1, seeds=seeds)
torch_device, _ = open_device(device)
runs = {"plain": [], "ours": [], "sprint": []}
planned = list(plan(torch_device))  # all of it first: a run may lack its shards
for name, *run in planned:
    runs[name].append(finished_run(name, *run))
races = [race(*of_seed) for of_seed in zip(*runs.values(), strict=True)]
result = {key: statistics.median(r[key] for r in races) for key in races[0]}
print_times(result)
write_results(os.path.join(out, "speedrun.json"), runs, result, races, torch_device)
picture = os.path.join(out, "speedrun.png")
try:
    draw_runs(find_runs([where for _, _, where, *_ in planned]), picture, ["time"], ["bpb"])
    print(f"wrote {picture}")
except UserError as e:
    print(f"no picture: {e}")
