"""run.c computes PyTorch's logits and text, and no input crashes it."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ENGINE_EMULATOR,
    EVERYTHING,
    PATIENCE_S,
    REPO,
    STRICT,
    bin_of,
    compile_c,
    compilers,
    logits_of,
    random_model,
    supports,
)

from bpe import BPETokenizer, train_bpe
from formats.modelbin import (
    DTYPES,
    MAGIC,
    V0_HEADER,
    V3_HEADER,
    V3_OPTIONS,
    V3_SIZES,
    V3_STRUCT,
    export_model,
    quantized,
    read_bin,
    values_of,
)
from model import ARCHS
from tokenizer import byte_level_c_file, fingerprint_of, open_tokenizer, train_sentencepiece

PARITY = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "grouped": {"n_kv_heads": 2},
    "one kv head": {"n_kv_heads": 1, "tie_embeddings": False},
    "odd hidden": {"hidden_dim": 77, "n_layers": 3},
    "odd vocabulary": {"vocab_size": 301, "hidden_dim": 130, "n_kv_heads": 2},
    "head_dim 2": {"dim": 10, "n_heads": 5, "hidden_dim": 3},
    "wide": {"dim": 260, "n_heads": 10, "n_kv_heads": 5, "hidden_dim": 352, "max_seq_len": 24},
    "padded": {"vocab_multiple": 64, "tie_embeddings": False},
    # ---- version 3; the context is 32, room for several windows
    "norm_eps": {"norm_eps": 0.1},
    "rope_theta": {"rope_theta": 500000.0},
    "qk_norm": {"qk_norm": True, "n_kv_heads": 2},
    "no gains": {"norm_gains": False},
    "qk_norm, no gains": {"qk_norm": True, "norm_gains": False},
    "relu2": {"activation": "relu2", "hidden_dim": 77},
    "softcap": {"logit_softcap": 2.0},
    "window": {"sliding_window": 5, "window_pattern": "SSSL", "n_layers": 5},
    "window 1": {"sliding_window": 1, "window_pattern": "LS"},
    "window of the whole context": {"sliding_window": 32, "window_pattern": "S", "qk_norm": True},
    "embedding_norm": {"embedding_norm": True},
    "residual_scalars": {"residual_scalars": True, "n_layers": 3},
    "value_embeddings": {"value_embeddings": 2, "n_layers": 3, "n_kv_heads": 2},
    "bigram": {"bigram_rows": 64},
    "bigram of 2 rows": {"bigram_rows": 2, "vocab_size": 301},
    "smear": {"smear": True},
    "smear, embedding_norm": {"smear": True, "embedding_norm": True, "tie_embeddings": False},
    "embedding_conv": {"embedding_conv": 4, "bigram_rows": 64, "smear": True},
    "key_conv": {"key_conv": 3, "n_layers": 3, "n_kv_heads": 2},
    "convolutions": {"embedding_conv": 16, "key_conv": 2, "qk_norm": True, "sliding_window": 5},
    "portable": ARCHS["portable"],
    "modded": {**ARCHS["modded"], "bigram_rows": 500, "n_kv_heads": 2, "vocab_multiple": 64},
    "everything": EVERYTHING,
    "everything, tied, one kv head": {**EVERYTHING, "tie_embeddings": True, "n_kv_heads": 1},
    "everything, with gains": {**EVERYTHING, "norm_gains": True, "activation": "swiglu"},
}


@pytest.mark.parametrize("kind", ["fast", "checked"])
@pytest.mark.parametrize("name", PARITY)
def test_logits_agree_with_pytorch(builds, tmp_path, name, kind):
    model = random_model(**PARITY[name])
    tokens = torch.randint(0, model.args.vocab_size, (model.args.max_seq_len,))
    path = tmp_path / "model.bin"
    export_model(model, path)
    logits = logits_of(builds["harness", kind], path, tokens.tolist(), model.args.vocab_size)
    with torch.no_grad():
        expected = model(tokens[None])[0].numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() <= 1e-4


SHAPES = {
    "plain": {"n_kv_heads": 2},
    "odd": {"dim": 72, "n_heads": 3, "hidden_dim": 352, "vocab_size": 301},
    "grouped": {"dim": 90, "n_heads": 15, "n_kv_heads": 5, "hidden_dim": 77, "n_layers": 3},
    "everything": EVERYTHING,
    "modded": {**ARCHS["modded"], "bigram_rows": 500, "dim": 128, "n_heads": 2},
}


def stable_model(**options):
    """Return a random model that, like a trained one, does not magnify rounding a hundredfold."""
    model = random_model(**options)
    with torch.no_grad():
        for layer in model.layers:
            for p in layer.parameters():
                p.mul_(0.5 if p.dim() == 2 else 1.0)
    return model


def round_trip(matrix, dtype):
    """Return the values of a matrix after it is stored in a dtype."""
    if dtype == "bf16":
        return matrix.bfloat16().float()
    codes = DTYPES[dtype]
    return values_of(*quantized(matrix, codes), codes)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_every_dtype_agree_with_pytorch(builds, tmp_path, name, dtype):
    model = stable_model(**SHAPES[name])
    tokens = torch.randint(2, model.args.vocab_size, (model.args.max_seq_len,))  # one document
    path = tmp_path / "model.bin"
    export_model(model, path, dtype=dtype)
    logits = logits_of(builds["harness", "checked"], path, tokens.tolist(), model.args.vocab_size)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and len(p) > 1 and not name.endswith("_conv"):
                p.copy_(round_trip(p, dtype))
        expected = model(tokens[None])[0].numpy()
        assert np.array_equal(read_bin(path).eval()(tokens[None])[0].numpy(), expected)
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() <= (1e-4 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_bits_are_the_same_for_all_kernels_and_batches(builds, tmp_path, name, dtype):
    model = random_model(**SHAPES[name])
    tokens = torch.randint(0, model.args.vocab_size, (model.args.max_seq_len,)).tolist()
    path, vocab_size = tmp_path / "model.bin", model.args.vocab_size
    export_model(model, path, dtype=dtype)
    expected = logits_of(builds["harness", "fast"], path, tokens, vocab_size)
    # a machine without these kernels uses its fastest ones
    other = [("portable", 1), ("portable", 7), ("AVX2", 1), ("AVX2", 32)]
    for kernels, batch in other + [("", n) for n in (2, 3, 9, 15)]:  # all tile sizes
        logits = logits_of(builds["harness", "fast"], path, tokens, vocab_size, batch, kernels)
        assert (logits == expected).all(), (kernels, batch)
    if ENGINE_EMULATOR:
        native = tmp_path / "harness"
        subprocess.run(
            ["cc", *STRICT, "-O2", REPO / "tests/harness.c", "-o", native, "-lm"], check=True
        )
        command = [native, "logits", "5", path, *map(str, tokens)]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stdout == expected.tobytes()


def llama2c_file(model, version):
    """Return the bytes of llama2.c's version 1 or 2; version 2 rounds the model's weights too."""
    args, state = model.args, model.state_dict()
    layers = range(args.n_layers)
    header = struct.pack("<Ii7i", MAGIC, version, *(getattr(args, name) for name in V0_HEADER))
    header += struct.pack("<Bi", args.tie_embeddings, 16)
    parts = [header.ljust(256, b"\0")]
    norms = [f"layers.{i}.{kind}_norm.weight" for kind in ("attention", "ffn") for i in layers]
    names = [f"attention.w{x}" for x in "qkvo"] + [f"feed_forward.w{x}" for x in "123"]
    matrices = [f"layers.{i}.{name}.weight" for name in names for i in layers]
    matrices = ["tok_embeddings.weight", *matrices]
    matrices += [] if args.tie_embeddings else ["output.weight"]
    parts += [state[name].numpy().tobytes() for name in [*norms, "norm.weight"]]
    for name in matrices:
        w = state[name]
        if version == 1:
            parts.append(w.numpy().tobytes())
            continue
        scales = w.view(-1, 16).abs().amax(1, keepdim=True) / 127
        q = (w.view(-1, 16) / scales).round()
        parts += [q.to(torch.int8).numpy().tobytes(), scales.numpy().tobytes()]
        w.copy_((q * scales).view(w.shape))
    return b"".join(parts)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e-42])
def test_bits_are_the_same_for_nan_infinite_and_denormal_weights(builds, tmp_path, wrong):
    model = random_model(vocab_size=105)
    with torch.no_grad():
        model.layers[0].attention_norm.weight[:2] = wrong
        if wrong < 1:
            model.layers[0].attention_norm.weight[:] = wrong
    export_model(model, tmp_path / "model.bin", dtype="int8")
    results = [
        logits_of(builds["harness", kind], tmp_path / "model.bin", [1, 5, 7], 105, 1, kernels)
        for kind, kernels in (("checked", "portable"), ("fast", "AVX2"), ("fast", ""))
    ]
    assert all(np.array_equal(logits, results[0], equal_nan=True) for logits in results)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_versions_1_and_2_of_llama2c_are_read(builds, tmp_path, version, tied):
    model = stable_model(n_kv_heads=2, hidden_dim=80, tie_embeddings=tied)
    data, path = llama2c_file(model, version), tmp_path / "model.bin"
    path.write_bytes(data)
    tokens = torch.randint(0, 105, (32,))
    logits = logits_of(builds["harness", "checked"], path, tokens.tolist(), 105)
    with torch.no_grad():
        expected = model(tokens[None])[0].numpy()
        assert np.array_equal(read_bin(path).eval()(tokens[None])[0].numpy(), expected)
    assert np.abs(logits - expected).max() <= (1e-4 if version == 1 else 1e-3)
    harness = builds["harness", "checked"]
    for size in (255, 256, len(data) // 2, len(data) - 1, len(data) + 1):
        path.write_bytes((data + b"\0")[:size])
        done = subprocess.run([harness, "logits", "1", path, "1"], capture_output=True)
        refused_by(done, "header" if size < 256 else f"has {size} bytes")
    if version == 2:
        for group in (0, -16, 8, 64):
            path.write_bytes(data[:37] + struct.pack("<i", group) + data[41:])
            done = subprocess.run([harness, "logits", "1", path, "1"], capture_output=True)
            refused_by(done, f"groups of {group} weights")


@pytest.fixture
def small(tmp_path, tokenizers):
    """A random model of 105 pieces with its tokenizer beside it, as train.py leaves them."""
    export_model(random_model(tie_embeddings=False), tmp_path / "model.bin")
    shutil.copy(bin_of(tokenizers[105]), tmp_path / "tokenizer.bin")
    return tmp_path / "model.bin"


PLAIN, ALL = {"tie_embeddings": False}, {**EVERYTHING, "orders": False}


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("size", [105, 512])
def test_greedy_text_matches_pytorch(run, tmp_path, tokenizers, size, options):
    tokenizer = tokenizers[size]
    model = random_model(seed=size, vocab_size=size, max_seq_len=96, **options)
    export_model(model, tmp_path / "model.bin")
    for prompt in ("", "Once upon a time", "Zoë 😀"):
        ids = tokenizer.encode(prompt)
        text = [*ids, *model.generate(ids, 60, temperature=0, stop=(1, 2))]
        assert len(set(text)) > 3
        n = str(len(ids) - 1 + 60)
        args = ["-z", bin_of(tokenizer), "-t", "0", "-n", n, "-i", prompt]
        done = run(tmp_path / "model.bin", *args)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode() == tokenizer.decode(text) + "\n"


def test_the_story_goes_to_stdout_and_everything_else_to_stderr(run, small):
    done = run(small, "-s", "7", "-n", "20")
    assert done.returncode == 0
    assert b"seed: 7" in done.stderr and b"tok/s" in done.stderr
    assert b"seed" not in done.stdout and done.stdout.endswith(b"\n")


def test_the_seed_determines_the_story(run, small):
    texts = [run(small, "-s", s, "-n", "30").stdout for s in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    assert run(small, "-n", "8", "-t", "0").stdout == run(small, "-n", "8", "-t", "0").stdout


def test_n_includes_the_prompt_and_0_means_the_whole_context(run, tmp_path, tokenizers):
    tokenizer = tokenizers[512]
    model = random_model(vocab_size=512, tie_embeddings=False)
    export_model(model, tmp_path / "model.bin")
    prompt = tokenizer.encode("Once upon")
    for n in (len(prompt) + 3, 20, 32, 0):
        count = (n or 32) + 1 - len(prompt)  # the token after the last position is printed too
        text = [*prompt, *model.generate(prompt, count, temperature=0, stop=(1, 2))]
        assert len(text) == (n or 32) + 1
        args = ["-z", bin_of(tokenizer), "-t", "0", "-n", str(n), "-i", "Once upon"]
        done = run(tmp_path / "model.bin", *args)
        assert done.stdout.decode() == tokenizer.decode(text) + "\n"


def test_a_note_reports_a_story_that_the_context_cuts(run, small, tmp_path):
    """It is printed once, and only if -n asked for more."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat.")
    lines = run(small, "-s", "0", "-n", "33", "-b", "30", "--json").stdout.splitlines()
    lengths = [json.loads(line)["tokens"] for line in lines]
    cut, ended = lengths.index(32), lengths.index(min(filter(None, lengths)))
    assert lengths[ended] < 31
    for n, b in ((33, 1), (1000, 1), (33, 30)):
        done = run(small, "-s", cut, "-n", n, "-b", b)
        story = "the story" if b == 1 else "a story"
        note = f"note: {story} stops at the model's context of 32 tokens\n"
        assert done.returncode == 0 and note in done.stderr.decode()
        assert done.stderr.count(b"note") == 1 and b"note" not in done.stdout
    without = [["-s", ended, "-n", "33"], ["-s", cut, "-n", "33", "--json"], ["-s", cut]]
    without += [["-s", cut, "-n", n] for n in (0, 31, 32)]
    for args in [*without, ["--bench", "-n", "33"], ["-m", "eval", "-i", text, "-n", "33"]]:
        done = run(small, *args)
        assert done.returncode == 0 and b"note" not in done.stderr, args


BETWEEN = b"\n---\n\n"  # between stories, as in sample.py


def test_stories_generated_at_once_match_those_generated_alone(run, small):
    alone = [run(small, "-s", seed, "-n", "30").stdout for seed in range(7, 12)]
    together = run(small, "-s", "7", "-n", "30", "-b", "5")
    assert together.returncode == 0 and together.stdout == BETWEEN.join(alone)
    lines = run(small, "-s", "7", "-n", "30", "-b", "5", "--json").stdout.decode().splitlines()
    stories = [json.loads(line) for line in lines]
    assert [story["seed"] for story in stories] == list(range(7, 12))
    assert [story["text"] + "\n" for story in stories] == [text.decode() for text in alone]
    assert max(story["tokens"] for story in stories) == 30


def test_stories_at_once_share_what_convolutions_read_of_the_prompt(run, small):
    options = {"embedding_conv": 4, "key_conv": 4, "bigram_rows": 64, "n_kv_heads": 2}
    export_model(random_model(tie_embeddings=False, **options), small)
    args = ("-n", "25", "-i", "Once upon a time")
    alone = [run(small, "-s", seed, *args).stdout for seed in range(3)]
    together = run(small, "-s", "0", "-b", "3", *args)
    assert together.returncode == 0 and together.stdout == BETWEEN.join(alone)


@pytest.mark.parametrize("args", [[], ["--fast"]])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_stories_at_once_match_those_alone(run, small, dtype, args):
    export_model(stable_model(tie_embeddings=False), small, dtype=dtype)
    alone = [run(small, "-s", seed, "-n", "20", *args).stdout for seed in range(15)]
    for n in (2, 7, 15):
        together = run(small, "-s", "0", "-n", "20", "-b", n, *args)
        assert together.returncode == 0 and together.stdout == BETWEEN.join(alone[:n])


def loss_of(done):
    """Return the loss that -m eval printed."""
    assert done.returncode == 0, done.stderr
    return float(re.search(r"loss: ([0-9.]+)", done.stdout.decode())[1])


def test_a_bf16_cache_hardly_changes_the_loss(run, small, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. <|endoftext|> Tim and Tom.\n")
    choices = ([], ["--kv", "fp32"], ["--kv", "bf16"])
    losses = [loss_of(run(small, "-m", "eval", "-i", text, *args)) for args in choices]
    assert losses[0] == losses[1] and 0 < abs(losses[2] - losses[0]) < 0.01 * losses[0]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_fast_products_hardly_change_the_loss(run, small, tmp_path, dtype):
    export_model(stable_model(tie_embeddings=False), small, dtype=dtype)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. <|endoftext|> Tim and Tom.\n")
    choices = ([], ["--fast"])
    exact, fast = (loss_of(run(small, "-m", "eval", "-i", text, *args)) for args in choices)
    assert 0 < abs(exact - fast) < 0.005 * exact


SEPARATE = {**ARCHS["modded"], "bigram_rows": 500, "sliding_window": 16, "bos_id": 1}


@pytest.mark.parametrize("dtype, options", [("fp32", {}), ("int8", {}), ("fp32", SEPARATE)])
def test_eval_matches_pytorch(run, tmp_path, tokenizers, stories, dtype, options):
    tokenizer, texts = tokenizers[512], [text.strip() for text in stories[:5]]
    model = random_model(vocab_size=512, max_seq_len=64, **options)
    export_model(model, tmp_path / "model.bin", dtype=dtype)
    (tmp_path / "text.txt").write_text(" <|endoftext|>\n".join(texts))
    args = ["-z", bin_of(tokenizer), "-m", "eval", "-i", tmp_path / "text.txt"]
    done = run(tmp_path / "model.bin", *args)
    assert done.returncode == 0, done.stderr
    tokens = torch.tensor([id for text in texts for id in tokenizer.encode(text)])
    n_bytes, total = sum(len(text.encode()) for text in texts), 0.0
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and dtype != "fp32":
                p.copy_(round_trip(p, dtype))
        for start in range(0, len(tokens) - 1, 64):
            window = tokens[start : start + 65]
            logits = model(window[None, :-1])[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    loss = total / (len(tokens) - 1)
    bits = loss / math.log(2) * len(tokens) / n_bytes
    assert f"5 documents, {n_bytes} bytes, {len(tokens)} tokens" in done.stdout.decode()
    assert abs(float(done.stdout.split()[-1]) - bits) < 2e-4
    result = json.loads(run(tmp_path / "model.bin", *args, "--json").stdout)
    assert abs(result["bits_per_byte"] - bits) < 2e-4 and result["documents"] == 5
    refused_by(run(tmp_path / "model.bin", *args[:4]), "-i FILE is missing", "needs a text file")


def test_eval_reads_line_ends_as_training_does(run, small, tmp_path):
    """Training turns CRLF and CR into newlines."""
    text = "Once upon a time\nthere was a cat.\n<|endoftext|>\n\nIt sat\n\non a mat.\n"
    results = []
    for ends in ("\n", "\r\n", "\r"):
        (tmp_path / "text.txt").write_bytes(text.replace("\n", ends).encode())
        results.append(run(small, "-m", "eval", "-i", tmp_path / "text.txt").stdout)
    assert results[0] == results[1] == results[2] and b"bits per byte" in results[0]


def test_a_note_reports_a_story_that_ends_at_once(run, tokenizers, tmp_path):
    model = random_model(vocab_size=512, tie_embeddings=False)
    with torch.no_grad():  # one of BOS and EOS has the largest logit, and both end a story
        model.output.weight.zero_()
        model.output.weight[tokenizers[512].bos_id] = 1.0
        model.output.weight[tokenizers[512].eos_id] = -1.0
    export_model(model, tmp_path / "model.bin")
    args = [tmp_path / "model.bin", "-z", bin_of(tokenizers[512]), "-t", "0", "-i", "Once"]
    done = run(*args)
    assert done.returncode == 0 and done.stdout == b"Once\n"
    assert b"note: the model ended the story at once; try another seed" in done.stderr
    assert b"note" not in run(*args, "--json").stderr


def test_bench_prints_its_figures(run, small):
    done = run(small, "--bench")
    assert done.returncode == 0, done.stderr
    for name in ("kernels: ", "matrices: ", "prefill: ", "decode: ", "memory: "):
        assert name in done.stdout.decode()


@pytest.mark.slow
def test_the_library_generates_the_engines_story(builds, small, tmp_path):
    library = compile_c(
        REPO / "lib" / "libllama2.c", tmp_path / "lib.so", "-O1", "-shared", "-fPIC"
    )
    args = ["-s", "1", "-t", "0.8", "-n", "0", "-i", "Once upon"]
    expected = subprocess.run([builds["run", "fast"], small, *args], capture_output=True).stdout
    code = f"""
import ctypes, os, sys
sys.path.insert(0, {str(REPO / "examples")!r})
from llama2 import Llama, Sampling
library = {str(library)!r}
llama = Llama({str(small)!r}, library=library)
assert llama.decode(llama.encode("Tim, a cat")) == "Tim, a cat"
logits = llama.forward([1, 5, 7])
assert llama.forward([7], 2) == logits and len(logits) == llama.vocab_size == 105
no_tokenizer = "Llama({str(small)!r}, {str(small)!r}, library=library)"
no_model = "Llama('none', library=library)"
for wrong in ("llama.forward([105])", "llama.forward([1], 9)", no_tokenizer, no_model):
    try:
        eval(wrong)
        sys.exit("not refused")
    except ValueError as e:
        print(e, file=sys.stderr)
if os.path.exists("/proc/self/maps"):  # files are copied, so that they may change
    assert open("/proc/self/maps").read().count({str(small)!r}) == 0
print(llama.generate("Once upon", seed=1, temperature=0.8))
sampling = ctypes.byref(Sampling(1.0, 0.9, 0.0, 1.0, 0))
llama.forward([1, 5, 7])
assert llama.c.llama_sample(llama.llama, sampling) >= 0
assert llama.c.llama_sample(llama.llama, sampling) == -1  # its logits are used up
llama.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"none does not exist; make one with train.py or export.py" in done.stderr
    assert done.stdout == expected


LIBRARY_USE = """
import ctypes, os, sys, threading
sys.path.insert(0, EXAMPLES)
from llama2 import Llama
llama = Llama(MODEL, library=LIBRARY, n_threads=2)


def outcome(call, *args):
    try:
        return call(*args)
    except ValueError as e:
        return str(e)


def in_thread(call, *args):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(outcome(call, *args)))
    thread.start()
    thread.join()
    return outcomes[0]
"""


@pytest.fixture
def library_script(small, tmp_path):
    """Run Python code in which `llama` is the small model, loaded by the library."""
    flags = ["-O1", "-shared", "-fPIC"] + ["-fopenmp"] * supports("-fopenmp")
    library = compile_c(REPO / "lib" / "libllama2.c", tmp_path / "lib.so", *flags)
    names = {"EXAMPLES": REPO / "examples", "MODEL": small, "LIBRARY": library}

    def call(code):
        start = "".join(f"{name} = {str(path)!r}\n" for name, path in names.items())
        command = [sys.executable, "-c", start + LIBRARY_USE + code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.mark.slow
def test_a_library_model_belongs_to_one_thread(library_script):
    """A call returns the right result or fails, whatever other threads do with the model."""
    library_script("""
import random
expected = {n: llama.forward([1, *range(5, 5 + n)]) for n in range(1, 9)}
llama.hand_over()
wrong, refusals, right = [], [], []


def use():
    for _ in range(400):
        n = random.randrange(1, 9)
        result = outcome(llama.forward, [1, *range(5, 5 + n)])
        kind = refusals if isinstance(result, str) else right if result == expected[n] else wrong
        kind.append(result)


threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong and len(right) >= 400 and len(right) + len(refusals) == 800
assert all("another thread" in text for text in refusals)
""")
    library_script("""
llama.forward([1, 5])
for call, arg in [(llama.forward, [7]), (llama.encode, "a"), (llama.decode, [7])]:
    assert "belongs to another thread" in in_thread(call, arg)
assert llama.vocab_size == in_thread(llama.c.llama_vocab_size, llama.llama) == 105
llama.hand_over()
logits = in_thread(llama.forward, [7], 2)  # continues where this thread stopped
other = Llama(MODEL, library=LIBRARY)
assert logits == other.forward([1, 5, 7])
""")


@pytest.mark.slow
def test_the_library_refuses_the_tokenizer_of_another_model(library_script, confusable, tmp_path):
    (tmp_path / "other.bin").write_bytes(confusable[1]["sp"])
    library_script(f"""
model = {str(confusable[0] / "sp" / "model.bin")!r}
other = {str(tmp_path / "other.bin")!r}
Llama(model, library=LIBRARY)
refusal = outcome(lambda: Llama(model, other, library=LIBRARY))
assert f"was trained with a tokenizer other than {{other}}" in refusal
""")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_library_refuses_forks_and_freed_models(library_script):
    library_script("""
llama.forward([1, *range(5, 25)])
child = os.fork()
if not child:
    texts = [outcome(llama.forward, [1]), outcome(llama.close)]
    texts.append(outcome(lambda: Llama(MODEL, library=LIBRARY)))
    os._exit(not all("was forked after a model was loaded" in text for text in texts))
assert os.waitpid(child, 0)[1] == 0
llama.close()
for call in (llama.close, lambda: llama.forward([1]), lambda: llama.encode("a")):
    assert outcome(call) == "this model was freed or never loaded"
assert llama.c.llama_vocab_size(llama.llama) == -1 and llama.c.llama_free(None) == 0
""")


@pytest.mark.slow
def test_files_may_change_after_the_library_has_loaded_them(library_script):
    library_script("""
logits = llama.forward([1, 5, 7])
os.truncate(MODEL, 0)
assert llama.forward([1, 5, 7]) == logits
""")


def with_header_of(size, data):
    """Return a version 3 file as earlier exports wrote it, with a header of `size` bytes."""
    n_layers, whole = struct.unpack_from("<i", data, offset_of("n_layers")[0])[0], V3_SIZES[-1]
    windows = data[whole : whole + 4 * n_layers]
    first = -(-(whole + 4 * n_layers) // 64) * 64  # of the tensors, in both
    assert first == -(-(size + 4 * n_layers) // 64) * 64
    return (changed(data[:size], header_size=size) + windows).ljust(first, b"\0") + data[first:]


@pytest.fixture(scope="session")
def confusable(tmp_path_factory, tokenizers, stories):
    """(folder with a model for each kind of tokenizer, {kind: another tokenizer of its size})"""
    folder = tmp_path_factory.mktemp("confusable")
    files = {"sp": bin_of(tokenizers[512]).read_bytes()}
    others = {"sp": open_tokenizer("x", train_sentencepiece(stories[500:900], 512)[0]).c_file()}
    for files_of, text in ((files, stories[:50]), (others, stories[50:100])):
        path = folder / "text.txt"
        path.write_text("".join(text))
        bpe = BPETokenizer(*train_bpe(path, 300, ["<|endoftext|>"]), ["<|endoftext|>"])
        files_of["bpe"] = byte_level_c_file(bpe, 299, 299)
    for kind, c_file in files.items():
        (folder / kind).mkdir()
        (folder / kind / "tokenizer.bin").write_bytes(c_file)
        model = random_model(vocab_size=512 if kind == "sp" else 300, qk_norm=True)
        export_model(model, folder / kind / "model.bin", fingerprint=fingerprint_of(c_file))
    return folder, others


@pytest.mark.parametrize("kind", ["sp", "bpe"])
def test_a_tokenizer_of_another_model_is_refused(run, confusable, tmp_path, kind):
    folder, others = confusable
    path, other = folder / kind / "model.bin", tmp_path / "other.bin"
    other.write_bytes(others[kind])
    args = ["-n", "9", "-s", "1"]
    done = run(path, *args)
    assert done.returncode == 0, done.stderr
    refusal = f"was trained with a tokenizer other than {other}"
    refused_by(run(path, *args, "-z", other), refusal, "(-z)")
    earlier = tmp_path / "earlier.bin"
    earlier.write_bytes(with_header_of(80, path.read_bytes()))
    assert run(earlier, *args, "-z", folder / kind / "tokenizer.bin").stdout == done.stdout
    assert run(earlier, *args, "-z", other).returncode == 0


def test_the_fingerprint_ignores_character_classes(run, confusable, tmp_path):
    """They change with Unicode's version; the vocabulary does not."""
    path = confusable[0] / "bpe" / "model.bin"
    data = bytearray(path.with_name("tokenizer.bin").read_bytes())
    struct.pack_into("<I", data, 32 + 12 + 8, 3)  # the class of the second range
    (tmp_path / "t.bin").write_bytes(data)
    done = run(path, "-n", "9", "-z", tmp_path / "t.bin")
    assert done.returncode == 0, done.stderr


def test_a_context_that_cannot_fit_in_memory_is_refused(run, tmp_path, tokenizers):
    sizes = {"dim": 256, "n_layers": 8, "max_seq_len": 1 << 24, "vocab_size": 105}
    export_model(random_model(**sizes), tmp_path / "model.bin", 3)
    args = [tmp_path / "model.bin", "-z", bin_of(tokenizers[105])]
    refused_by(run(*args, "-n", "0", "-b", "9"), "keys and values of 16777216 positions", "(-b)")
    assert run(*args, "-n", "9").returncode == 0


@pytest.mark.slow
def test_sampling_follows_the_probabilities(builds):
    logits = [3.0, 1.0, 2.0, -1.0, 0.0]
    weights = np.exp(logits) / np.exp(logits).sum()

    def drawn(temperature, top_p, n=20000, top_k=0, min_p=0, penalty=1, logits=logits):
        command = [builds["harness", "checked"], "draw", temperature, top_p, top_k, min_p, penalty]
        command += ["5", n, *logits]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        return Counter(map(int, done.stdout.split()))

    for top_p in (0, 1):
        counts = drawn(1.0, top_p)
        for token, weight in enumerate(weights):
            spread = math.sqrt(20000 * weight * (1 - weight))
            assert abs(counts[token] - 20000 * weight) < 5 * spread
    assert set(drawn(1.0, 0.5)) == {0}
    assert set(drawn(1.0, 0.7)) == {0, 2}
    assert set(drawn(0, 0.9, 5)) == {0}
    assert set(drawn(1.0, 1, top_k=1)) == {0} and set(drawn(1.0, 1, top_k=3)) == {0, 1, 2}
    assert set(drawn(1.0, 1, top_k=9)) == set(drawn(1.0, 1)) == {0, 1, 2, 3, 4}
    assert set(drawn(1.0, 1, min_p=0.2)) == {0, 2} and set(drawn(1.0, 1, min_p=0.1)) == {0, 1, 2}
    counts = drawn(1.0, 1, top_k=2)
    share = weights[0] / (weights[0] + weights[2])
    assert abs(counts[0] - 20000 * share) < 5 * math.sqrt(20000 * share * (1 - share))
    many = np.random.default_rng(1).normal(0, 2, 300)
    order = np.argsort(-many).tolist()
    weights = np.exp(many[order]) / np.exp(many).sum()
    for top_p, top_k in ((0.5, 0), (1, 40), (0.7, 40)):
        share = np.cumsum(weights[: top_k or None]) / (weights[:top_k].sum() if top_k else 1)
        nucleus = order[: int((share <= top_p).sum()) + 1][: top_k or None]
        assert set(drawn(1.0, top_p, top_k=top_k, logits=many)) == set(nucleus)
    assert set(drawn(0, 1, 5, penalty=2)) == {2}  # 0 and 3 came before: 3.0 / 2 is less than 2.0
    for temperature in (0.01, 1e-30, 1e-44):
        assert set(drawn(temperature, 1, 500)) == {0}
    rising_and_falling = [-abs(i - 150) / 50 for i in range(300)]
    order = sorted(range(300), key=lambda i: -rising_and_falling[i])
    assert set(drawn(1.0, 1, top_k=31, logits=rising_and_falling)) == set(order[:31])
    masked = [1.0, -math.inf, 2.0, -math.inf, 0.0, -math.inf]
    for top_p, top_k in ((1, 6), (0.999, 6), (0.999, 0), (1, 5)):
        assert set(drawn(1.0, top_p, top_k=top_k, logits=masked)) == {0, 2, 4}


PROMPTS = [
    "Zoë 😀",
    "日本語 \u200d ﬁ",
    "\n\n\t  ",
    "<s></s><unk><0x0A>",
    b"\xff\xfe\x80broken\xc3",
    b"\xed\xa0\x80\xf4\x90\x80\x80",
    "a" * 20,
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", [105, 512])
def test_any_prompt_is_accepted(run, tmp_path, tokenizers, size, prompt):
    export_model(random_model(vocab_size=size, max_seq_len=96), tmp_path / "model.bin")
    done = run(tmp_path / "model.bin", "-z", bin_of(tokenizers[size]), "-n", "90", "-i", prompt)
    assert done.returncode == 0, done.stderr
    done.stdout.decode()  # whole characters only


def refused_by(done, *parts):
    """Assert status 1 and a one-line error; a sanitizer has another status and many lines."""
    error = done.stderr.decode()
    assert done.returncode == 1, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for part in parts:
        assert part in error, error
    assert done.stdout == b""


def test_prompts_that_do_not_fit_are_refused(run, small):
    refused_by(run(small, "-i", "word " * 200), "the model's context is 32", "shorten the prompt")
    refused_by(run(small, "-n", "4", "-i", "a long, long prompt"), "-n is 4: raise -n", "-n 0")


def header(dim=48, hidden=128, layers=2, heads=4, kv_heads=4, vocab=105, seq=32):
    return struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab, seq)


@pytest.mark.parametrize(
    "data, part",
    [
        (b"", "is empty"),
        (b"abc", "has 3 bytes, and a version 0 header has 28"),
        (b"24ka", "has 4 bytes, and a version 0 header has 28"),
        (b"24ka" + bytes(300), "is a model.bin of version 0, expected 0 to 3"),
        (bytes(12), "has 12 bytes, and a version 0 header has 28"),
        (header(), "truncated"),
        (b"0" * 4096, "its header says dim"),
        (bytes(4096), "its header says dim = 0"),
        (struct.pack("<2I", 0x616B3432, 2) + bytes(300), "version 2 model.bin"),
        (b"GGUF" + bytes(300), "GGUF file; convert it: python export.py"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run git lfs pull"),
        (b"PK\3\4" + bytes(300), "checkpoint or zip file; convert it: python export.py"),
        (header(dim=-48) + bytes(300), "dim = -48"),
        (header(dim=2**31 - 1) + bytes(300), "dim = 2147483647"),
        (header(heads=5) + bytes(300), "do not fit"),
        (header(heads=16) + bytes(300), "do not fit"),
        (header(kv_heads=3) + bytes(300), "do not fit"),
        (header(vocab=-(2**31)) + bytes(300), "vocab_size = -2147483648"),
        (header(vocab=0) + bytes(300), "vocab_size = 0"),
        (header(layers=4096, hidden=2**20, dim=2**16, heads=4) + bytes(300), "truncated"),
        (header(seq=2**24) + bytes(300), "truncated"),
    ],
)
def test_files_that_are_not_models_are_refused(run, small, data, part):
    small.write_bytes(data)
    refused_by(run(small), str(small), part)


def test_truncated_and_padded_model_files_are_refused(run, small):
    whole = small.read_bytes()
    for size in (1, 27, 28, 29, 1000, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        small.write_bytes(whole[:size])
        refused_by(run(small), "header" if size < 28 else f"has {size} bytes")
    small.write_bytes(whole + b"\0")
    refused_by(run(small), "is too long", f"needs {len(whole)};")


@pytest.fixture
def modded(tmp_path):
    """A version 3 file with every option on."""
    path = tmp_path / "model.bin"
    export_model(random_model(**EVERYTHING), path)
    return path


@pytest.fixture
def load(builds, tmp_path):
    """Run two tokens through a model of these bytes with sanitizers; return CompletedProcess."""

    def call(data):
        path = tmp_path / "changed.bin"
        path.write_bytes(data)
        command = [builds["harness", "checked"], "logits", "1", path, "1", "7"]
        return subprocess.run(command, capture_output=True, timeout=PATIENCE_S)

    return call


def offset_of(field):
    names = [name for name, *_ in V3_HEADER]
    at = names.index(field)
    return struct.calcsize("<" + "".join(code for _, code, *_ in V3_HEADER[:at])), V3_HEADER[at][1]


def changed(data, **values):
    """Return the bytes of a version 3 file with other values in some header fields."""
    data = bytearray(data)
    for field, value in values.items():
        at, code = offset_of(field)
        struct.pack_into("<" + code, data, at, value)
    return bytes(data)


def test_truncated_and_padded_version_3_files_are_refused(modded, load):
    whole = modded.read_bytes()
    assert load(whole).returncode == 0
    sizes = [1, 7, 8, 79, 80, 81, 84, 91, 92, 99, 100, 128, 1000, len(whole) // 2, len(whole) - 1]
    for size in sizes:
        refused_by(load(whole[:size]), f"has {size} bytes", "header" if size < 92 else "truncated")
        if size >= 92:  # even if file_size is changed as well
            lying = changed(whole[:size], file_size=size)
            refused_by(load(lying), "is truncated", f"needs {len(whole)};")
    refused_by(load(whole + b"\0"), "is too long", f"says {len(whole)};")
    longer = changed(whole + b"\0", file_size=len(whole) + 1)
    refused_by(load(longer), "is too long or not a version 3", f"needs {len(whole)};")


@pytest.mark.parametrize(
    "field, code, low, high", [field for field in V3_HEADER[4:] if field[0] != "tokenizer"]
)
def test_every_field_of_version_3_is_checked(modded, load, field, code, low, high):
    whole = modded.read_bytes()
    wrong = [np.nextafter(np.float32(x), np.float32(d)) for x, d in ((low, -1), (high, 1e30))]
    wrong += [math.nan, math.inf, -math.inf]
    if code != "f":
        wrong = [high + 1, 2**31 - 1, *([low - 1, -(2**31)] if code == "i" else [2**32 - 1])]
    for value in wrong:
        refused_by(load(changed(whole, **{field: value})), f"its header says {field} = ")


@pytest.mark.parametrize(
    "values, part",
    [
        ({"version": 4}, "is a model.bin of version 4, expected 0 to 3"),
        ({"header_size": 82}, "header_size = 82, expected 92 to 92"),
        ({"header_size": 96}, "header_size = 96, expected 92 to 92"),
        ({"options": 1 << 8}, "options = 256, expected 0 to 255"),
        ({"dtype": 4}, "dtype = 4, expected 0 to 3"),
        (
            {"activation": 2},
            "activation = 2, expected 0 to 1; it is damaged or needs a newer run.c",
        ),
        ({"activation": 0}, "truncated"),
        ({"n_heads": 5}, "do not fit"),
        ({"n_heads": 16}, "do not fit"),
        ({"n_kv_heads": 3}, "do not fit"),
        ({"value_embeddings": 6}, "value_embeddings = 6, expected 0 to 5"),
        ({"bigram_rows": 1}, "bigram_rows = 1, expected 2 to"),
        ({"embedding_conv": 1}, "embedding_conv = 1, expected 2 to 16"),
        ({"key_conv": 17}, "key_conv = 17, expected 0 to 16"),
        ({"key_conv": 16}, "truncated"),
        ({"key_conv": 0}, "too long"),
        ({"n_layers": 4}, "too long"),
        ({"n_layers": 4096}, "truncated"),
        ({"n_layers": 4096, "hidden_dim": 1 << 20, "dim": 1 << 16, "n_heads": 4}, "truncated"),
        ({"vocab_size": 1 << 24, "value_embeddings": 5}, "truncated"),
        ({"bigram_rows": 1 << 28}, "truncated"),
    ],
)
def test_inconsistent_version_3_headers_are_refused(modded, load, values, part):
    refused_by(load(changed(modded.read_bytes(), **values)), part)


def test_each_option_bit_changes_the_expected_size(modded, load):
    whole = modded.read_bytes()
    on = struct.unpack_from("<I", whole, offset_of("options")[0])[0]
    for bit in range(len(V3_OPTIONS)):
        done = load(changed(whole, options=on ^ (1 << bit)))
        name = V3_OPTIONS[bit]
        # qk_norm and embedding_norm have no tensors without gains, and the last two have none
        if name in ("qk_norm", "embedding_norm", "orders", "separate_documents"):
            assert done.returncode == 0, done.stderr
        else:
            refused_by(done, "truncated" if name == "norm_gains" else "too long")


@pytest.mark.parametrize("size", V3_SIZES[:-1])
def test_earlier_files_of_version_3_have_a_shorter_header(builds, tmp_path, size):
    """They lack the last fields, so the windows of the layers come earlier."""
    whole, path = tmp_path / "model.bin", tmp_path / "earlier.bin"
    export_model(random_model(**{**EVERYTHING, "embedding_conv": 0, "key_conv": 0}), whole)
    path.write_bytes(with_header_of(size, whole.read_bytes()))
    tokens = list(range(3, 35))
    expected = logits_of(builds["harness", "fast"], whole, tokens, 105)
    assert (logits_of(builds["harness", "fast"], path, tokens, 105) == expected).all()


def test_windows_of_version_3_are_checked(modded, load):
    whole = modded.read_bytes()
    for layer, window in ((0, -1), (4, (1 << 24) + 1), (2, -(2**31))):
        data = bytearray(whole)
        struct.pack_into("<i", data, struct.calcsize(V3_STRUCT) + 4 * layer, window)
        refused_by(load(data), f"layer {layer} has a window of {window}")


def test_no_header_crashes_the_engine(modded, load):
    """With random bytes, words and bits in the header, the engine runs or prints one error line."""
    whole, random = modded.read_bytes(), np.random.default_rng(1)
    size = struct.calcsize(V3_STRUCT) + 4 * EVERYTHING["n_layers"]
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(size))
            kind = random.integers(3)
            if kind == 0:
                data[at] = random.integers(256)
            elif kind == 1:
                data[at] ^= 1 << random.integers(8)
            else:
                data[at & ~3 : (at & ~3) + 4] = random.bytes(4)
        done = load(bytes(data))
        if done.returncode:
            refused_by(done)
            refused += 1
    assert 150 < refused < 250


def test_files_that_cannot_be_read_are_refused(run, small, tmp_path):
    none = tmp_path / "none.bin"
    refused_by(run(none), f"{none} does not exist; make one with train.py or export.py")
    refused_by(run(tmp_path), "not a regular file")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    refused_by(run(tmp_path / "pipe"), "not a regular file")
    refused_by(run(small, "-z", none), f"{none} does not exist; pass the model's tokenizer file")
    refused_by(run(small, "-z", small / "none"), f"cannot read {small / 'none'}: Not a directory")
    refused_by(run(small, "-m", "eval", "-i", none), f"{none} does not exist; pass a text file")
    refused_by(run(small, "-z", tmp_path), "not a regular file")
    (tmp_path / "tokenizer.bin").unlink()
    os.mkfifo(tmp_path / "tokenizer.bin")  # found as the default
    refused_by(run(small), "tokenizer.bin is not a regular file")


def test_a_mapped_model_that_shrinks_ends_in_an_error_message(builds, tmp_path, tokenizers):
    sizes = {"dim": 256, "n_layers": 4, "vocab_size": 512, "max_seq_len": 4096}
    path = tmp_path / "model.bin"
    export_model(random_model(**sizes), path)
    args = [path, "-z", bin_of(tokenizers[512]), "--bench", "-n", "0"]
    command = [builds["run", "fast"], *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while str(path) not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        os.truncate(path, 4096)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and out == b""
    assert error.startswith(b"error: ") and error.count(b"\n") == 1 and b"shrank" in error


def test_nan_weights_do_not_crash_the_engine(run, small):
    whole = small.read_bytes()
    nan = whole[:28] + b"\xff" * (len(whole) - 28)
    small.write_bytes(nan)
    for args in (["-t", "0"], ["-t", "1", "-p", "0.9"], ["-t", "1", "-p", "1"]):
        assert run(small, "-n", "5", *args).returncode == 0


def test_damaged_tokenizer_files_are_refused(run, small, tokenizers, tmp_path):
    path = tmp_path / "tokenizer.bin"
    whole = path.read_bytes()
    for size in (1, 3, 4, 5, 11, 12, 13, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused_by(run(small), "tokenizer")
    path.write_bytes(b"")
    refused_by(run(small), "is empty")
    path.write_bytes(whole[:8] + b"\xff\xff\xff\xff" + whole[12:])
    refused_by(run(small), "is truncated or not a tokenizer file")
    path.write_bytes(b"\xff" * len(whole))
    refused_by(run(small), "is truncated or not a tokenizer file")
    refused_by(run(small, "-z", bin_of(tokenizers[512])), "512 pieces", "has 105")
    path.write_bytes(whole[:4] + struct.pack("<fI", math.nan, 0) * 105)
    refused_by(run(small), "piece 0 has NaN as its score")
    # empty or identical pieces with infinite scores: strange, but well-formed
    path.write_bytes(whole[:4] + struct.pack("<fI", -math.inf, 0) * 105)
    assert run(small, "-i", "Once upon", "-n", "20").returncode == 0
    piece = struct.pack("<fI", math.inf, 1) + b"a"
    path.write_bytes(whole[:4] + piece * 105)
    assert run(small, "-i", "aaaa", "-n", "20").returncode == 0


@pytest.mark.parametrize(
    "args, part",
    [
        (["-t", "hot"], "-t hot: expected a number"),
        (["-t", "-1"], "-t -1"),
        (["-t", "nan"], "-t nan"),
        (["-p", "1.5"], "from 0 to 1"),
        (["-n", "-5"], "-n -5: expected a whole number"),
        (["-n", "99999999999"], "-n 99999999999"),
        (["-s", "1x"], "-s 1x"),
        (["-q", "1"], "unknown option -q"),
        (["--seed", "1"], "unknown option --seed"),
        (["-i"], "-i needs a value"),
        (["other.bin"], "expected one model file, not both"),
    ],
)
def test_bad_options_are_refused(run, small, args, part):
    refused_by(run(small, *args), part)


def test_usage_goes_to_stdout_on_request_and_else_to_stderr(run):
    done = run("-h")
    assert done.returncode == 0 and b"usage: ./run model.bin" in done.stdout
    assert max(map(len, done.stdout.decode().splitlines())) <= 100
    done = run()
    assert done.returncode == 1 and b"usage: ./run model.bin" in done.stderr


def test_the_default_tokenizer_is_beside_the_model_or_in_this_folder(run, small, tmp_path):
    assert run(small, "-n", "3").returncode == 0
    links = tmp_path / "links"
    links.mkdir()
    (links / "story.bin").symlink_to(small)
    (links / "again.bin").symlink_to("story.bin")
    for cwd, path in ((tmp_path, "links/again.bin"), (links, "story.bin")):
        assert run(path, "-n", "3", cwd=cwd).returncode == 0
    shutil.copy(tmp_path / "tokenizer.bin", links)
    refused_by(run(links / "story.bin", "-z", links / "none"), "none does not exist")
    (links / "tokenizer.bin").write_bytes(b"")
    refused_by(run(links / "story.bin"), "links/tokenizer.bin is empty")  # beside the link first
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "tokenizer.bin").rename(other / "tokenizer.bin")
    assert run(small, "-n", "3", cwd=other).returncode == 0
    refused_by(run(small, "-n", "3", cwd=tmp_path), "error: tokenizer.bin does not exist; pass")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "args, output",
    [
        (["-n", "20"], "story"),
        (["-n", "20", "-b", "3", "--json"], "story"),
        (["-m", "eval", "-i", "text.txt"], "result"),
        (["-m", "eval", "-i", "text.txt", "--json"], "result"),
        (["--bench"], "figures"),
        (["-h"], "help"),
    ],
)
def test_a_full_disk_is_reported(builds, small, tmp_path, args, output):
    (tmp_path / "text.txt").write_text("Once upon a time.")
    with open("/dev/full", "wb") as full:
        command = [builds["run", "fast"], small, *args]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == 1
    assert f"cannot write the {output}: No space left on device" in done.stderr.decode()


def test_text_must_be_utf_8_but_a_prompt_need_not(run, small, tmp_path):
    path = tmp_path / "text.txt"
    args = [small, "-m", "eval", "-i", path]
    for data, at in ((b"caf\xe9 au lait", 3), (b"\xff\xfe", 0), (b"a\xe2\x82", 1)):
        path.write_bytes(data)
        refused_by(run(*args), f"is not UTF-8: byte {at} is 0x{data[at]:02X}", "iconv")
    path.write_bytes(b"Once upon a time.")
    plain = run(*args).stdout
    path.write_bytes(b"\xef\xbb\xbfOnce upon a time.")
    assert run(*args).stdout == plain != b""  # a byte order mark is skipped
    done = run(small, "-n", "30", "-i", os.fsdecode(b"caf\xe9"))
    assert done.returncode == 0 and b"note: the prompt is not UTF-8" in done.stderr


def test_a_long_context_costs_only_what_is_used(run, builds, small, tmp_path):
    """Any header can claim a context of 2^24."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. <|endoftext|> Tim and Tom.\n")
    path = tmp_path / "long.bin"
    export_model(random_model(dim=16, n_heads=2, max_seq_len=64, logit_softcap=9.0), path)
    args = [path, "-z", tmp_path / "tokenizer.bin", "-m", "eval", "-i", text]
    short = run(*args).stdout
    path.write_bytes(changed(path.read_bytes(), max_seq_len=1 << 24))
    limit = ["bash", "-c", 'ulimit -v 500000 && exec "$@"', "-"]
    command = [*limit, builds["run", "fast"], *map(str, args)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True)
    assert done.stdout == short != b"" and time.monotonic() - start < 5


@pytest.mark.slow
@pytest.mark.parametrize("cc", compilers())
def test_no_compiler_warns(tmp_path, cc):
    compile_c(REPO / "run.c", tmp_path / "run", "-O1", "-pedantic", cc=cc)  # -Wall -Wextra -Werror


def test_big_endian_is_refused_at_compile_time():
    orders = ["-D__BYTE_ORDER__=4321", "-U__ORDER_BIG_ENDIAN__", "-D__ORDER_BIG_ENDIAN__=4321"]
    command = ["cc", "-fsyntax-only", "-w", *orders, str(REPO / "run.c")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode and b"does not swap bytes" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not supports("-fopenmp"), reason="the compiler has no OpenMP")
def test_openmp_changes_no_output(tmp_path, tokenizers):
    """Each row is summed in one order, so one thread and many generate the same story."""
    compile_c(REPO / "run.c", tmp_path / "run", "-O3", "-fopenmp")
    sizes = {"dim": 512, "n_heads": 8, "n_layers": 1, "vocab_size": 512, "max_seq_len": 160}
    export_model(random_model(**sizes, tie_embeddings=False), tmp_path / "model.bin")
    args = ["-z", bin_of(tokenizers[512]), "-s", "5", "-n", "160"]  # threads share attention too
    texts = set()
    for threads in ("1", "2", "3"):
        done = subprocess.run(
            [tmp_path / "run", tmp_path / "model.bin", *args],
            capture_output=True,
            env={"OMP_NUM_THREADS": threads},
            check=True,
        )
        texts.add(done.stdout)
    assert len(texts) == 1


@pytest.mark.slow
@pytest.mark.skipif(not supports("-fopenmp"), reason="the compiler has no OpenMP")
def test_stalled_threads_are_dropped_for_a_while(tmp_path):
    compile_c(REPO / "tests/harness.c", tmp_path / "harness", "-O1", "-fopenmp")
    passes = [5, -1, 5, 0, 0, 63, 1, 64, 2048, 0, 0, 31, 1]
    command = [tmp_path / "harness", "threads", "8", *map(str, passes)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.split() == b"8 8 8 4 2 2 4 8 8 8 4 4 8".split()
