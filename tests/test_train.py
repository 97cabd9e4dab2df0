"""Training end to end: the loss falls, files are written, runs resume, bad settings are refused."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
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

from dataset import DataPaths, names_without_sidecar
from formats.huggingface import write_folder
from formats.table import load, write_checkpoint
from system import hardware
from training.checkpoint import load_checkpoint
from training.fit import use_private_compile_cache


def test_a_run_writes_all_its_files(trained):
    files = {"ckpt.pt", "ckpt_000040.pt", "best.pt"}
    files |= {"model.bin", "tokenizer.bin", "tokenizer.model", "log.jsonl"}
    assert set(os.listdir(trained)) == files
    steps = {name: load_checkpoint(trained / name)["iter_num"] for name in files if "pt" in name}
    assert steps == {"ckpt.pt": 60, "ckpt_000040.pt": 40, "best.pt": 60}
    log = read_log(trained)
    assert [entry["kind"] for entry in log[:2]] == ["start", "train"] and log[-1]["kind"] == "end"
    assert log[0]["config"]["dim"] == 32 and log[0]["torch"] == torch.__version__
    assert 0.99 < log[0]["coverage"] < 1 and log[0]["processes"] == 1
    trains = [entry for entry in log if entry["kind"] == "train"]
    evals = [entry for entry in log if entry["kind"] == "eval"]
    clock = {"kind", "step", "tokens", "time_s", "train_s"}
    assert all(set(t) == clock | {"loss", "lr", "grad_norm", "tok_s", "mfu"} for t in trains)
    assert all(set(e) == clock | {"val_loss", "val_bpb"} for e in evals)
    assert [t["step"] for t in trains] == [1, *range(5, 61, 5)]
    assert [e["step"] for e in evals] == [20, 40, 60]
    assert log[-1] | {"reason": "finished", "step": 60, "tokens": 60 * 8 * 64} == log[-1]
    assert trains[0]["loss"] > 5.5 and trains[-1]["loss"] < 4
    losses = [e["val_loss"] for e in evals]
    assert losses == sorted(losses, reverse=True)
    times = [entry["time_s"] for entry in log[1:]]
    assert times == sorted(times) and all(e["train_s"] < e["time_s"] for e in log[1:])
    rates = [t["lr"] for t in trains]
    assert max(rates) <= 0.02 and rates[0] < rates[1] and rates[-1] < 2e-3


def test_bits_per_byte_is_the_loss_times_tokens_per_byte(trained, practice):
    (shard, *_) = json.loads((practice / "tok300" / "shards.json").read_text())["shards"]
    for entry in read_log(trained):
        if entry["kind"] == "eval":
            bits = entry["val_loss"] / 0.69314718056
            assert entry["val_bpb"] == pytest.approx(bits * shard["tokens"] / shard["bytes"], 1e-4)


def test_python_and_c_tell_the_same_story(trained, run):
    for prompt in ("", "Once upon a time"):
        done = script(
            "sample.py", f"--out_dir={trained}", "--temperature=0", f"--start={prompt}",
            "--max_new_tokens=40", "--device=cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        n_prompt = len(sentencepiece_ids(trained, prompt))
        args = ["-t", "0", "-n", str(n_prompt + 40), "-i", prompt]
        assert run(trained / "model.bin", *args).stdout.decode() == done.stdout


def sentencepiece_ids(out, text):
    from tokenizer import open_tokenizer

    return open_tokenizer(out / "tokenizer.model").encode(text, bos=False)


def test_evaluation_is_the_same_each_time(trained, practice):
    texts = set()
    for _ in range(2):
        done = train(practice, trained, "--init_from=resume", "--eval_only")
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    (text,) = texts
    last = [e for e in read_log(trained) if e["kind"] == "eval"][-1]
    loss, bpb = map(float, re.search(r"loss ([\d.]+), ([\d.]+) bits per byte", text).groups())
    assert (loss, bpb) == pytest.approx((last["val_loss"], last["val_bpb"]), abs=1e-4)


def same_weights(a, b):
    a, b = (load_checkpoint(out / "ckpt.pt")["model"] for out in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupted(practice, out, *args):
    """Interrupt a run with Ctrl-C after its first step, and return what it printed."""
    command = [sys.executable, REPO / "train.py", *TINY, f"--data_dir={practice}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, f"--out_dir={out}", *args], **pipes)
    while process.poll() is None:
        if (out / "log.jsonl").exists() and '"train"' in (out / "log.jsonl").read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, text
    return text


def test_a_run_that_stops_before_its_first_evaluation_leaves_a_model(practice, tmp_path, run):
    flags = ["--max_iters=100000", "--eval_interval=100000", "--device=cpu", "--on_finish=secret"]
    text = interrupted(practice, tmp_path, *flags)
    # with what a checkpoint does not have, but nothing secret
    again = f"python train.py --init_from=resume --out_dir={tmp_path} --device=cpu\n"
    assert f"to continue: {again}" in text
    assert f"note: {tmp_path / 'model.bin'} is the model at this step" in text
    done = run(tmp_path / "model.bin", "-n", "5", "-i", "Once")
    assert done.returncode == 0 and done.stdout.startswith(b"Once")


def test_ctrl_c_leaves_a_checkpoint_and_resuming_changes_nothing(trained, practice, tmp_path):
    out = tmp_path / "out"
    # an evaluation after every step slows the run down
    text = interrupted(practice, out, "--max_iters=60", "--eval_interval=1")
    stopped = load_checkpoint(out / "ckpt.pt")["iter_num"]
    assert 0 < stopped < 60 and f"stopped at step {stopped}" in text
    assert read_log(out)[-1]["reason"] == "interrupted"
    # the checkpoint has all other settings
    done = script(
        "train.py", "--init_from=resume", f"--out_dir={out}", "--device=cpu", "--dtype=float32"
    )
    assert done.returncode == 0, done.stderr
    assert same_weights(out, trained)
    losses = [
        {e["step"]: e["loss"] for e in read_log(o) if e["kind"] == "train"} for o in (out, trained)
    ]
    assert losses[0][60] == losses[1][60]
    kinds = [e["kind"] for e in read_log(out)]
    assert kinds.count("start") == 2 and kinds[-1] == "end"


def test_resuming_with_other_settings(trained, practice, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    refused(
        script("train.py", "--init_from=resume", f"--out_dir={out}", "--dim=64"),
        "cannot resume with dim = 64: the run has 32",
    )
    refused(script("train.py", "--init_from=resume", f"--out_dir={out}"), "raise --max_iters")
    args = ["--max_iters=65", "--hidden_lr=1e-3", "--batch_size=4"]
    args += ["--weight_decay=0.5", "--beta2=0.9", "--dropout=0.2"]
    done = script("train.py", "--init_from=resume", f"--out_dir={out}", *args)
    assert done.returncode == 0, done.stderr
    assert "resuming with max_iters = 65 instead of 60" in done.stdout
    assert "resuming with hidden_lr = 0.001 instead of 0.02" in done.stdout
    assert read_log(out)[-1]["step"] == 65
    checkpoint = load_checkpoint(out / "ckpt.pt")
    assert checkpoint["model_args"]["dropout"] == 0.2
    assert (checkpoint["config"]["weight_decay"], checkpoint["config"]["beta2"]) == (0.5, 0.9)


@pytest.mark.slow
def test_an_equivalent_setting_is_accepted_when_resuming(trained, practice, tmp_path):
    """The run has value_embeddings = -1, all of its two layers: 2 is accepted, 1 is refused."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    resume = [f"--out_dir={out}", "--init_from=resume", "--max_iters=62"]
    refused(
        script("train.py", *resume, "--value_embeddings=1"),
        "cannot resume with value_embeddings = 1: the run has 2",
    )
    done = script("train.py", *resume, "--value_embeddings=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("instead of") == 1  # max_iters
    start = [f"--init_from={trained / 'ckpt.pt'}", "--max_iters=2"]
    refused(train(practice, tmp_path / "a", *start, "--value_embeddings=1"), "its model has 2")
    done = train(practice, tmp_path / "b", *start, "--value_embeddings=-1")
    assert done.returncode == 0, done.stderr


def test_an_imported_model_can_be_trained_further(trained, practice, tmp_path):
    """From a Hugging Face folder via a checkpoint: the loss starts where the run's ended."""
    model, tokenizer, facts = load(str(trained / "best.pt"))
    write_folder(model, str(tmp_path / "hf"), "fp32", tokenizer, facts)
    back = tmp_path / "back" / "ckpt.pt"
    write_checkpoint(*load(str(tmp_path / "hf"))[:1], str(back), "fp32", tokenizer, {})
    done = train(practice, tmp_path / "out", f"--init_from={back}", "--max_iters=2")
    assert done.returncode == 0, done.stderr
    losses = [entry["loss"] for entry in read_log(tmp_path / "out") if entry["kind"] == "train"]
    ended = [entry["val_loss"] for entry in read_log(trained) if entry["kind"] == "eval"][-1]
    assert abs(losses[0] - ended) < 0.3


@pytest.mark.slow
def test_a_resumed_run_can_switch_on_normuon(practice, tmp_path):
    """neuron_sizes, missing from the checkpoint, start at 0; activation checkpointing stays on."""
    out = tmp_path / "out"
    args = ["--neuron_beta=0", "--activation_checkpointing=block", "--max_iters=4"]
    assert train(practice, out, *args).returncode == 0
    assert not any(k.endswith("sizes") for k in load_checkpoint(out / "ckpt.pt")["optimizer"])
    resume = [f"--out_dir={out}", "--init_from=resume", "--max_iters=6", "--neuron_beta=0.9"]
    done = script("train.py", *resume)
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(out / "ckpt.pt")
    assert any(k.endswith("sizes") for k in checkpoint["optimizer"])
    assert checkpoint["config"]["activation_checkpointing"] == "block"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("given, is_tuned", [({}, True), ({"GLIBC_TUNABLES": "x=1"}, False)])
def test_malloc_keeps_memory_in_the_process_that_calls(tmp_path, given, is_tuned):
    """It is tuned in the process that a notebook or debugger started, without replacing it."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import resource; from system.tuning import tune_process; print('started', flush=True)\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "tune_process(); bytearray(1 << 26); before = faults(); bytearray(1 << 26)\n"
        "print(faults() - before < 1000)"
    )
    bare = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment = {**bare, "PYTHONPATH": str(REPO), **given}
    command = [sys.executable, str(probe)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["started", str(is_tuned)], done.stderr


@pytest.mark.slow
def test_a_notebook_keeps_its_variables_and_its_ctrl_c(practice, tmp_path):
    """train.py in a process that continues after it, as with %run in Jupyter."""
    args = [*TINY, f"--data_dir={practice}", f"--out_dir={tmp_path / 'out'}", "--max_iters=2"]
    code = f"""
import runpy, signal, sys
print("started", flush=True)
sys.argv = {["train.py", *args]}
sys.path.insert(0, {str(REPO)!r})
runpy.run_path({str(REPO / "train.py")!r}, run_name="__main__")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    bare = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare)
    assert done.stdout.count("started") == 1 and done.stdout.endswith("True\n"), done.stderr


def test_unusual_paths_work(practice, tmp_path):
    """~ for the home folder, brackets, spaces, links, and resuming from another directory."""
    project, elsewhere = tmp_path / "my project [1]", tmp_path / "elsewhere"
    shutil.copytree(practice, project / "data")
    paths = DataPaths(project / "of llama2.c", "custom", 300)
    shutil.copytree(practice / "tok300", paths.shards, ignore=shutil.ignore_patterns("[!d]*"))
    assert "data00.bin" in names_without_sidecar(paths, "")
    elsewhere.mkdir()
    home = {**os.environ, "HOME": str(project)}
    args = [*TINY, "--max_iters=2", "--eval_interval=1", "--data_dir=data", "--out_dir=~/out"]
    done = script("train.py", *args, cwd=project, env=home)
    assert done.returncode == 0, done.stderr
    assert (project / "out" / "ckpt.pt").exists() and not (project / "~").exists()
    resume = [f"--out_dir={project / 'out'}", "--init_from=resume", "--max_iters=3"]
    done = script("train.py", *resume, "--device=cpu", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert f"note: the run's data_dir = data is {project / 'data'}" in done.stdout
    for name in ("model.bin", "best.pt"):
        (elsewhere / name).symlink_to(project / "out" / name)
        done = script("sample.py", f"--checkpoint={elsewhere / name}", "--max_new_tokens=2")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--max_iters=400", "--hidden_lr=1e30"],
        ["--max_iters=61", "--hidden_lr=1e30"],  # only the last evaluation notices
    ],
)
def test_divergence_is_reported_and_keeps_the_checkpoint(trained, practice, tmp_path, args):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = (out / "ckpt.pt").read_bytes(), (out / "model.bin").read_bytes()
    args = [*args, "--init_from=resume", "--grad_clip=0", "--cooldown_frac=0"]
    done = script("train.py", f"--out_dir={out}", *args, "--always_save_checkpoint")
    refused(done, "training diverged at step", "--hidden_lr=1e+")
    assert before == ((out / "ckpt.pt").read_bytes(), (out / "model.bin").read_bytes())
    assert read_log(out)[-1]["reason"] == "diverged"
    for line in (out / "log.jsonl").read_text().splitlines():
        assert "NaN" not in line and "Infinity" not in line


def test_a_new_run_sets_the_earlier_one_aside(trained, practice, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    done = train(practice, out, "--max_iters=3")
    assert done.returncode == 0 and f"moved the earlier run in {out} to" in done.stdout
    for name in ("ckpt.pt", "model.bin", "log.jsonl", "tokenizer.model"):
        assert (out / "previous" / name).read_bytes() == (trained / name).read_bytes()
    assert read_log(out)[0]["kind"] == "start" and read_log(out)[-1]["step"] == 3


def test_another_tokenizer_is_noticed(trained, practice, tmp_path):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(trained, out)
    for args in (["synth", "--n_stories=400", "--seed=5"], ["train_vocab"], ["pretokenize"]):
        flags = [f"--data_dir={data}", "--vocab_size=300"]
        assert script("tinystories.py", *args, *flags).returncode == 0
    args = ["--init_from=resume", "--max_iters=70", f"--data_dir={data}"]
    done = script("train.py", f"--out_dir={out}", *args)
    refused(done, "was trained with a tokenizer other than")


def test_accumulated_batches_equal_one_batch(practice, tmp_path):
    """Two micro-batches of 4 take the same step as one batch of 8."""
    for name, args in [
        ("one", []),
        ("two", ["--batch_size=4", "--gradient_accumulation_steps=2"]),
    ]:
        assert train(practice, tmp_path / name, "--max_iters=8", *args).returncode == 0
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-4, rtol=0)


@pytest.mark.slow
def test_bfloat16_and_dropout_train_and_resume(practice, tmp_path):
    # rates that do not depend on max_iters, so that a run in two parts equals a single run
    args = ["--dtype=bfloat16", "--dropout=0.1", "--tie_embeddings=False", "--cooldown_frac=0"]
    args += ["--warmup_iters=0", "--hidden_lr=1e-3"]
    assert train(practice, tmp_path / "whole", *args, "--max_iters=12").returncode == 0
    assert train(practice, tmp_path / "parts", *args, "--max_iters=6").returncode == 0
    more = ["--init_from=resume", "--max_iters=12", "--device=cpu"]
    done = script("train.py", f"--out_dir={tmp_path / 'parts'}", *more)
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_falling_weight_decay_shrinks_weights_less_than_constant_decay(practice, tmp_path):
    """And more than no decay."""
    norms = []
    for name, args in (
        ("none", ["--muon_weight_decay=0"]),
        ("linear", ["--muon_weight_decay=2", "--decay_shape=linear"]),
        ("constant", ["--muon_weight_decay=2"]),
    ):
        assert train(practice, tmp_path / name, "--max_iters=20", *args).returncode == 0
        weights = load_checkpoint(tmp_path / name / "ckpt.pt")["model"]
        norms.append(weights["layers.0.feed_forward.w1.weight"].norm())
    assert norms[0] > 1.02 * norms[1] > 1.04 * norms[2]


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--dropout=0.1"], ["--dtype=bfloat16", "--sliding_window=8"]])
def test_activation_checkpointing_changes_no_loss(practice, tmp_path, args):
    losses = []
    for kind in ("none", "block", "selective"):
        flags = [f"--activation_checkpointing={kind}", "--max_iters=6", "--log_interval=1"]
        done = train(practice, tmp_path / kind, *flags, *args)
        assert done.returncode == 0, done.stderr
        losses.append([e["loss"] for e in read_log(tmp_path / kind) if e["kind"] == "train"])
    assert losses[1] == losses[0] and losses[2] == losses[0]


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--vocab_size=512"], ["no token shards", "pretokenize --vocab_size=512"]),
        (["--vocab_source=llama2"], ["no token shards", "--vocab_source=llama2"]),
        (["--vocab_size=-1"], ["vocab_size = -1: expected 0 (Llama 2's) or"]),
        (["--vocab_source=mine"], ["expected one of custom, bpe, llama2"]),
        (["--dim=100", "--n_heads=3"], ["n_heads = 3 does not divide dim = 100"]),
        (["--n_kv_heads=3"], ["n_kv_heads = 3 does not divide n_heads = 4"]),
        (["--max_seq_len=100000"], ["max_seq_len = 100000 needs 100001 tokens, but"]),
        (["--batch_size=100000"], ["but one step needs 100000"]),
        (["--batch_size=0"], ["batch_size = 0: expected at least 1"]),
        (["--device=gpu"], ["device = gpu: expected one of auto, cpu, cuda"]),
        (["--dtype=int8"], ["dtype = int8: expected one of auto, float32"]),
        (["--init_from=resume"], ["ckpt.pt does not exist"]),
        (["--init_from=yesterday"], ["expected scratch, resume, or the path of a checkpoint"]),
        (["--eval_only"], ["--init_from=resume"]),
        (["--resume=always"], ["resume = always: expected auto or no"]),
        (["--keep_last=0"], ["keep_last = 0: expected at least 1"]),
        (["--save_interval=-1"], ["save_interval = -1"]),
        (["--base_learning_rate=0"], ["expected a number above 0, at most 1e30"]),
        (["--cooldown_frac=2"], ["from 0 to 1"]),
        (["--grad_clip=-1"], ["grad_clip = -1.0: expected a finite number, 0 (no limit) or more"]),
        (["--weight_decay=-1"], ["weight_decay = -1.0"]),
        (["--arch=gpt2"], ["arch = gpt2: expected one of llama, portable, modded"]),
        (["--optimizer=sgd"], ["optimizer = sgd: expected adamw or muon"]),
        (["--compile=maybe"], ["expected one of auto, True, False"]),
        (["--cooldown_shape=steps"], ["cooldown_shape = steps: expected cosine or linear"]),
        (["--decay_shape=cosine"], ["decay_shape = cosine: expected constant or linear"]),
        (["--activation_checkpointing=all"], ["expected one of none, block, selective"]),
        (["--fp8_head"], ["vocabulary rows = 300, not a multiple of 16", "--vocab_multiple=16"]),
        (["--hidden_lr=0"], ["hidden_lr = 0.0: expected a number above 0"]),
        (["--max_minutes=-1"], ["max_minutes = -1.0: expected a number from 0"]),
        (["--activation=gelu"], ["expected one of swiglu, relu2"]),
        (["--window_pattern=SLX"], ["window_pattern = 'SLX': expected letters S"]),
        (["--value_embeddings=3"], ["value_embeddings = 3: expected 0 to n_layers = 2"]),
        (["--bigram_rows=1"], ["bigram_rows = 1: expected 0 (none), or 2 or more"]),
        (["--beta1=2"], ["beta1 = 2.0: expected at least 0 and less than 1"]),
        (["--head_lr=1e300"], ["at most 1e30"]),
        (["--seed=-1"], ["seed = -1"]),
        (["--dim=2e9"], ["dim = 2000000000: expected at most 65536"]),
        (["--n_layers=1e9"], ["n_layers = 1000000000: expected at most 4096"]),
        (["--max_iters=1e30"], ["expected a number from 1 to 10 ** 12"]),
        (["--max_minutes=1e300"], ["from 0 (no limit) to 1e7"]),
        (["--seed=99999999999999999999999"], ["seed = 99999"]),
    ],
)
def test_bad_settings_are_refused_before_training(practice, tmp_path, args, parts):
    out = tmp_path / "out"
    refused(train(practice, out, *args), *parts)
    assert not out.exists()


def test_an_out_dir_that_is_a_file(practice, tmp_path):
    (tmp_path / "out").write_text("a file")
    done = train(practice, tmp_path / "out", "--max_iters=2")
    refused(done, "out_dir = ", "is a file: use a folder")


def test_shards_of_another_vocabulary(practice, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(practice / "tok300", data / "tok400")
    done = train(data, tmp_path / "out", "--vocab_size=400")
    refused(done, "vocab_size = 400: expected 300, as in the shards of")


def test_a_missing_device_falls_back_to_the_cpu(practice, tmp_path):
    args = ["--device=cuda:7", "--dtype=float16", "--max_iters=2"]
    done = train(practice, tmp_path / "out", *args)
    assert done.returncode == 0, done.stderr
    assert "note: device cuda:7 is not available; using cpu" in done.stdout
    assert "note: dtype float16 is not supported by" in done.stdout


@pytest.mark.parametrize(
    "args, part",
    [
        (["--out_dir=none"], "does not exist"),
        (["--temperature=-1"], "temperature"),
        (["--temperature=nan"], "temperature"),
        (["--seed=-1"], "seed"),
        (["--top_p=2"], "top_p"),
        (["--num_samples=0"], "num_samples = 0: expected at least 1"),
        (["--start=" + "word " * 100], "best.pt is 64: shorten the prompt"),
        (["--start=FILE:none.txt"], "none.txt does not exist; choose another --start=FILE"),
    ],
)
def test_sample_refuses(trained, args, part):
    refused(script("sample.py", f"--out_dir={trained}", *args), part)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("more", [[], ["--activation_checkpointing=selective"]])
def test_compiled_layers_train_the_same(practice, tmp_path, more):
    """Steps are the same with and without compilation; the cache is not in out_dir."""
    losses, cache = [], tmp_path / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    for compile in ("True", "False"):
        out = tmp_path / compile
        args = [f"--compile={compile}", "--max_iters=6", "--log_interval=1", *more]
        done = train(practice, out, *args, env=environment)
        assert done.returncode == 0, done.stderr
        assert ("compiling" in done.stdout) == (compile == "True")
        assert "continuing without" not in done.stdout
        losses.append([e["loss"] for e in read_log(out) if e["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    (compiled,) = cache.glob("*/compiled")
    assert any(compiled.iterdir()) and compiled.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "True" / "compiled").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_run_folder_cannot_run_code(practice, tmp_path):
    """Replace torch.compile's cache in out_dir, where earlier versions kept it, with pickles."""
    out, marker = tmp_path / "my out", tmp_path / "ran"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "first")}
    args = ["--compile=True", "--max_iters=2"]
    assert train(practice, out, *args, env=environment).returncode == 0
    shutil.copytree(tmp_path / "first", out / "compiled")
    payload = pickle.dumps(Payload(marker))
    kept = [p for p in (out / "compiled").rglob("*") if p.is_file() and p.suffix == ""]
    assert kept
    for path in kept:
        path.write_bytes(payload)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    resume = ["--init_from=resume", f"--out_dir={out}", "--compile=True", "--max_iters=4"]
    done = script("train.py", *resume, "--device=cpu", env=environment)
    assert done.returncode == 0 and "continuing without" not in done.stdout, done.stdout
    assert not marker.exists()


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"TORCHINDUCTOR_CACHE_DIR": "mine"}, "mine"),
        ({"XDG_CACHE_HOME": "{tmp}/x"}, "{tmp}/x/modded-llama2-c/compiled"),
        ({"XDG_CACHE_HOME": "relative"}, "{tmp}/home/.cache/modded-llama2-c/compiled"),
        ({"HOME": "{tmp}/my home"}, None),  # torch would not quote it
        ({"HOME": "/dev/null"}, None),
    ],
)
def test_compiled_code_is_kept_in_a_private_folder(tmp_path, monkeypatch, given, expected):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    use_private_compile_cache()
    found = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    if expected is None:
        assert os.path.dirname(found) == str(tmp_path)
    else:
        assert found == expected.format(tmp=tmp_path)
    if found != "mine":
        assert os.stat(found).st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_wrong_compiled_code_is_not_used(practice, tmp_path):
    code = f"""
import sys, model
def compile_wrongly(self):
    def wrong(block):
        return lambda x, *more: 2 * x + block(x, *more)
    self.fast_layers = [wrong(block) for block in self.layers]
model.Transformer.compile_layers = compile_wrongly
sys.argv = {["train.py", *TINY, f"--data_dir={practice}", f"--out_dir={tmp_path / 'wrong'}"]}
sys.argv += ["--compile=True", "--max_iters=2", "--log_interval=1"]
exec(compile(open({str(REPO / "train.py")!r}).read(), {str(REPO / "train.py")!r}, "exec"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert "torch.compile generates wrong gradients here; continuing without it" in done.stdout
    train(practice, tmp_path / "right", "--compile=False", "--max_iters=2", "--log_interval=1")
    wrong, right = (
        [e["loss"] for e in read_log(tmp_path / name) if e["kind"] == "train"]
        for name in ("wrong", "right")
    )
    assert wrong == right


@pytest.mark.parametrize("factor, expected", [(0.3, torch.bfloat16), (0.9, torch.float32)])
def test_auto_picks_the_faster_dtype(monkeypatch, factor, expected):
    """factor: the time of bfloat16 products relative to float32."""
    seconds = {torch.float32: 1.0, torch.bfloat16: factor}
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    monkeypatch.setattr(hardware, "seconds_of_product", lambda x: seconds[x.dtype])
    assert hardware.pick_dtype("auto", torch.device("cpu")) is expected


def test_max_minutes_ends_a_run_and_its_schedule(practice, tmp_path):
    """After 0.03 minutes the run stops, its rates have fallen, and it counts as finished."""
    out = tmp_path / "out"
    args = ["--max_minutes=0.03", "--log_interval=1", "--warmup_iters=0", "--resume=auto"]
    done = train(practice, out, *args)
    assert done.returncode == 0, done.stderr
    log = read_log(out)
    assert log[-1]["reason"] == "finished" and 1.8 <= log[-1]["train_s"] < 5
    rates = [e["lr"] for e in log if e["kind"] == "train"]
    assert rates[0] == 0.02 and rates[-1] < 0.005
    assert log[-2]["kind"] == "eval" and log[-2]["step"] == log[-1]["step"]
    again = train(practice, out, *args)
    assert again.returncode == 0 and "is complete" in again.stdout
