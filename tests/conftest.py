"""Shared by the tests: the repository's path, compiled engines, small corpora and models."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share the cores, and their models are tiny

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bpe import PATTERNS, BPETokenizer, train_bpe
from model import ModelArgs, Transformer
from text.synth import make_stories
from tokenizer import open_tokenizer, train_sentencepiece

SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


# a generous timeout: on a busy machine everything is slow
PATIENCE_S = 600


def wait_until(condition, message="the condition is still false"):
    """Return once condition() is true; fail after PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.02)


class Zygote:
    """Runs scripts in forks of tests/zygote.py, which each pytest process starts once."""

    def __init__(self):
        self.process = None

    def run(self, command, cwd, env):
        if self.process is None:
            args = [sys.executable, str(REPO / "tests" / "zygote.py")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(args, env=env, **pipes)
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            request = {"argv": command[1:], "cwd": os.fspath(cwd or os.getcwd()), "env": env}
            request |= {"out": out.name, "err": err.name}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            texts = [file.read().decode() for file in (out, err)]
        return subprocess.CompletedProcess(command, status, *texts)


zygote = Zygote()


def script(name, *args, cwd=None, env=None, **options):
    """
    Run one of the repository's scripts ("train.py") or modules ("bench.train") as a user would;
    return the CompletedProcess.
    """
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch may have set it in this process
    program = [str(REPO / name)]
    if not program[0].endswith(".py"):
        program, cwd = ["-m", name], cwd or REPO
    command = [sys.executable, *program, *map(str, args)]
    if sys.platform == "linux" and not options:
        return zygote.run(command, cwd, dict(env or os.environ))
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, **options)


def unwrapped(help_text):
    """Return the text of --help with each setting's comment in one line with the setting."""
    return re.sub(r"\n {3,}(?=\S)", " ", help_text)


def refused(done, *parts):
    """Assert that a script ended with status 1 and an error message that has all of `parts`."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    for part in parts:
        assert part in last, last


# for make test-arm: a cross compiler, and an emulator for its programs
ENGINE_CC = os.environ.get("ENGINE_CC", "cc")
ENGINE_FLAGS = os.environ.get("ENGINE_FLAGS", "").split()
ENGINE_EMULATOR = os.environ.get("ENGINE_EMULATOR", "").split()
STRICT = "-std=c11 -ffp-contract=off -Wall -Wextra -Wno-psabi -Werror".split()


def compile_c(source, out, *flags, cc=ENGINE_CC):
    command = [cc, *STRICT, *flags, *ENGINE_FLAGS, str(source), "-o", str(out), "-lm"]
    subprocess.run(command, check=True)
    return out


def supports(flag, cc="cc"):
    command = [cc, flag, "-x", "c", "-", "-o", os.devnull]
    return not subprocess.run(
        command, input=b"int main(void) { return 0; }", capture_output=True
    ).returncode


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """The engine and the harness, fast and with sanitizers, shared by all pytest processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    flags = {"fast": ["-O3"], "checked": ["-O1"] if ENGINE_EMULATOR else SANITIZE}
    sources = {"run": "run.c", "harness": "tests/harness.c"}
    paths = {(name, kind): folder / f"{name}_{kind}" for name in sources for kind in flags}

    def build(name, kind):
        compile_c(REPO / sources[name], paths[name, kind], *flags[kind])

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [key for key, path in paths.items() if not path.exists()]
        with ThreadPoolExecutor(2) as pool:  # threads, because each compiler is a process
            list(pool.map(lambda key: build(*key), missing))
    return paths


@pytest.fixture(scope="session")
def run(builds):
    """Run the engine with sanitizers on; return the CompletedProcess, with output as bytes."""

    def call(*args, **options):
        command = [builds["run", "checked"], *map(str, args)]
        return subprocess.run(command, capture_output=True, timeout=PATIENCE_S, **options)

    return call


def logits_of(harness, path, tokens, vocab_size, batch=1, kernels=""):
    """Return the engine's logits (tokens, vocab_size), computed `batch` tokens at a time."""
    command = [*ENGINE_EMULATOR, harness, "logits", str(batch), path, *map(str, tokens)]
    environment = {**os.environ, "RUN_KERNELS": kernels}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    return np.frombuffer(done.stdout, np.float32).reshape(len(tokens), vocab_size)


@pytest.fixture(scope="session")
def stories():
    return [item["story"] for item in make_stories(3000, seed=1)]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory, stories):
    """
    Tokenizers of the practice corpus, each with its .bin file: {vocabulary size: SentencePiece}
    (without byte fallback for 105) and {pattern name: byte-level BPE of 600 tokens}.
    """
    folder = tmp_path_factory.mktemp("tokenizers")
    opened = {}
    for size in (105, 512, 1500):
        path = folder / f"tok{size}.model"
        path.write_bytes(train_sentencepiece(stories, size)[0])
        opened[size] = open_tokenizer(path)
        opened[size].export(folder / f"tok{size}.bin")
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories[:1000]), encoding="utf-8")
    for name in PATTERNS:
        special = ["<|endoftext|>", "<|end|>"]
        vocab, merges = train_bpe(folder / "stories.txt", 600, special, pattern_name=name)
        BPETokenizer(vocab, merges, special, name).save(folder / f"{name}.model")
        opened[name] = open_tokenizer(folder / f"{name}.model")
        opened[name].export(folder / f"{name}.bin")
    return opened


def bin_of(tokenizer):
    return Path(tokenizer.model_path).with_suffix(".bin")


# All options of the architecture at once, with a vocabulary that is padded in memory
EVERYTHING = {
    "n_layers": 5,
    "n_kv_heads": 2,
    "tie_embeddings": False,
    "vocab_multiple": 64,
    "norm_eps": 1e-6,
    "rope_theta": 20000.0,
    "qk_norm": True,
    "norm_gains": False,
    "activation": "relu2",
    "logit_softcap": 15.0,
    "sliding_window": 5,
    "window_pattern": "SSL",
    "embedding_norm": True,
    "residual_scalars": True,
    "value_embeddings": 3,
    "bigram_rows": 64,
    "smear": True,
    "embedding_conv": 4,
    "key_conv": 3,
    "orders": True,
    "separate_documents": True,
}


def random_model(seed=0, **options):
    """
    Return a random model with logits about as large as those of a trained one. Unless bos_id is
    given, no token starts a document.
    """
    sizes = {"dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 105, "max_seq_len": 32}
    sizes["bos_id"] = 1 << 24
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**{**sizes, **options})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.uniform_(0.5, 1.5)
            elif name.endswith("_conv"):
                p.normal_(0.0, 0.3)
            else:
                tied = model.args.tie_embeddings  # a tied table is also the output head
                embedding_std = 0.3 if tied else 1.0
                p.normal_(0.0, embedding_std if "embed" in name else 1.5 * p.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def practice(tmp_path_factory):
    """A data folder made by tinystories.py: practice corpus, vocabulary of 300, shards."""
    folder = tmp_path_factory.mktemp("practice")
    flags = [f"--data_dir={folder}", "--vocab_size=300"]
    for args in (["synth", "--n_stories=2000"], ["train_vocab"], ["pretokenize"]):
        done = script("tinystories.py", *args, *flags)
        assert done.returncode == 0, done.stderr
    return folder


TINY = (
    "--vocab_size=300 --dim=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --max_seq_len=64 "
    "--batch_size=8 --eval_interval=20 --eval_iters=4 --log_interval=5 --warmup_iters=5 "
    "--head_lr=0.012 --dtype=float32 --device=cpu --bigram_rows=64 --picture=False"
).split()


def train(data_dir, out_dir, *args, **options):
    flags = [*TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *args]
    return script("train.py", *flags, **options)


def read_log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, practice):
    """The out_dir of a tiny run of 60 steps on the practice corpus."""
    out = tmp_path_factory.mktemp("trained") / "out"
    done = train(practice, out, "--max_iters=60")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def real_data():
    """The folder $REAL_DATA with real stories and a real model; skip the test if it is not set."""
    folder = os.environ.get("REAL_DATA")
    if not folder:
        pytest.skip("REAL_DATA is not set to a folder of real stories and a real model")
    return Path(folder)


def compilers():
    return [cc for cc in ("gcc", "clang") if shutil.which(cc)]
