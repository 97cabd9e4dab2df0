"""sweep.py: which runs it makes, what it keeps of them, and how it recovers from failures."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    REPO,
    TINY,
    read_log,
    refused,
    script,
    wait_until,
)

from model import Transformer
from training.settings import args_of, resolved

BASE = " ".join([*TINY, "--arch=llama --optimizer=adamw --base_learning_rate=1e-2 --bigram_rows=0"])


def sweep(data_dir, out_dir, *args, **options):
    flags = [f"--base={BASE}", f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--evals=2"]
    return script("sweep.py", *flags, *args, **options)


def results(out_dir):
    lines = (out_dir / "results.jsonl").read_text().splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


def test_a_grid_with_seeds_becomes_runs_with_results(practice, tmp_path):
    args = ("--grid=base_learning_rate=1e-3,1e-2", "--seeds=2", "--equal_tokens=5120", "--jobs=2")
    done = sweep(practice, tmp_path, *args, "--title=a title")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = results(tmp_path)
    assert sorted(lines) == [
        f"base_learning_rate={rate}_seed={seed}" for rate in (0.001, 0.01) for seed in (1337, 1338)
    ]
    for name, line in lines.items():
        log = read_log(tmp_path / name)
        last = [entry for entry in log if entry["kind"] == "eval"][-1]
        assert line["status"] == "finished" and line["title"] == "a title"
        assert (line["val_loss"], line["val_bpb"]) == (last["val_loss"], last["val_bpb"])
        assert line["best_val_loss"] == min(e["val_loss"] for e in log if e["kind"] == "eval")
        assert line["tokens"] == 5120 and line["steps"] == 10  # of 8 x 64 tokens
        assert line["config"]["base_learning_rate"] == line["varied"]["base_learning_rate"]
        assert line["seed"] == line["config"]["seed"] == line["varied"]["seed"]
        assert line["commit"] == log[0]["commit"] and line["train_s"] > 0
        assert [point["step"] for point in line["curve"]] == [5, 10]
        assert (
            not (tmp_path / name / "ckpt.pt").exists() and (tmp_path / name / "model.bin").exists()
        )
    # the same command has nothing to do, even without the logs of the runs
    before = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "base_learning_rate=0.01_seed=1337" / "log.jsonl").unlink()
    done = sweep(practice, tmp_path, *args, "--title=a title")
    assert done.returncode == 0 and "0 of 4 runs to do" in done.stdout
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_is_retried(practice, tmp_path):
    runs = "good: --batch_size=4; bad: --batch_size=200000 ; wild: --base_learning_rate=1e15"
    args = (f"--runs={runs}", "--seeds=1", "--evals=0")
    base = f"--base={BASE} --max_iters=12"
    # a step of the bad run needs more memory than the machine has; the estimate must not try it
    done = sweep(practice, tmp_path, *args, base)
    refused(done, "1 run failed")
    lines = {line["varied"]["run"]: line for line in results(tmp_path).values()}
    assert lines["good"]["status"] == "finished"
    assert lines["bad"]["status"] == "failed" and "sequences" in lines["bad"]["error"]
    assert lines["wild"]["status"] == "diverged" and lines["wild"]["val_loss"] is None
    done = sweep(practice, tmp_path, *args, base)
    refused(done, "1 run failed")
    assert "1 of 3 runs to do" in done.stdout


def logged_steps(out_dir):
    """Return {name: latest step in the log} for the runs of a sweep."""
    steps = {}
    for log in out_dir.glob("*/log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        steps[log.parent.name] = max((line.get("step", 0) for line in lines), default=0)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_loses_and_repeats_nothing(practice, tmp_path, signum):
    args = [
        *(f"--base={BASE} --max_iters=300 --save_interval=20", f"--data_dir={practice}"),
        *("--grid=base_learning_rate=1e-3,3e-3", "--seeds=1", "--evals=3", "--device=cpu"),
    ]
    out = tmp_path / "killed"
    command = [sys.executable, REPO / "sweep.py", *args, f"--out_dir={out}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    first, second = (f"base_learning_rate={rate}_seed=1337" for rate in (0.001, 0.003))
    wait_until(lambda: logged_steps(out).get(second, 0) >= 40)
    os.kill(process.pid, signum)
    process.wait(60)
    assert list(results(out)) == [first]
    kept = (out / "results.jsonl").read_text().splitlines()[0]
    log_of_first = (out / first / "log.jsonl").stat()
    done = script("sweep.py", *args, f"--out_dir={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 runs to do" in done.stdout
    # the finished run was not touched; the other one continued where it stopped
    assert (out / "results.jsonl").read_text().splitlines()[0] == kept
    assert (out / first / "log.jsonl").stat() == log_of_first
    starts = [line for line in read_log(out / second) if line["kind"] == "start"]
    assert len(starts) == 2
    steps = [line["step"] for line in read_log(out / second) if line["kind"] == "train"]
    assert len(steps) == len(set(steps)) and max(steps) == 300
    if signum != signal.SIGKILL:
        return
    # and reached the same loss as an undisturbed run, bit for bit
    whole = tmp_path / "whole"
    done = script("sweep.py", *args, "--grid=base_learning_rate=3e-3", f"--out_dir={whole}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(whole)[second]["val_loss"] == results(out)[second]["val_loss"]


@pytest.mark.slow
def test_results_of_another_sweep_are_neither_lost_nor_mixed_in(practice, tmp_path):
    args = ("--grid=base_learning_rate=1e-2", "--seeds=1")
    done = sweep(practice, tmp_path, *args, "--equal_tokens=2560")
    assert done.returncode == 0, done.stdout + done.stderr
    before = (tmp_path / "results.jsonl").read_bytes()
    done = sweep(practice, tmp_path, *args, "--equal_tokens=5120")
    refused(done, " = 3 instead of 5", "another --out_dir")
    done = sweep(practice, tmp_path, "--grid=batch_size=4", "--seeds=1", "--equal_tokens=2560")
    refused(done, "base_learning_rate=0.01_seed=1337", "is not in this sweep", "another --out_dir")
    assert (tmp_path / "results.jsonl").read_bytes() == before
    longer = "--grid=base_learning_rate=1e-2,1e-3"  # values can be added
    done = sweep(practice, tmp_path, longer, "--seeds=1", "--equal_tokens=2560")
    assert done.returncode == 0 and "1 of 2 runs to do" in done.stdout, done.stderr


@pytest.mark.slow
def test_equal_time_gives_the_slower_run_fewer_steps(practice, tmp_path):
    runs = "--runs=small: --dim=32 --compile=False; large: --dim=128 --n_layers=6 --compile=False"
    done = sweep(practice, tmp_path, runs, "--seeds=1", "--equal_minutes=1", "--dry_run")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in done.stdout.splitlines()
        if "seed=1337" in line
    }
    assert steps["small_seed=1337"] > 2 * steps["large_seed=1337"]
    assert not list(tmp_path.iterdir())  # a dry run writes nothing


def test_equal_arithmetic_gives_the_larger_model_fewer_steps(practice, tmp_path):
    runs = "--runs=small: --dim=32; large: --dim=64 --n_layers=4"
    args = ("--seeds=1", "--equal_flops=1e10", "--dry_run")
    done = sweep(practice, tmp_path, runs, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, flags in (("small", ("--dim=32",)), ("large", ("--dim=64", "--n_layers=4"))):
        config = resolved((*BASE.split(), *flags))
        with torch.device("meta"):
            flops = Transformer(args_of(config)).flops_per_token()
        n_tokens = config["batch_size"] * config["max_seq_len"]
        line = next(line for line in done.stdout.splitlines() if f"{name}_seed" in line)
        assert int(line.split()[1].replace(",", "")) == round(1e10 / (flops * n_tokens))


def test_an_estimate_needs_no_data_and_prints_the_cost(tmp_path):
    args = ("--grid=base_learning_rate=1e-2", "--seeds=2", "--price=3600", "--dry_run")
    done = sweep(tmp_path / "nowhere", tmp_path / "out", *args, f"--base={BASE} --max_minutes=1")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs to do" in done.stdout and "dollars" in done.stdout
    assert "tinystories.py train_vocab" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in (REPO / "experiments").glob("*.py")))
def test_experiments_are_sweeps_or_settings_that_sweeps_share(name, tmp_path):
    text = (REPO / "experiments" / f"{name}.py").read_text()
    if "base = " not in text:  # settings that sweeps use as their base
        done = script("train.py", f"experiments/{name}.py", "--estimate", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return
    args = (f"experiments/{name}.py", "--dry_run", "--rounds=1", "--equal_minutes=0")
    done = script("sweep.py", *args, "--seeds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs to do" in done.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["nothing to sweep"]),
        (["--grid=seed"], ["seed", "NAME=VALUE,VALUE"]),
        (["--grid=sed=1,2"], ["sed", "did you mean --seed"]),
        (["--grid=dim=a,b"], ["dim=a", "whole number"]),
        (["--runs=no colon"], ["no colon", "NAME: train.py arguments"]),
        (["--runs=a: --dim=32; a: --dim=64"], ["two runs", "a_seed=1337"]),
        (["--grid=dim=32,64", "--jobs=0"], ["jobs = 0", "at least 1"]),
        (
            ["--grid=dim=32", "--equal_tokens=5", "--equal_minutes=1"],
            ["equal_tokens cannot be used with"],
        ),
        (["--grid=dim=32", "--base=config/none.py"], ["config/none.py", "does not exist"]),
        (
            ["--grid=dim=32", "--data_dir=nowhere"],
            ["needs shards that do not exist", "tinystories.py"],
        ),
        (["--grid=n_heads=3"], ["n_heads = 3", "divide"]),
        (
            ["--grid=dim=32,64", "--base=--on_finish=true"],
            ["on_finish cannot be used with sweep.py"],
        ),
        (["--grid=minutes=1,2"], ["minutes cannot be used with sweep.py"]),
        (["--grid=dim=32'"], ["expected words quoted as in a shell"]),
        (["--grid=run=a,b"], ["run=a,b", "setting of train.py"]),
        (["--grid=out_dir=a,b"], ["out_dir=a,b", "setting of train.py"]),
        (["--grid=dim=32,,64"], ["dim=32,,64", "NAME=VALUE,VALUE"]),
        (
            ["--grid=batch_size=3,8", "--eval_windows=8"],
            ["eval_windows = 8: expected a multiple of batch_size = 3"],
        ),
        (["--base=--compile=auto", "--grid=dim=32", "--equal_minutes=1"], ["--compile=True or"]),
        (["--grid=max_minutes=1", "--equal_tokens=500"], ["max_minutes = 1 cannot be used with"]),
        (["--vocab_size=512"], ["--base='config/speedrun_cpu.py --vocab_size=...'", "--grid="]),
        (["--weather=512"], ["unknown setting --weather"]),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(args, parts, tmp_path):
    done = script("sweep.py", *args, f"--out_dir={tmp_path / 'out'}", cwd=tmp_path)
    refused(done, *parts)
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.parametrize(
    "args, folder",
    [
        (["experiments/lr.py"], "lr"),
        (["--base=config/story.py", "--grid=hidden_lr=0.1,0.2 dim=64"], "story-hidden_lr-dim"),
        (["--base=--batch_size=2", "--runs=small one: --dim=64; big: --dim=96"], "small_one-big"),
    ],
)
def test_each_sweep_has_its_own_folder(args, folder):
    """Without a sweep file, the folder is named after what the sweep varies."""
    done = script("sweep.py", *args, "--dry_run", "--seeds=1", "--eval_windows=0", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert f"runs to do in {os.path.join('out', 'sweeps', folder)}, about" in done.stdout


def test_two_sweeps_in_one_folder_are_refused(practice, tmp_path):
    import fcntl

    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    done = sweep(practice, tmp_path, "--grid=dim=32,64", "--patience=1")
    refused(done, "another sweep is using")
    os.close(folder)
