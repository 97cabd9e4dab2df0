"""Uploads, metrics, on_finish, --estimate, and the preset for smol-llama."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PATIENCE_S,
    REPO,
    read_log,
    refused,
    script,
    train,
    wait_until,
)
from local_hub import Hub

from bpe import BPETokenizer
from configurator import UserError
from formats.hftokenizer import byte_level_json
from model import ModelArgs, Transformer
from system import remote
from training.estimate import kept_bytes, memory_of

constants = pytest.importorskip("huggingface_hub.constants")
NAME = "me/run"
SMOL = "config/smol_llama_360m.py"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub, used by scripts and by this process."""
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the stand-in has no Xet storage
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def steps_on(hub):
    return sorted(name for name in hub.models[NAME] if name.startswith("checkpoints/"))


# ---- uploads


def test_every_checkpoint_arrives_and_training_continues_after_a_failure(hub, practice, tmp_path):
    hub.failures = 1  # the first commit fails once
    out = tmp_path / "out"
    marker = tmp_path / "finished"
    args = ["--max_iters=60", f"--hub_repo={NAME}", f"--on_finish=echo '$X;' > {marker}"]
    done = train(practice, out, *args)
    assert done.returncode == 0, done.stderr
    assert "retrying in 2 s" in done.stderr and "hf_secret" not in done.stderr + done.stdout
    assert steps_on(hub) == [f"checkpoints/ckpt_0000{n}.pt" for n in (20, 40, 60)]
    assert hub.models[NAME]["checkpoints/ckpt_000060.pt"] == (out / "ckpt.pt").read_bytes()
    assert {"log.jsonl", "tokenizer.model", "tokenizer.bin"} < set(hub.models[NAME])
    assert NAME in hub.private and "Bearer hf_secret" in hub.tokens
    assert not (out / "uploads").exists() and (out / "ckpt_000040.pt").exists()
    assert marker.read_text() == "$X;\n"


def test_local_copies_are_deleted_only_on_request(hub, practice, tmp_path):
    out = tmp_path / "out"
    args = ["--max_iters=60", f"--hub_repo={NAME}", "--hub_keep_local=False", "--keep_last=9"]
    assert train(practice, out, *args).returncode == 0
    assert [path.name for path in out.glob("ckpt*")] == ["ckpt.pt"]
    assert len(steps_on(hub)) == 3


def test_failed_uploads_are_kept_reported_and_sent_by_the_next_run(
    hub, practice, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "WAITS_S", (0.01, 0.01))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_bytes(b"weights")
    uploads = remote.Uploads(NAME, str(tmp_path / "out"))
    hub.failures = 100
    uploads.submit(str(tmp_path / "out" / "ckpt.pt"), "ckpt_000001.pt")
    (tmp_path / "out" / "ckpt.pt").unlink()  # deleted by rotation before the upload
    assert not uploads.finish()
    assert uploads.failed == ["ckpt_000001.pt"]
    hub.failures = 0
    next_uploads = remote.Uploads(NAME, str(tmp_path / "out"))
    assert next_uploads.finish()
    assert hub.models[NAME]["checkpoints/ckpt_000001.pt"] == b"weights"


def test_a_finished_run_uploads_the_rest_and_runs_on_finish(hub, practice, tmp_path):
    out, marker = tmp_path / "out", tmp_path / "m"
    assert train(practice, out, "--max_iters=20").returncode == 0
    staged = out / "uploads" / "ckpt_000020.pt" / "checkpoints"
    staged.mkdir(parents=True)
    (staged / "ckpt_000020.pt").write_bytes((out / "ckpt.pt").read_bytes())
    for name in ("ckpt_000010.pt.part", ".DS_Store"):  # left by a killed run, and by macOS
        (out / "uploads" / name).mkdir()
        (out / "uploads" / name / "x").write_text("x")
    args = [f"--hub_repo={NAME}", "--resume=auto", f"--on_finish=touch {marker}"]
    done = train(practice, out, "--max_iters=20", *args)
    assert done.returncode == 0, done.stderr
    assert steps_on(hub) == ["checkpoints/ckpt_000020.pt"] and set(hub.models[NAME]) == {
        "checkpoints/ckpt_000020.pt"
    }
    assert marker.exists() and not (out / "uploads").exists()


def test_two_runs_do_not_mix_in_one_repository(hub, practice, tmp_path):
    args = [f"--hub_repo={NAME}", "--max_iters=20", "--on_finish=true SECRET"]
    assert train(practice, tmp_path / "a", *args).returncode == 0
    assert not any(b"SECRET" in data for data in hub.models[NAME].values())
    refused(train(practice, tmp_path / "b", *args), "ckpt_000020.pt from another run")
    # on a new machine, the first run continues, and ends with a model although it gets no better
    rates = ["--embedding_lr=1e-9", "--hidden_lr=1e-9", "--head_lr=1e-9", "--scalar_lr=1e-9"]
    args[1] = "--max_iters=40"
    done = train(practice, tmp_path / "c", *args, *rates, "--resume=auto", "--bigram_lr=1e-9")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "model.bin").exists() and (tmp_path / "c" / "best.pt").exists()


def test_on_finish_runs_only_after_finished_runs(practice, tmp_path):
    marker = tmp_path / "m"
    args = ["--max_iters=20", f"--on_finish=touch {marker}; exit 3"]
    done = train(practice, tmp_path / "a", *args)
    refused(done, "the on_finish command ended with status 3")
    assert marker.exists()
    before, announcement, _ = done.stdout.partition(
        f"note: on_finish will run 'touch {marker}; exit 3'"
    )
    assert announcement and "step" not in before  # it is printed before training starts
    marker.unlink()
    rates = ["--embedding_lr=1e30", "--hidden_lr=1e30", "--grad_clip=0", "--head_lr=1e30"]
    refused(train(practice, tmp_path / "b", *args, *rates), "diverged")
    assert not marker.exists()


def test_uploads_are_refused_before_training_starts(hub, practice, tmp_path, monkeypatch):
    refused(train(practice, tmp_path / "a", "--hub_repo=no name"), "cannot upload to no name")
    refused(train(practice, tmp_path / "b", "--hub_repo=alone"), "expected user/name")
    monkeypatch.delenv("HF_TOKEN")
    done = train(practice, tmp_path / "c", f"--hub_repo={NAME}", cwd=tmp_path)
    refused(done, "set HF_TOKEN")
    (tmp_path / ".env").write_text('export HF_TOKEN="hf_file" # mine\n')
    done = train(practice, tmp_path / "d", f"--hub_repo={NAME}", "--max_iters=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Bearer hf_file" in hub.tokens
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = train(practice, tmp_path / "e", f"--hub_repo={NAME}", "--max_iters=5", cwd=tmp_path)
    refused(done, "cannot upload to me/run")
    assert not list((tmp_path / "e").glob("ckpt*"))


# ---- metrics

STUB = """
import json, os
class api: api_key = "key"
class Run:
    def __init__(self, options): self.id = options.get("id") or "id7"
    def define_metric(self, *args, **more): pass
    def log(self, values):
        if os.environ.get("FAIL"): raise OSError("no network")
        self.write({"id": self.id, **values})
    def finish(self): self.write({"id": self.id, "finished": True})
    def write(self, value):
        with open(os.environ["SEEN"], "a") as f: print(json.dumps(value), file=f)
def init(**options): return Run(options)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "wandb.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


def alone(practice, out, *args):
    """Run train.py in a new process, which finds the stub through PYTHONPATH."""
    from conftest import TINY

    flags = [*TINY, f"--data_dir={practice}", f"--out_dir={out}", *args]
    command = [sys.executable, REPO / "train.py", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_resumed_run_continues_its_metrics(wandb, practice, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = ["--wandb_project=stories", "--resume=auto"]
    assert alone(practice, out, *args, "--max_iters=20").returncode == 0
    (out / "wandb_id").write_text("id8")
    assert alone(practice, out, *args, "--max_iters=40").returncode == 0
    seen = [json.loads(line) for line in wandb.read_text().splitlines()]
    losses = {e["step"]: e["train/loss"] for e in seen if "train/loss" in e}
    logged = {e["step"]: e["loss"] for e in read_log(out) if e["kind"] == "train"}
    assert losses == pytest.approx(logged)
    assert {e["step"] for e in seen if "eval/val_loss" in e} == {20, 40}
    assert [e["id"] for e in seen if "finished" in e] == ["id7", "id8"]
    monkeypatch.setenv("FAIL", "1")
    done = alone(practice, tmp_path / "b", *args, "--max_iters=20")
    assert done.returncode == 0 and done.stderr.count("wandb failed (no network)") == 1


@pytest.mark.slow
def test_metrics_with_the_real_library_offline(practice, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    done = alone(practice, tmp_path / "out", "--wandb_project=stories", "--max_iters=20")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))


# ---- the estimate


@pytest.mark.slow
def test_the_estimate_needs_no_data_and_no_gpu(tmp_path):
    done = script("train.py", SMOL, "--estimate", f"--data_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "361,821,120 parameters, 47,185,920 of them in tables" in done.stdout
    assert "6,003,097,600 tokens: 5,725 steps of 1,048,576" in done.stdout
    assert "2.548 GFLOP per token" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("H100 PCIe"))
    assert row.split()[-4:] == ["118,671", "14.1", "1.8", "$34"]
    assert os.listdir(tmp_path) == []
    more = script("train.py", SMOL, "--estimate", "--mfu=0.2", "--price=1", "--max_iters=11450")
    row = next(line for line in more.stdout.splitlines() if line.startswith("H100 PCIe"))
    assert row.split()[-4:] == ["59,335", "56.2", "7.0", "$56"]
    refused(script("train.py", SMOL, "--estimate", "--mfu=0"), "mfu = 0.0")


@pytest.mark.slow
def test_the_estimate_of_memory_adds_up():
    sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 512, "max_seq_len": 128}
    with torch.device("meta"):
        model = Transformer(ModelArgs(**sizes))
    n = model.n_params()
    per_layer = 128 * 64 * 4  # its input in float32
    block = kept_bytes(model, 2, "block") - kept_bytes(model, 1, "block")
    rest = 128 * (64 * 4 * 3 + 8)  # for the last norm and the loss
    assert 3 * per_layer <= block <= 3 * per_layer + 2 * rest
    kept = {r: kept_bytes(model, 1, r) for r in ("none", "selective", "block")}
    assert kept["block"] < kept["selective"] < kept["none"]
    # per head q, k, v, the result and one float32 per query, but no scores
    assert kept["none"] < 3 * 128 * 64 * 4 * 26 + 4 * n
    for optimizer, each in (("adamw", 16), ("muon", 12)):
        fixed, _ = memory_of(model, optimizer, "block", 1, False)
        sharded, _ = memory_of(model, optimizer, "block", 4, True)
        assert each * n * 0.8 < (fixed - sharded) * 4 / 3 <= 16 * n
    assert fixed > sharded


def test_unusable_attention_backends_are_refused(practice, tmp_path):
    for kernel in ("flex", "flash"):
        done = train(practice, tmp_path / "a", f"--attention={kernel}")
        refused(done, f"attention = {kernel}", "--attention=sdpa")
    refused(train(practice, tmp_path / "a", "--attention=fast"), "expected one of sdpa, flex")


# ---- smol-llama's preset


def fineweb_on(hub, n_tokens):
    """Put a pre-tokenized dataset on the stand-in, with a vocabulary of the real size."""
    special = ["<|endoftext|>", "<pad>", "<s>"]
    n_merges = 49152 - 256 - len(special)
    merges = [(bytes([a]), bytes([b])) for a in range(256) for b in range(256)][:n_merges]
    tokens = [token.encode() for token in special] + [bytes([i]) for i in range(256)]
    bpe = BPETokenizer(dict(enumerate(tokens + [a + b for a, b in merges])), merges, special)
    assert len(bpe.vocab) == 49152
    ids = np.random.default_rng(0).integers(3, 49152, n_tokens).astype("<u2")
    ids[::50] = 0
    hub.models["datasets/weights-and-wires/fineweb-6b"] = {
        "tokenized/train.bin": ids.tobytes(),
        "tokenized/val.bin": ids[:600].tobytes(),
        "tokenized/tokenizer.json": json.dumps(byte_level_json(bpe)).encode(),
    }


SMALLER = "--n_layers=1 --max_seq_len=16 --batch_size=2 --eval_interval=2 --device=cpu".split()
SMALLER += ["--dtype=float32", "--compile=False", "--warmup_iters=1"]


@pytest.mark.slow
def test_smol_llama_from_its_data_to_transformers(hub, tmp_path):
    fineweb_on(hub, 20000)
    args = ["--source=fineweb-6b", f"--endpoint={hub.url}"]
    done = script("webtext.py", "prepare", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "next: python train.py config/smol_llama_360m.py" in done.stdout
    command = ["train.py", SMOL, *SMALLER, "--gradient_accumulation_steps=2"]
    for n in (1, 2):  # the second continues the first
        done = script(*command, f"--max_iters={n}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "smol_llama_360m"
    log = read_log(out)
    assert [e["step"] for e in log if e["kind"] == "train"] == [1, 2]
    assert log[0]["n_params"] == 47_185_920 + 9_830_400 + 3 * 960
    assert all(e["val_bpb"] > 0 for e in log if e["kind"] == "eval")
    args = [f"--checkpoint={out / 'ckpt.pt'}", "--format=hf"]
    done = script("export.py", tmp_path / "hf", *args)
    assert done.returncode == 0, done.stderr
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.config.num_key_value_heads == 5 and len(tokenizer) == 49152
    ids = tokenizer("The web", return_tensors="pt").input_ids
    assert ids[0, 0] == 0 and model(ids).logits.shape[-1] == 49152
    shutil.rmtree(tmp_path / "hf")


def kill_all(text):
    """Kill every process with `text` in its command: torchrun's ranks have their own sessions."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "cmdline").read_bytes() and folder.name != "self":
                os.kill(int(folder.name), signal.SIGKILL)


def torchrun(folder, practice, *args):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    small = ["--dim=60", "--vocab_size=300", "--vocab_source=custom", f"--data_dir={practice}"]
    command = [*launch, REPO / "train.py", SMOL, *SMALLER, *small, *args]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_processes_upload_are_killed_and_resume_from_the_hub(hub, practice, tmp_path):
    out = tmp_path / "out"
    args = [f"--hub_repo={NAME}", f"--out_dir={out}", "--eval_interval=5"]
    process = torchrun(tmp_path, practice, *args, "--max_iters=100000")
    # the log, the tokenizer and at least two checkpoints
    wait_until(lambda: len(hub.models.get(NAME, {})) > 4 or process.poll() is not None)
    kill_all(str(out))
    output = process.communicate(timeout=PATIENCE_S)[0]
    arrived = steps_on(hub)
    assert len(arrived) >= 2, output
    step = int(arrived[-1][-9:-3])
    shutil.rmtree(out)  # the machine is gone
    process = torchrun(tmp_path, practice, *args, f"--max_iters={step + 3}")
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, output
    assert f"continuing from ckpt_{step:06}.pt of {NAME}" in output
    log = read_log(out)
    trained = [e["step"] for e in log if e["kind"] == "train"]
    assert trained == list(range(1, step + 4))
    assert steps_on(hub)[-1] == f"checkpoints/ckpt_{step + 3:06}.pt"


@pytest.mark.slow
def test_two_processes_with_a_time_limit_end_with_on_finish(practice, tmp_path):
    args = [
        "--max_minutes=0.02",
        f"--out_dir={tmp_path / 'out'}",
        f"--on_finish=touch {tmp_path}/m",
    ]
    process = torchrun(tmp_path, practice, *args)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, output
    assert (tmp_path / "m").exists()


def test_an_empty_hub_starts_a_new_run_and_an_unreachable_one_is_an_error(hub, practice, tmp_path):
    args = [f"--hub_repo={NAME}", "--resume=auto", "--max_iters=5"]
    done = train(practice, tmp_path / "a", *args)
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="cannot download a checkpoint from a b"):
        remote.fetch_latest("a b", str(tmp_path / "b"))
