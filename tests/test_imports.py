"""
Imports of mutated files: each is refused with one sentence or gives a model that works.

As a program, `python tests/test_imports.py FOLDER`, this file attacks the models in a folder with
limited memory, and prints one line for each import.
"""

import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path

import pytest
import torch
from conftest import EVERYTHING, REPO, random_model
from test_formats import meta_release
from test_run import llama2c_file

from configurator import UserError
from formats.modelbin import export_model
from formats.table import FORMATS, load
from system.remote import need

DIGITS, DEEP, HUGE = "@5000 digits@", "@deep@", "@1e400@"  # JSON that json.dumps cannot write
RAW = {DIGITS: "7" * 5000, DEEP: "[" * 100_000 + "]" * 100_000, HUGE: "1e400"}
NESTED = [[[[[[1]]]]]]
ODD = [
    *(None, True, False, 0, -1, 1, 3, 1 << 20, 1 << 31, 1 << 63, -1 << 63, 0.5, 1e308, -1e308),
    *(math.nan, math.inf, "", "1", "text", "x" * 5000, "\x1b[31m\n", "\ud800", "../../etc/passwd"),
    *([], [1, "a"], NESTED, [0] * 10_000, {}, {"a": {"b": []}}, DIGITS, DEEP, HUGE),
]
WORDS = [0, 1, 2, 3, 7, 64, 255, 1 << 16, 1 << 20, 1 << 24, 1 << 28, (1 << 31) - 1, (1 << 32) - 1]
LONG_WORDS = [0, 1, 1 << 20, 1 << 31, 1 << 32, 1 << 60, (1 << 63) - 1, (1 << 64) - 1]
MAX_BYTES = 100 << 20  # memory for the import of a file of a few KB
MAX_S = 10.0


# ---- mutations: (label, the file's new bytes)


def places_in(value, path=()):
    """Yield the paths of values in parsed JSON; of long lists and objects only the ends."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for name, inner in items if len(items) < 40 else [*items[:3], items[-1]]:
        yield (*path, name)
        if isinstance(inner, (dict, list)):
            yield from places_in(inner, (*path, name))


def changed(value, path, new=None, is_removed=False):
    """Return a copy of parsed JSON with a value changed or removed."""
    if len(path) == 1 and is_removed:
        copy = value.copy()
        copy.pop(path[0])
        return copy
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], new, is_removed) if path[1:] else new
    return copy


def json_bytes(value):
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def json_mutations(data, numbers, more=()):
    """Replace every value of a JSON object by each of ODD, or remove it; more: names to add."""
    value = json.loads(data)
    for path in [*places_in(value), *((name,) for name in more if name not in value)]:
        for i, new in enumerate(ODD):
            yield f"{path} = {i} {str(new)[:20]!r}", json_bytes(changed(value, path, new))
        if path[0] in value:
            yield f"{path} removed", json_bytes(changed(value, path, is_removed=True))
    for i, new in enumerate(ODD):
        yield f"all = {i}", json_bytes(new)


def tokenizer_mutations(data, numbers):
    padding = {"strategy": {"Fixed": 1 << 24}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1 << 20, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    for name, new in (("padding", padding), ("truncation", truncation)):
        yield f"{name} on", json_bytes({**json.loads(data), name: new})
    yield from json_mutations(data, numbers)


def byte_mutations(data, numbers, n=60, start=0, end=None):
    """Truncate the file, extend it, and change bytes between start and end."""
    end = end or len(data)
    for size in {0, 1, 3, 4, 7, 8, 27, 28, 100, len(data) // 2, len(data) - 1}:
        yield f"cut at {size}", data[:size]
    yield "longer", data + b"\0" * 64
    for _ in range(n):
        copy = bytearray(data)
        for _ in range(numbers.choice((1, 1, 4, 32))):
            at = numbers.randrange(start, end)
            copy[at] = numbers.choice((copy[at] ^ 1 << numbers.randrange(8), 0, 255, 127))
        yield "bytes", bytes(copy)


def word_mutations(data, places, words=WORDS, code="<I"):
    for at in places:
        for word in words:
            new = struct.pack(code, word)
            yield f"at {at} {word:#x}", data[:at] + new + data[at + len(new) :]


def safetensors_mutations(data, numbers):
    size = struct.unpack_from("<Q", data)[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = sorted(header)
    kept = ["__metadata__", names[1], names[len(names) // 2], names[-1]]
    for label, new in json_mutations(json_bytes({name: header[name] for name in kept}), numbers):
        try:
            new = {**header, **dict.fromkeys(kept), **json.loads(new)}
            new = {name: value for name, value in new.items() if value is not None}
        except (ValueError, TypeError, RecursionError):
            new = {**header, kept[1]: "text"}
        new = json_bytes(new)
        yield label, struct.pack("<Q", len(new)) + new + body
    first, second = names[1], names[2]
    for offsets in ([0, 0], [4, 0], [0, 1 << 60], [-4, 0], [1 << 63, 1 << 63]):
        new = json_bytes({**header, first: {**header[first], "data_offsets": offsets}})
        yield f"offsets {offsets}", struct.pack("<Q", len(new)) + new + body
    swapped = {**header, first: header[second], second: header[first]}
    yield "swapped", struct.pack("<Q", len(json_bytes(swapped))) + json_bytes(swapped) + body
    yield from word_mutations(data, [0], LONG_WORDS, "<Q")
    yield from byte_mutations(data, numbers, 60, 0, 8 + size)
    yield from byte_mutations(data, numbers, 40, 8 + size)


def gguf_string(data):
    return struct.pack("<Q", len(data)) + data


GGUF_ODD = {
    **{f"u8 {n}": struct.pack("<IB", 0, n) for n in (0, 255)},
    **{f"i32 {n}": struct.pack("<Ii", 5, n) for n in (0, -1, 3, (1 << 31) - 1, -1 << 31)},
    **{f"u32 {n}": struct.pack("<II", 4, n) for n in (0, 1, 1 << 20, 1 << 31, (1 << 32) - 1)},
    **{f"u64 {n}": struct.pack("<IQ", 10, n) for n in (1, 1 << 60, (1 << 64) - 1)},
    **{f"f32 {n}": struct.pack("<If", 6, n) for n in (0.5, -1.0, 1e38, math.nan, math.inf)},
    **{f"f64 {n}": struct.pack("<Id", 12, n) for n in (1.0, 1e308, math.nan)},
    **{f"bool {n}": struct.pack("<IB", 7, n) for n in (0, 1, 2)},
    **{f"text {s[:9]}": struct.pack("<I", 8) + gguf_string(s) for s in (b"", b"text", b"\xff\n")},
    "long text": struct.pack("<I", 8) + gguf_string(b"x" * 5000),
    "endless text": struct.pack("<IQ", 8, 1 << 60),
    "unknown type": struct.pack("<IQ", 77, 0),
    **{
        f"list of {n} {kind}": struct.pack("<IIQ", 9, kind, n)
        for n in (0, 1 << 60)
        for kind in (4, 8, 9)
    },
    "list": struct.pack("<IIQ2I", 9, 4, 2, 1, 2),
    "bytes": struct.pack("<IIQ", 9, 0, 1 << 20) + bytes(1 << 20),
    "texts": struct.pack("<IIQ", 9, 8, 3) + gguf_string(b"a") * 3,
    "empty texts": struct.pack("<IIQ", 9, 8, 1 << 17) + gguf_string(b"") * (1 << 17),
    "list of lists": struct.pack("<IIQ", 9, 9, 2) + struct.pack("<IQI", 4, 1, 5) * 2,
    "lists in lists": struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000 + bytes(12),
}
GGUF_KEYS = (
    "general.alignment split.count llama.vocab_size llama.sliding_window llama.expert_count "
    "llama.rope.scaling.type qwen3.vocab_size qwen3.attention.sliding_window new llama.new"
).split()


def gguf_mutations(data, numbers):
    with tempfile.NamedTemporaryFile() as f:
        f.write(data)
        f.flush()
        reader = need("gguf").GGUFReader(f.name)
    starts = [f.offset for name, f in reader.fields.items() if not name.startswith("GGUF.")]
    infos = [tensor.field.offset for tensor in reader.tensors]
    records = [data[a:b] for a, b in zip(starts, [*starts[1:], infos[0]], strict=True)]
    end = infos[-1] + sum(part.nbytes for part in reader.tensors[-1].field.parts)
    body, about = data[reader.data_offset :], data[infos[0] : end]

    def file(records, about=about, body=body):
        head = data[:16] + struct.pack("<Q", len(records)) + b"".join(records) + about
        return head + bytes(-len(head) % 32) + body

    assert file(records) == data
    names = [record[8 : 8 + struct.unpack_from("<Q", record)[0]] for record in records]
    for i, name in enumerate(names):
        others = records[:i], records[i + 1 :]
        yield f"{name} removed", file([*others[0], *others[1]])
        yield f"{name} twice", file([*records, records[i]])
        for label, value in GGUF_ODD.items():
            yield f"{name} = {label}", file([*others[0], gguf_string(name) + value, *others[1]])
    for name in GGUF_KEYS:
        for label, value in GGUF_ODD.items():
            yield f"new {name} = {label}", file([*records, gguf_string(name.encode()) + value])
    yield from word_mutations(data, (0, 4))
    yield from word_mutations(data, (8, 16), LONG_WORDS, "<Q")
    for tensor in (reader.tensors[0], reader.tensors[1], reader.tensors[-1]):
        at = tensor.field.offset
        for part in tensor.field.parts:
            yield from word_mutations(data, [at], WORDS if part.nbytes < 8 else ())
            yield from word_mutations(data, range(at, at + part.nbytes - 7, 8), LONG_WORDS, "<Q")
            at += part.nbytes
    yield from byte_mutations(data, numbers, 100, 0, end)
    yield from byte_mutations(data, numbers, 30, end)


def saved(value):
    """Return the bytes that torch.save writes."""
    torch.save(value, f := BytesIO())
    return f.getvalue()


def torch_mutations(data, numbers):
    """Mutate a file of torch.save that has a dict of tensors."""
    tensors = torch.load(BytesIO(data), weights_only=True)
    names = sorted(tensors)
    odd = [None, 1, "text", [], {}, torch.zeros(0), torch.tensor(1.0), torch.zeros(3, 5)]
    for name in (names[0], names[len(names) // 2], names[-1]):
        tensor = tensors[name]
        others = [
            *odd,
            tensor.mT if tensor.dim() > 1 else tensor[1:],
            tensor[:1],
            tensor.long(),
            tensor.double() * 1e300,
            tensor.to(torch.complex64),
        ]
        others += [tensor * math.nan, tensor.to_sparse(), tensor.flatten()[:1].expand(1 << 40)]
        others += [tensor.flatten()[:1].expand(tensor.shape), tensor.half(), tensor.to("meta")]
        others += [torch.nn.Parameter(tensor), tensor.to(torch.float8_e4m3fn)]
        for i, new in enumerate(others):
            yield f"{name} = {i}", saved({**tensors, name: new})
        yield f"{name} removed", saved({k: v for k, v in tensors.items() if k != name})
    for i, new in enumerate((1, None, [], {}, "text", tensor, {1: tensor}, {"a": {"b": tensor}})):
        yield f"all = {i}", saved(new)
    yield "shared", saved(dict.fromkeys(names, tensor))
    yield from byte_mutations(data, numbers, 80)


def bin_mutations(data, numbers):
    yield from word_mutations(data, range(0, 100, 4))
    yield from byte_mutations(data, numbers, 60, 0, 256)
    yield from byte_mutations(data, numbers, 30)


# Other fields of config.json that are read, or that change what a model computes
CONFIG = (
    "hidden_act attention_bias mlp_bias partial_rotary_factor quantization_config rope_scaling "
    "sliding_window layer_types use_sliding_window max_window_layers layer_windows head_dim "
    "qk_norm logit_softcap bigram_rows bos_token_id eos_token_id"
).split()


BINS = "v0.bin v1.bin v2.bin v3_bf16.bin v3_fp32.bin v3_int4.bin v3_int8.bin"
CONFIGS = "hf_llama hf_mistral hf_modded hf_qwen3"
# file: its mutations, the share of them to try, and for which models
MUTATIONS = {
    "config.json": (partial(json_mutations, more=CONFIG), 0.25, CONFIGS),
    "generation_config.json": (json_mutations, 0.5, "hf_qwen3"),
    "tokenizer.json": (tokenizer_mutations, 0.06, "hf_bytes hf_qwen3"),
    "tokenizer.model": (byte_mutations, 1.0, "hf_llama"),
    "model.safetensors.index.json": (json_mutations, 0.2, "hf_sharded"),
    "model.safetensors": (safetensors_mutations, 0.25, "hf_llama"),
    "pytorch_model.bin": (torch_mutations, 1.0, "hf_torch"),
    "params.json": (json_mutations, 0.5, "meta"),
    "consolidated.00.pth": (torch_mutations, 1.0, "meta"),
    "one.safetensors": (safetensors_mutations, 0.25, "one.safetensors"),
    **dict.fromkeys(("llama.gguf", "qwen3.gguf"), (gguf_mutations, 0.2, "llama.gguf qwen3.gguf")),
    **dict.fromkeys(BINS.split(), (bin_mutations, 0.2, BINS)),
}


def mutations_of(model, numbers):
    """Yield (path, label, new bytes or None to remove it) for the files of a model."""
    for path in sorted(model.rglob("*")) if model.is_dir() else [model]:
        mutations, share, models = MUTATIONS.get(path.name, (None, 0, ""))
        if model.name in models.split():
            yield path, "removed", None
            for label, new in mutations(path.read_bytes(), numbers):
                if numbers.random() < share:
                    yield path, label, new


# ---- the attack


def vm(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10


def answer_of(path):
    """Return (logits of one token, ids of a text, largest weight) of an imported model."""
    loaded = load(str(path))
    with torch.inference_mode():
        logits = loaded.model.eval()(torch.tensor([[0]]))
    ids = ()
    if loaded.tokenizer:
        ids = tuple(loaded.tokenizer.encode("Once upon a time"))
        start = loaded.tokenizer.encode("")
        assert all(0 <= i < loaded.model.args.vocab_size for i in (*ids, *start)), "ids too large"
        assert isinstance(loaded.tokenizer.decode(list(ids)), str)
    largest = max(p.abs().max().item() for p in loaded.model.parameters())
    return logits, ids, largest


def outcome_of(path, expected):
    """Return ("refused", "accepted", "equal" or "wrong"; the message)."""
    try:
        logits, ids, largest = answer_of(path)
    except UserError as e:
        text = str(e)
        if not 0 < len(text) <= 1500:
            return "wrong", f"a message of {len(text)} characters: {text[:200]}"
        is_memory = "memory" in text or "allocate" in text
        return ("wrong" if is_memory else "refused"), text
    except BaseException as e:
        return "wrong", f"{type(e).__name__}: {str(e)[:300]}"
    if not logits.isfinite().all() and not 1e4 < largest < math.inf:
        return "wrong", f"logits are not finite, weights up to {largest}"
    is_equal = logits.shape == expected[0].shape and torch.equal(logits, expected[0])
    return ("equal" if is_equal and ids == expected[1] else "accepted"), ""


def attack(folder, *names):
    torch.set_num_threads(1)
    numbers = random.Random(0)
    out = os.fdopen(os.dup(1), "w")
    for model in [folder / name for name in names] or sorted(folder.iterdir()):
        with redirect_stdout(StringIO()):
            expected = answer_of(model)
        limit = vm("VmSize") + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for path, label, new in mutations_of(model, numbers):
            whole = path.read_bytes()
            path.unlink() if new is None else path.write_bytes(new)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
            before, start = vm("VmRSS"), time.process_time()
            print(json.dumps([model.name, path.name, label]), end="\t", file=out, flush=True)
            with redirect_stdout(StringIO()):
                outcome, text = outcome_of(model, expected)
            used, seconds = vm("VmHWM") - before, time.process_time() - start
            if used > MAX_BYTES + 10 * len(new or ""):
                outcome, text = "wrong", f"{used >> 20} MB; {outcome} {text}"
            if seconds > MAX_S:
                outcome, text = "wrong", f"{seconds:.1f} s; {outcome} {text}"
            print(json.dumps([outcome, text]), file=out, flush=True)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)


def make_models(folder, tokenizers):
    """Write small models of every kind that can be imported."""
    small = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 32}

    def write(name, to, which=105, dtype="fp32", **options):
        tokenizer = tokenizers[which]
        model = random_model(**{**small, "vocab_size": tokenizer.vocab_size, **options})
        path = folder / name
        FORMATS[to].write(model, str(path), dtype, tokenizer, {})
        return path, model

    folder.mkdir()
    hf, model = write("hf_llama", "hf")
    write("hf_mistral", "hf", sliding_window=5, window_pattern="S")
    fast, _ = write("hf_qwen3", "hf", 512, qk_norm=True, sliding_window=5, window_pattern="LS")
    (fast / "tokenizer.model").unlink()
    write("hf_modded", "hf", **{**EVERYTHING, "n_layers": 3, "n_kv_heads": 1})
    fast, _ = write("hf_bytes", "hf", "gpt2")
    (fast / "tokenizer.model").unlink()
    write("llama.gguf", "gguf", 512)
    write("qwen3.gguf", "gguf", "gpt4", "q8_0", qk_norm=True, dim=64)
    write("one.safetensors", "safetensors", **EVERYTHING)
    (folder / "tokenizer.model").unlink()
    write_others(folder, hf, model)


def write_others(folder, hf, model):
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_tensors

    tensors = load_file(hf / "model.safetensors")
    names = sorted(tensors)
    for kind in ("hf_sharded", "hf_torch"):
        shutil.copytree(hf, folder / kind)
        (folder / kind / "model.safetensors").unlink()
    index = {}
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        save_tensors(part, folder / "hf_sharded" / f"model-{i}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "hf_sharded" / "model.safetensors.index.json").write_text(text)
    torch.save(tensors, folder / "hf_torch" / "pytorch_model.bin")
    untied = random_model(dim=16, n_heads=2, hidden_dim=32, max_seq_len=4096, tie_embeddings=False)
    meta_release(folder / "meta", untied, 2)
    for version in (1, 2):
        (folder / f"v{version}.bin").write_bytes(llama2c_file(model, version))
    export_model(model, folder / "v0.bin", 0)
    rich = random_model(**{**EVERYTHING, "dim": 32, "n_heads": 2})
    for dtype in ("fp32", "bf16", "int8", "int4"):
        export_model(rich, folder / f"v3_{dtype}.bin", 3, dtype)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in /proc")
def test_mutated_files_are_refused_or_read_correctly(tmp_path, tokenizers):
    make_models(tmp_path / "models", tokenizers)
    command = [sys.executable, __file__, str(tmp_path / "models")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1][:500]}\n{done.stderr[-2000:]}"
    wrong = [line[:500] for line in lines if '\t["wrong"' in line]
    assert not wrong, "\n".join(wrong[:50])
    counts = Counter(json.loads(line.partition("\t")[2])[0] for line in lines)
    assert counts.total() > 4000 and counts["refused"] > 2500
    assert counts["equal"] > 500  # another spelling of the same model, or a field that is not used
    assert 50 < counts["accepted"] < 600  # other weights, as valid as the original ones


if __name__ == "__main__":
    attack(Path(sys.argv[1]), *sys.argv[2:])
