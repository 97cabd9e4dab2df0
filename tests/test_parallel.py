"""Several processes: losses do not depend on their number, and any number can resume a run."""

import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    PATIENCE_S,
    REPO,
    TINY,
    read_log,
    script,
    train,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from configurator import UserError
from system.files import checksum
from training import parallel, sharded
from training.checkpoint import load_checkpoint, load_model

STEPS, HALF = 20, 10
ARGS = [f"--max_iters={STEPS}", f"--eval_interval={HALF}", "--log_interval=1", "--keep_last=3"]


def launch(n, data_dir, out_dir, *args, **options):
    """Start a run of n processes under torchrun and return the Popen."""
    with socket.socket() as s:  # a free port, since several tests may run in parallel
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    command += [f"--master_port={port}", str(REPO / "train.py"), *TINY]
    command += [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def train_with(n, data_dir, out_dir, *args):
    """Run n processes until they end, and return what they printed."""
    if n == 1 and "--fsdp" not in args:
        done = train(data_dir, out_dir, *args)
        output, errors, status = done.stdout, done.stderr, done.returncode
    else:
        process = launch(n, data_dir, out_dir, *args)
        output, errors = process.communicate(timeout=PATIENCE_S)
        status = process.returncode
    assert status == 0, output + errors
    return output


def losses(out_dir):
    entries = [e for e in read_log(out_dir) if e["kind"] in ("train", "eval")]
    return {(e["kind"], e["step"]): e.get("loss", e.get("val_loss")) for e in entries}


def assert_same_losses(a, b, tolerance=1e-5):
    a, b = losses(a), losses(b)
    assert a.keys() == b.keys()
    assert len(a) == STEPS + STEPS // HALF
    assert max(abs(a[key] - b[key]) for key in a) < tolerance


@pytest.fixture(scope="module")
def runs(tmp_path_factory, practice):
    """The same 20 steps with one process, with DDP on 2 and 4, and with FSDP on 2."""
    folder = tmp_path_factory.mktemp("parallel")
    train_with(1, practice, folder / "one", *ARGS)
    for n, name, args in ((2, "ddp2", []), (4, "ddp4", []), (2, "fsdp2", ["--fsdp"])):
        text = train_with(n, practice, folder / name, *ARGS, *args)
        assert f"{n} processes ({'FSDP' if args else 'DDP'})" in text
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp2", "ddp4", "fsdp2"])
def test_the_losses_do_not_depend_on_the_number_of_processes(runs, name):
    assert_same_losses(runs / "one", runs / name)
    assert read_log(runs / name)[-1]["reason"] == "finished"
    one, many = ((runs / n / "model.bin").read_bytes() for n in ("one", name))
    one, many = (np.frombuffer(data[128:], "<f4") for data in (one, many))
    # all but a few with nearly zero gradients, whose rounding errors AdamW amplifies
    assert np.quantile(np.abs(one - many), 0.999) < 1e-4
    assert np.linalg.norm(one - many) < 1e-4 * np.linalg.norm(one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, n, args",
    [
        ("ddp2", 1, []),
        ("ddp2", 4, ["--activation_checkpointing=selective"]),
        ("fsdp2", 1, []),
        ("fsdp2", 4, ["--fsdp"]),
        ("fsdp2", 2, []),
        ("one", 2, ["--fsdp", "--activation_checkpointing=block"]),
    ],
)
def test_any_number_of_processes_can_resume_a_checkpoint(runs, practice, tmp_path, source, n, args):
    out = tmp_path / "out"
    out.mkdir()
    half = f"ckpt_{HALF:06}.pt"
    copy = shutil.copytree if (runs / source / half).is_dir() else shutil.copyfile
    copy(runs / source / half, out / "ckpt.pt")
    shutil.copyfile(runs / source / "log.jsonl", out / "log.jsonl")
    train_with(n, practice, out, *ARGS, "--init_from=resume", *args)
    assert_same_losses(runs / "one", out)
    assert max(e.get("step", 0) for e in read_log(out)) == STEPS
    assert (out / "ckpt.pt").is_dir() == ("--fsdp" in args)
    model = load_model(load_checkpoint(out / "ckpt.pt"), out / "ckpt.pt").state_dict()
    whole = load_checkpoint(runs / "one" / "ckpt.pt")["model"]
    for name in whole:
        # Adam takes full steps even if the gradients of rarely used values are rounding errors
        atol = 5e-4 if name.startswith("value_embeddings") else 1e-4
        torch.testing.assert_close(model[name], whole[name], atol=atol, rtol=0)


@pytest.mark.slow
def test_a_sharded_checkpoint_can_be_exported_and_sampled(runs, tmp_path):
    sharded = runs / "fsdp2" / "ckpt.pt"
    done = script("export.py", tmp_path / "model.bin", f"--checkpoint={sharded}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.bin").read_bytes() == (runs / "fsdp2" / "model.bin").read_bytes()
    done = script("sample.py", f"--out_dir={runs / 'fsdp2'}", "--max_new_tokens=5", "--device=cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_damaged_sharded_checkpoint_is_replaced_by_the_one_before(runs, practice, tmp_path):
    """With a flipped bit, or a missing file."""
    for i, damage in enumerate(("bit", "file")):
        out = tmp_path / f"out{i}"
        shutil.copytree(runs / "fsdp2", out)
        for name in ("ckpt.pt", "best.pt"):
            part = out / name / "__1_0.distcp"
            data = bytearray(part.read_bytes())
            data[len(data) // 2] ^= 1
            part.write_bytes(data) if damage == "bit" else part.unlink()
        with pytest.raises(UserError, match=r"damaged: .*__1_0\.distcp is missing or has changed"):
            load_checkpoint(out / "ckpt.pt")
        text = train_with(1, practice, out, *ARGS, "--init_from=resume")
        assert f"resuming from {out / f'ckpt_{HALF:06}.pt'}, step {HALF}" in text
        assert_same_losses(runs / "one", out)


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-code-ran",))


@pytest.mark.slow
def test_a_sharded_checkpoint_from_a_stranger_runs_no_code(runs, tmp_path, monkeypatch):
    """Neither through its table of contents, a pickle, nor through entries that are not tensors."""
    monkeypatch.chdir(tmp_path)
    metadata_module = BytesStorageMetadata.__module__
    more = sharded.CONTENTS[metadata_module] | {BytesStorageMetadata.__name__}
    monkeypatch.setitem(sharded.CONTENTS, metadata_module, more)  # must be refused anyway
    good = runs / "fsdp2" / "ckpt.pt"
    name = "model.norm.weight"
    contents = pickle.loads((good / ".metadata").read_bytes())
    contents.state_dict_metadata[name] = BytesStorageMetadata()
    code = pickle.dumps(Hostile())
    pointing = pickle.dumps(contents)
    for i, (metadata, data) in enumerate([(code, None), (pointing, code)]):
        bad = tmp_path / f"bad{i}"
        shutil.copytree(good, bad)
        (bad / ".metadata").write_bytes(metadata)
        if data:
            for part in bad.glob("*.distcp"):
                part.write_bytes(data * 10_000)  # as long as a model
        checkpoint = load_checkpoint(good)
        checkpoint["files"] = {n: checksum(bad / n) for n in checkpoint["files"]}  # looks intact
        torch.save(checkpoint, bad / "run.pt")
        with pytest.raises(UserError, match="does not fit this model: it holds more than tensors"):
            load_model(load_checkpoint(bad), bad)
    assert not os.path.exists("hostile-code-ran")


@pytest.mark.slow
def test_a_full_disk_costs_no_sharded_checkpoint(runs, practice, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs / "fsdp2", out)
    args = [*ARGS, "--init_from=resume", "--fsdp", f"--max_iters={STEPS + 2}"]
    limit = (150_000, 150_000)  # less than a rank's part
    process = launch(
        2,
        practice,
        out,
        *args,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert f"warning: cannot write {out / 'ckpt.pt'}: " in errors
    assert f"{STEPS} of {STEPS + 2} steps are saved" in errors
    assert load_checkpoint(out / "ckpt.pt")["iter_num"] == STEPS
    assert not list(out.glob("*.part"))


@pytest.mark.slow
def test_accumulated_micro_batches_are_shared(runs, practice, tmp_path):
    """Two micro-batches of 4, one per process, take the same step as one batch of 8."""
    args = ["--batch_size=4", "--gradient_accumulation_steps=2"]
    train_with(2, practice, tmp_path / "two", *ARGS, *args)
    args[1] = "--gradient_accumulation_steps=4"  # two per process
    args[0] = "--batch_size=2"
    train_with(2, practice, tmp_path / "four", *ARGS, *args)
    for name in ("two", "four"):
        a, b = losses(runs / "one"), losses(tmp_path / name)
        trains = [key for key in a if key[0] == "train"]  # evaluation uses other batches
        assert max(abs(a[key] - b[key]) for key in trains) < 1e-5


def ranks_of(out_dir):
    """Return {rank: process id} of the processes that write to a folder."""
    pids = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                environ = f.read().split(b"\0")
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                mine = f"--out_dir={out_dir}".encode() in f.read().split(b"\0")
        except OSError:
            continue
        for word in environ:
            if mine and word.startswith(b"RANK="):
                pids[int(word[5:])] = pid
    return pids


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "all processes"])
def test_sigterm_leaves_a_checkpoint_and_resuming_changes_nothing(runs, practice, tmp_path, to):
    """Some systems signal every process, and torchrun then signals its own processes again."""
    out = tmp_path / "out"
    process = launch(2, practice, out, *ARGS, "--eval_iters=100")  # slower
    while process.poll() is None:
        if (out / "log.jsonl").exists() and '"train"' in (out / "log.jsonl").read_text():
            for pid in ranks_of(out).values() if to == "all processes" else ():
                os.kill(pid, signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    output, errors = process.communicate(timeout=PATIENCE_S)
    last = read_log(out)[-1]
    assert last["reason"] == "interrupted", output + errors
    assert load_checkpoint(out / "ckpt.pt")["iter_num"] == last["step"] < STEPS
    train_with(2, practice, out, *ARGS, "--init_from=resume", "--eval_iters=4")
    a, b = losses(runs / "one"), losses(out)
    for key in a:
        if key[0] == "train":
            assert abs(a[key] - b[key]) < 1e-5


@pytest.mark.slow
def test_a_failing_rank_ends_the_job_with_its_own_message(practice, tmp_path):
    args = ["--batch_size=7"]
    process = launch(2, practice, tmp_path / "out", *args)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    (message,) = [line for line in errors.splitlines() if "error: " in line]
    assert message == (
        "[rank0]: error: a step of 7 sequences cannot be shared by 2 processes: make "
        "batch_size * gradient_accumulation_steps a multiple of 2"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(practice, tmp_path):
    """If rank 1 is killed, rank 0 does not wait forever, and reports what happened."""
    out = tmp_path / "out"
    process = launch(2, practice, out, "--max_iters=50000", "--eval_interval=50000")
    while not ((out / "log.jsonl").exists() and '"train"' in (out / "log.jsonl").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(ranks_of(out)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors or "exitcode  : -9" in errors
    print(errors)  # a failed assertion would truncate it
    assert "[rank0]: error: another process has ended (" in errors
    assert "use --init_from=resume to continue from the latest checkpoint" in errors


def test_the_largest_micro_batch_that_fits():
    tried = []

    def fits(limit):
        def attempt(size):
            tried.append(size)
            return size <= limit

        return attempt

    assert parallel.largest_that_fits(64, 8, fits(64)) == (64, 8)
    assert parallel.largest_that_fits(64, 8, fits(20)) == (16, 32)
    assert parallel.largest_that_fits(12, 1, fits(5)) == (4, 3)
    assert parallel.largest_that_fits(7, 1, fits(3)) == (1, 7)
    assert parallel.largest_that_fits(4, 2, fits(0)) is None
    assert tried[:1] == [64] and tried[-3:] == [4, 2, 1]
