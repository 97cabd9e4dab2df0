"""Killed runs resume exactly, full disks cost no checkpoint, and damage is always detected."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import (
    PATIENCE_S,
    REPO,
    TINY,
    read_log,
    refused,
    script,
    train,
)

from configurator import UserError
from training import checkpoint
from training.checkpoint import CheckpointWriter, load_checkpoint, load_latest
from training.parallel import StopRequest
from training.rundir import RunDir

STEPS = 120
ARGS = [f"--max_iters={STEPS}", "--save_interval=1", "--log_interval=1", "--keep_last=3"]


def same(a, b):
    """Return whether two nested values are equal, tensors to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def losses_of(out):
    """Return (kind, step, loss) of every logged step and evaluation of a run."""
    log = [e for e in read_log(out) if e["kind"] in ("train", "eval")]
    return [(e["kind"], e["step"], e.get("loss", e.get("val_loss"))) for e in log]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, practice):
    """A run that is not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = train(practice, out, *ARGS)
    assert done.returncode == 0, done.stderr
    return out


def run_until(practice, out, killed):
    """Start or resume a run, SIGKILL it once killed() is true, and return whether it was killed."""
    command = [sys.executable, REPO / "train.py", *TINY, *ARGS, "--resume=auto"]
    process = subprocess.Popen(
        [*map(str, command), f"--data_dir={practice}", f"--out_dir={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None:
        if killed():
            process.kill()
            break
        time.sleep(0.0005)
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (0, -signal.SIGKILL), text
    return process.returncode != 0


def last_step(out):
    try:
        return max((entry.get("step", 0) for entry in read_log(out)), default=0)
    except (OSError, ValueError):
        return 0


def is_saving(out):
    return out.is_dir() and any(n.startswith("ckpt.pt.") for n in os.listdir(out))


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(whole, practice, tmp_path, n):
    """
    SIGKILL at any time after the process starts, at any time during training, and while a
    checkpoint is being written; the run is resumed each time. Weights, optimizer, losses and
    model.bin equal those of an uninterrupted run.
    """
    out, rng, kinds = tmp_path / "out", random.Random(1), []
    for i in range(n):
        start, first, after, steps = time.monotonic(), last_step(out), rng.uniform(0, 3), i % 4
        moments = {
            "any time": lambda start=start, after=after: time.monotonic() - start > after,
            "in training": lambda first=first: last_step(out) > first and rng.random() < 0.05,
            "in a save": lambda first=first, steps=steps: (
                last_step(out) > first + steps and is_saving(out)
            ),
        }
        kind = list(moments)[i % 3]
        if run_until(practice, out, moments[kind]):
            kinds.append(kind)
    n_steps = last_step(out)
    assert not run_until(practice, out, lambda: False)
    assert len(kinds) == n and n_steps < STEPS, (kinds, n_steps)
    expected, actual = (load_checkpoint(o / "ckpt.pt") for o in (whole, out))
    for name in ("model", "optimizer", "iter_num", "n_sequences", "best_val_loss"):
        assert same(expected[name], actual[name]), name
    assert losses_of(whole) == losses_of(out)
    assert (whole / "model.bin").read_bytes() == (out / "model.bin").read_bytes()
    assert set(os.listdir(out)) == set(os.listdir(whole))  # no incomplete file is left


# ---- starting, resuming, fine-tuning


def test_resume_auto_starts_continues_and_ends(whole, practice, tmp_path):
    out = tmp_path / "out"
    first = train(practice, out, "--resume=auto", "--max_iters=20")
    assert first.returncode == 0 and "0 of 20 steps done" in first.stdout
    second = train(practice, out, "--resume=auto", "--max_iters=20")
    assert second.returncode == 0, second.stderr
    assert f"the run in {out} is complete (20 steps)" in second.stdout
    third = train(practice, out, "--resume=auto", "--max_iters=25")
    assert third.returncode == 0 and "20 of 25 steps done" in third.stdout
    assert not (out / "previous").exists()
    refused(
        train(practice, out, "--resume=auto", "--dim=64"),
        "cannot resume with dim = 64: the run has 32",
    )


def test_checkpoints_of_earlier_versions_are_read(whole, tmp_path):
    """They contain the states of three random number generators."""
    value = torch.load(whole / "ckpt.pt", weights_only=True)
    python, numpy = random.Random(0).getstate(), ("MT19937", [1, 1 << 31], 624, 0, 0.0)
    value["rng"] = {"python": python, "numpy": numpy, "torch": torch.get_rng_state()}
    torch.save(value, tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    assert same(loaded["model"], value["model"]) and loaded["iter_num"] == value["iter_num"]


@pytest.mark.slow
def test_weights_alone_start_a_new_run(whole, practice, tmp_path):
    """The architecture comes with the weights; optimizer, steps and data start from scratch."""
    out, tuned = tmp_path / "out", whole / "ckpt.pt"
    flags = [f"--init_from={tuned}", f"--data_dir={practice}", f"--out_dir={out}", "--device=cpu"]
    done = script("train.py", *flags, "--dtype=float32", "--max_iters=10", "--eval_iters=4")
    assert done.returncode == 0, done.stderr
    log = read_log(out)
    assert log[0]["model_args"] == read_log(whole)[0]["model_args"]
    assert log[0]["config"]["eval_interval"] == 200  # only the model's settings are adopted
    assert log[1]["step"] == 1 and log[1]["loss"] < 4 < 5.5 < read_log(whole)[1]["loss"]
    done = script("train.py", *flags, "--max_seq_len=32", "--max_iters=2")
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(out / "ckpt.pt")["model_args"]["max_seq_len"] == 32
    refused(script("train.py", *flags, "--dim=64"), f"from {tuned} with dim = 64: its model has 32")
    refused(script("train.py", *flags, "--n_layers=1"), "with n_layers = 1: its model has 2")
    old = {"model": load_checkpoint(tuned)["model"], "iter_num": 5}
    args = load_checkpoint(tuned)["model_args"]
    for name in ("tie_embeddings", "norm_eps", "rope_theta", "hidden_dim"):  # not in llama2.c's
        del args[name]
    torch.save({**old, "model_args": args}, tmp_path / "llama2c.pt")
    flags[0] = f"--init_from={tmp_path / 'llama2c.pt'}"
    done = script("train.py", *flags, "--max_iters=2")
    assert done.returncode == 0, done.stderr
    evaluated = script("train.py", *flags, "--eval_only")
    assert evaluated.returncode == 0 and "validation loss" in evaluated.stdout
    shutil.copy(tmp_path / "llama2c.pt", out / "ckpt.pt")
    done = script("train.py", f"--data_dir={practice}", f"--out_dir={out}", "--init_from=resume")
    refused(done, "has weights but no run to resume", "--init_from=")


def test_an_interrupted_evaluation_is_repeated(whole, practice, tmp_path):
    """SIGTERM stops a long evaluation immediately, and the resumed run starts with it."""
    out = tmp_path / "out"
    command = [sys.executable, REPO / "train.py", *TINY, *ARGS, f"--data_dir={practice}"]
    command += [f"--out_dir={out}", "--eval_interval=3", "--eval_iters=100000", "--batch_size=1"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        while last_step(out) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        text = process.stdout.read()
    assert process.returncode == 0 and "stopped at step 3" in text
    stopped = load_checkpoint(out / "ckpt.pt")
    assert (stopped["iter_num"], stopped["evaluated"]) == (3, 0)
    done = script(
        "train.py", "--init_from=resume", f"--out_dir={out}", "--max_iters=4", "--eval_iters=3"
    )
    assert done.returncode == 0, done.stderr
    assert [e["step"] for e in read_log(out) if e["kind"] == "eval"] == [3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["file", "terminal"])
def test_a_closed_terminal_leaves_a_checkpoint(practice, tmp_path, to):
    out = tmp_path / "out"
    command = [sys.executable, REPO / "train.py", *TINY, f"--data_dir={practice}"]
    command += [f"--out_dir={out}", "--max_iters=100000", "--log_interval=1"]
    ours, theirs = os.openpty()
    with open(tmp_path / "text", "w+") as file:
        stream = theirs if to == "terminal" else file
        with subprocess.Popen([*map(str, command)], stdout=stream, stderr=stream) as process:
            while last_step(out) < 2:
                assert process.poll() is None
                time.sleep(0.01)
            os.close(ours)  # writing to the terminal now fails
            os.close(theirs)
            process.send_signal(signal.SIGHUP)
            assert process.wait(60) == 0
    assert read_log(out)[-1]["reason"] == "interrupted"
    assert load_checkpoint(out / "ckpt.pt")["iter_num"] == last_step(out)


def test_signals_that_the_process_ignores_stay_ignored():
    """Such as SIGHUP under nohup, and SIGINT in a script's background job."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for signum in before:  # they may already be ignored here
        signal.signal(signum, signal.SIG_IGN if signum == signal.SIGINT else signal.SIG_DFL)
    try:
        stop = StopRequest()
        stop.listen()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGTERM) == stop.handle
        stop.restore()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_run_continues_in_a_new_folder_if_its_folder_vanishes(practice, tmp_path, how):
    out, moved = tmp_path / "out", tmp_path / "moved"
    command = [sys.executable, REPO / "train.py", *TINY, f"--data_dir={practice}"]
    command += [f"--out_dir={out}", "--max_iters=300", "--log_interval=1", "--eval_interval=300"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*map(str, command)], **options) as process:
        while last_step(out) < 2:
            assert process.poll() is None
            time.sleep(0.001)
        os.rename(out, moved)
        if how == "deleted":
            shutil.rmtree(moved)
        text = process.stdout.read()
    assert process.returncode == 0, text
    assert text.count(f"{out} was moved or deleted; the run continues in a new {out}") == 1
    log = read_log(out)
    assert log[0]["kind"] == "start" and log[-1]["reason"] == "finished"
    assert [e["step"] for e in log if e["kind"] == "train"] == list(range(1, 301))
    assert load_checkpoint(out / "best.pt")["iter_num"] == 300
    assert {"model.bin", "tokenizer.bin", "tokenizer.model"} < set(os.listdir(out))


def test_a_vanished_folder_that_another_run_now_uses_is_left_to_it(tmp_path):
    ours = RunDir(str(tmp_path / "out"))
    ours.open_log(0, 0)
    ours.log("start")
    assert not ours.is_lost()
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert ours.is_lost()
    theirs = RunDir(str(tmp_path / "out"))
    with pytest.raises(UserError, match="was moved or deleted, and another run is writing there"):
        ours.recreate()
    os.close(theirs.lock_file)
    ours.recreate()
    assert not ours.is_lost() and read_log(tmp_path / "out") == [{"kind": "start"}]


def test_two_runs_do_not_share_a_folder(practice, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, REPO / "train.py", *TINY, f"--data_dir={practice}"]
    command += [f"--out_dir={out}", "--max_iters=50000"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        while last_step(out) < 1:
            time.sleep(0.01)
        for args in ([], ["--resume=auto"]):
            done = train(practice, out, "--max_iters=50000", *args)
            refused(done, f"another run is writing to {out}")
        process.kill()
    assert train(practice, out, "--max_iters=3").returncode == 0


def test_setting_an_earlier_run_aside_survives_an_interruption(tmp_path):
    def fill(folder, text):
        folder.mkdir(exist_ok=True)
        for name in ("ckpt.pt", "log.jsonl", "model.bin"):
            (folder / name).write_text(text)

    fill(tmp_path, "old")
    (tmp_path / "moving").mkdir()
    os.replace(tmp_path / "ckpt.pt", tmp_path / "moving" / "ckpt.pt")  # killed here
    fill(tmp_path / "previous", "older")
    run = RunDir(tmp_path)
    run.set_aside_earlier_run()
    assert sorted(os.listdir(tmp_path)) == ["previous", "previous_2"]
    moved = {path.name: path.read_text() for path in (tmp_path / "previous_2").iterdir()}
    assert moved == dict.fromkeys(("ckpt.pt", "log.jsonl", "model.bin"), "old")
    for name in ("log.jsonl", "model.bin"):  # from a run that was killed in its first save
        (tmp_path / name).write_text("young")
    run.set_aside_earlier_run()
    assert sorted(os.listdir(tmp_path)) == ["previous", "previous_2", "previous_3"]
    (tmp_path / "log.jsonl").write_text("without a model")
    run.set_aside_earlier_run()
    assert sorted(os.listdir(tmp_path))[-2:] == ["previous_2", "previous_3"]
    assert (tmp_path / "previous" / "ckpt.pt").read_text() == "older"


def test_the_log_continues_from_the_step_of_the_checkpoint(tmp_path):
    lines = [{"kind": "start"}, *({"kind": "train", "step": i} for i in range(1, 9))]
    lines.insert(6, {"kind": "eval", "step": 5})  # no checkpoint was written after it
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    (tmp_path / "log.jsonl").write_text(text)
    run = RunDir(tmp_path)
    run.open_log(5, 4)
    run.log("train", step=6, loss=float("nan"), lr=1 / 3)
    assert read_log(tmp_path) == [
        *lines[:6],
        {"kind": "train", "step": 6, "loss": None, "lr": 0.33333333},
    ]


# ---- the writer


def small_checkpoint(step):
    return {"iter_num": step, "model": {"w": torch.full((100, 10), float(step))}, "model_args": {}}


def steps_in(folder):
    return {path.name: load_checkpoint(path)["iter_num"] for path in folder.iterdir()}


def test_the_latest_checkpoints_and_the_best_are_kept(tmp_path):
    writer = CheckpointWriter(str(tmp_path), keep_last=3)
    for step in range(10, 60, 10):
        writer.save(small_checkpoint(step), is_best=step == 20)
    writer.wait()
    names = {"ckpt.pt": 50, "ckpt_000040.pt": 40, "ckpt_000030.pt": 30, "best.pt": 20}
    assert steps_in(tmp_path) == names
    writer = CheckpointWriter(str(tmp_path), keep_last=1, latest_step=50)
    writer.save(small_checkpoint(60))
    writer.wait()
    assert steps_in(tmp_path) == {"ckpt.pt": 60, "best.pt": 20}


def test_the_same_checkpoints_are_kept_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    test_the_latest_checkpoints_and_the_best_are_kept(tmp_path)


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """save() returns before the file exists; the file has the values from the time of the call."""
    go, save = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: go.wait(20) and save(*args))
    state = small_checkpoint(1)
    state["shared"] = state["model"]["w"]
    writer = CheckpointWriter(str(tmp_path), keep_last=2)
    writer.save(state)
    assert not (tmp_path / "ckpt.pt").exists()
    state["model"]["w"].fill_(7)
    go.set()
    writer.wait()
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    assert (loaded["model"]["w"] == 1).all()
    assert loaded["shared"].data_ptr() == loaded["model"]["w"].data_ptr()  # written once
    writer.save(state)
    writer.wait()
    assert (load_checkpoint(tmp_path / "ckpt.pt")["model"]["w"] == 7).all()


# ---- damage


def damaged_copies(whole):
    """Yield (damage, bytes): a checkpoint that is cut short or has one bit flipped."""
    rng = random.Random(0)
    for n in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        yield f"{n} bytes", whole[:n]
    for _ in range(300):
        at = rng.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        yield f"a bit flipped at {at}", bytes(flipped)


@pytest.mark.slow
def test_damage_is_never_loaded_silently(whole, tmp_path):
    """A cut file is always refused; a flipped bit is refused or, in padding, has no effect."""
    good = load_checkpoint(whole / "ckpt.pt")
    data, path, refusals = (whole / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt", 0
    for damage, bad in damaged_copies(data):
        path.write_bytes(bad)
        try:
            loaded = load_checkpoint(path)
        except UserError as e:
            assert "is damaged or not a checkpoint" in str(e) or "holds more than tensors" in str(e)
            refusals += 1
        else:
            assert "bit" in damage and same(loaded, good), damage
    assert refusals > 200


def test_a_damaged_latest_checkpoint_is_replaced_by_the_one_before(whole, practice, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    data = bytearray((out / "ckpt.pt").read_bytes())
    data[len(data) // 2] ^= 1
    for name in ("ckpt.pt", "best.pt"):  # often the same file on disk
        (out / name).write_bytes(data)
    done = train(practice, out, *ARGS, "--init_from=resume")
    assert done.returncode == 0, done.stderr
    older = out / f"ckpt_{STEPS - 1:06}.pt"
    assert f"renamed {out / 'ckpt.pt'} to {out / 'ckpt.pt.damaged'}" in done.stdout
    assert (
        f"{out / 'ckpt.pt'} is damaged or not a checkpoint of this program; so is "
        f"{out / 'best.pt'}; resuming from {older}, step {STEPS - 1}" in done.stdout
    )
    assert (out / "ckpt.pt.damaged").read_bytes() == data
    assert same(
        load_checkpoint(out / "ckpt.pt")["model"], load_checkpoint(whole / "ckpt.pt")["model"]
    )
    assert losses_of(out) == losses_of(whole)


def test_an_unreadable_checkpoint_is_not_treated_as_damaged(whole, tmp_path, monkeypatch):
    """If memory or permission is missing, or the disk fails, nothing is renamed or skipped."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for error, message in (
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory for .*pt"),
        (PermissionError(13, "Permission denied"), "ckpt.pt: Permission denied"),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fails)
        with pytest.raises(UserError, match=message):
            load_latest(out)


def test_checkpoints_of_later_steps_are_set_aside(whole, practice, tmp_path):
    """A run that is resumed from an earlier checkpoint does not mix it with later ones."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    os.replace(out / f"ckpt_{STEPS - 2:06}.pt", out / "ckpt.pt")
    later = out / f"ckpt_{STEPS - 1:06}.pt"
    done = train(practice, out, *ARGS, "--init_from=resume", "--keep_last=2")
    assert done.returncode == 0 and f"to {later}.later" in done.stdout
    steps = {path.name: load_checkpoint(path)["iter_num"] for path in out.glob("ckpt*")}
    assert steps == {"ckpt.pt": STEPS, later.name: STEPS - 1, f"{later.name}.later": STEPS - 1}
    assert losses_of(out) == losses_of(whole)


def test_invalid_checkpoints_are_refused_with_one_sentence(whole, practice, tmp_path):
    good, path = load_checkpoint(whole / "ckpt.pt"), tmp_path / "ckpt.pt"
    for name in ("model", "model_args", "optimizer", "config", "versions"):
        torch.save({**good, name: 5}, path)
        with pytest.raises(UserError, match=f"checkpoint of this program: its {name} is invalid"):
            load_checkpoint(path)
    (tmp_path / "sharded").mkdir()
    torch.save([1], tmp_path / "sharded" / "run.pt")
    with pytest.raises(UserError, match="checkpoint: expected the fields files and model_args"):
        load_checkpoint(tmp_path / "sharded")
    previous = tmp_path / "out" / "previous"
    shutil.copytree(whole, previous)
    done = train(practice, tmp_path / "out", f"--init_from={previous}")
    best = previous / "best.pt"
    refused(done, f"{previous} is not a checkpoint: it is the folder of a run; use {best}")


def test_a_run_with_only_damaged_checkpoints_is_not_started_from_scratch(whole, practice, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("ckpt.pt", "ckpt_000100.pt", "best.pt"):
        (out / name).write_text("scribbles")
    for args in (["--resume=auto"], ["--init_from=resume"]):
        refused(train(practice, out, *args), "ckpt.pt is damaged", "no other checkpoint in")
    refused(train(practice, out, f"--init_from={out / 'best.pt'}"), "best.pt is damaged")
    assert len(os.listdir(out)) == 3
    with pytest.raises(UserError, match=r"it is the folder of a run; use .*best.pt"):
        load_checkpoint(out)
    with pytest.raises(UserError, match=r"is not a sharded checkpoint: the folder has no run\.pt"):
        load_checkpoint(tmp_path)
    assert load_latest(tmp_path) == (None, None, [])


# ---- a full disk


def limited(n_bytes):
    """Limit the file size in a child process, to simulate a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(whole, practice, tmp_path):
    """No new checkpoint fits: earlier ones stay, and the run continues and ends with an error."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.pt")}
    size = (out / "ckpt.pt").stat().st_size
    args = [*ARGS, "--init_from=resume", f"--max_iters={STEPS + 4}", "--eval_interval=2"]
    done = train(practice, out, *args, preexec_fn=limited(size // 2))
    refused(
        done,
        f"cannot write {out / 'ckpt.pt'}: File too large",
        f"{STEPS} of {STEPS + 4} steps are saved",
    )
    assert f"warning: cannot write {out / 'ckpt.pt'}" in done.stderr
    assert f"the checkpoint of step {STEPS} is kept" in done.stderr
    assert before == {path.name: path.read_bytes() for path in out.glob("*.pt")}
    assert not list(out.glob("*.part"))
    done = train(practice, out, *args)  # there is space again
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(out / "ckpt.pt")["iter_num"] == STEPS + 4
    evals = [e for e in read_log(out) if e["kind"] == "eval"]
    best = min(evals, key=lambda e: e["val_loss"])
    assert load_checkpoint(out / "best.pt")["iter_num"] == best["step"]


def test_a_disk_that_is_full_from_the_start_is_reported(practice, tmp_path):
    done = train(practice, tmp_path / "out", "--max_iters=3", preexec_fn=limited(1000))
    refused(done, str(tmp_path / "out" / "tokenizer.bin"), "File too large")


def test_if_writing_the_best_model_fails_the_next_best_is_written(practice, tmp_path):
    """The disk is full while the first best model is written."""
    out = tmp_path / "out"
    code = f"""
import sys; from training import checkpoint as module
real = module.link_or_copy
def fails_once(*args):
    module.link_or_copy = real
    raise OSError(28, "No space left on device")
module.link_or_copy = fails_once
sys.argv = {["train.py", *TINY, f"--data_dir={practice}", f"--out_dir={out}", "--max_iters=6"]}
sys.argv += ["--eval_interval=2", "--seed=3"]
exec(compile(open({str(REPO / "train.py")!r}).read(), {str(REPO / "train.py")!r}, "exec"))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    evals = {e["step"]: e["val_loss"] for e in read_log(out) if e["kind"] == "eval"}
    step = load_checkpoint(out / "best.pt")["iter_num"]
    assert step > 2 and evals[step] == min(evals[4], evals[6])
    assert load_checkpoint(out / "ckpt.pt")["best_val_loss"] == pytest.approx(evals[step])


def test_saving_works_again_once_the_disk_has_space(tmp_path, monkeypatch, capsys):
    writer, save = CheckpointWriter(str(tmp_path), keep_last=2), checkpoint.save_file

    def full(*_):
        raise UserError("No space left on device")

    for step, function in ((1, save), (2, full), (3, save)):
        monkeypatch.setattr(checkpoint, "save_file", function)
        writer.save(small_checkpoint(step), is_best=True)
        writer.wait()
        assert (writer.error is not None) == (step == 2)
    errors = capsys.readouterr().err
    assert "No space left on device; the checkpoint of step 1 is kept" in errors
    assert steps_in(tmp_path) == {"ckpt.pt": 3, "ckpt_000001.pt": 1, "best.pt": 3}
