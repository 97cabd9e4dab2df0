"""
Checkpoints from strangers: whatever their bytes, resuming, sampling and exporting either work or
end with one sentence, use no more memory than the size of the file, and leave the folder unchanged.
"""

import copy
import itertools
import math
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, TINY, refused, script

from configurator import UserError
from dataset import DataPaths, TokenData, TrainBatches
from formats.modelbin import export_model
from formats.table import load, load_for_sampling
from model import KVCache, Transformer
from optim import make_optimizer, set_rates
from training.checkpoint import load_checkpoint
from training.resume import find_start, restore_run
from training.settings import args_of

# ---- mutations

WRONG = {
    "None": None,
    "true": True,
    "a negative number": -1,
    "a huge number": 2**62,
    "a huger number": 10**30,
    "a float": 0.5,
    "NaN": math.nan,
    "-infinity": -math.inf,
    "a string": "abc",
    "an escape sequence": "\x1b[2J",
    "a list": [[1], {}],
    "a dict": {"a": {"b": [1]}},
    "a tensor": torch.zeros(3),
}


def odd_tensors(tensor):
    """Yield (kind, tensor) with other shapes, dtypes and devices than `tensor`."""
    yield "another shape", torch.zeros(3, 5)
    yield "empty", torch.zeros(0)
    yield "expanded", torch.zeros(()).expand(1 << 20, 1 << 12)
    yield "integers", tensor.to(torch.int32)
    yield "complex", tensor.to(torch.complex64)
    yield "booleans", tensor.bool()
    yield "sparse", tensor.to_sparse()
    yield "on the meta device", tensor.to("meta")
    yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    yield "half", tensor.half()  # can be used
    yield "NaN", torch.full_like(tensor, math.nan)


def mutated_values(good):
    """Yield (mutation, value): checkpoints with one field replaced or removed."""
    places = [(name,) for name in good]
    places += [("config", name) for name in good["config"]]
    places += [("model_args", name) for name in good["model_args"]]
    places += [("versions", name) for name in good["versions"]]
    rng = random.Random(1)
    for place in places:
        kinds = ["removed", *WRONG]
        for kind in kinds if len(place) == 1 else rng.sample(kinds, 1 + (place[0] != "config")):
            bad = copy.deepcopy(good)
            parent = bad
            for name in place[:-1]:
                parent = parent[name]
            if kind == "removed":
                del parent[place[-1]]
            else:
                parent[place[-1]] = WRONG[kind]
            yield f"{'.'.join(place)}: {kind}", bad
    for name in ("dim", "n_layers", "vocab_size", "hidden_dim", "bigram_rows", "max_seq_len"):
        for value in (4096, 1 << 24):
            for group in (["model_args"], ["config"], ["model_args", "config"]):
                bad = copy.deepcopy(good)
                for field in group:
                    bad[field][name] = value
                yield f"{name} = {value} in {group}", bad
    for group in ("model", "optimizer"):
        names = list(good[group])
        for name in (names[0], names[-1]):
            for kind, tensor in odd_tensors(good[group][name]):
                bad = copy.copy(good)
                bad[group] = {**good[group], name: tensor}
                yield f"{group}.{name}: {kind}", bad
    for name in ("iter_num", "evaluated", "n_sequences", "n_windows"):
        for value in (10**6, 2**53 - 1):
            yield f"{name} = {value}", {**good, name: value}


def mutated_bytes(data, path):
    """Yield (mutation, bytes): files that are cut, have flipped bits or are deflated."""
    rng = random.Random(2)
    for _ in range(20):
        n = rng.randrange(len(data))
        yield f"cut to {n}", data[:n]
    for _ in range(40):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        yield "flipped", bytes(bad)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickle_name = next(name for name in entries if name.endswith("data.pkl"))
    for chosen in [[pickle_name], *([name] for name in rng.sample(list(entries), 9)), entries]:
        yield f"deflated {len(chosen)}", repacked(path.with_suffix(".zip"), entries, chosen)
    for _ in range(40):  # with correct checksums
        bad = bytearray(entries[pickle_name])
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        changed = {**entries, pickle_name: bytes(bad)}
        yield "a byte of the pickle", repacked(path.with_suffix(".zip"), changed, ())


def repacked(path, entries, deflated):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            method = zipfile.ZIP_DEFLATED if name in deflated else zipfile.ZIP_STORED
            archive.writestr(name, data, method)
    data = path.read_bytes()
    path.unlink()
    return data


# ---- what train.py, sample.py and export.py do with a checkpoint


def resumed(out, settings, data):
    """Resume the run in a folder like train.py, and take one step."""
    settings = {**settings, "out_dir": str(out), "init_from": "resume", "eval_only": True}
    given = dict.fromkeys(("eval_only", "out_dir", "init_from", "data_dir"), "")
    start = find_start(settings, given)
    args = args_of(start.settings, start.checkpoint["model_args"])
    model = Transformer(args)
    optimizer = make_optimizer(model, start.settings["optimizer"], start.settings)
    if args.max_seq_len > 1 << 10:
        raise UserError("the shards are shorter")  # train.py refuses this, too
    batches = TrainBatches(data.train, args.max_seq_len, start.settings["seed"])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = restore_run(start, model, optimizer, scaler, torch.float32, batches.n_windows)
    settings = SimpleNamespace(**start.settings)
    if state.is_done(settings):
        return
    set_rates(optimizer, settings, state.iter_num, state.part_done(settings, None))
    loss = model(*batches.at(state.n_sequences, 2))
    loss.backward()
    optimizer.step()


def outcomes(out, settings, data, export_folder):
    """Return {job: None or the UserError that ended it}; any other exception is a bug."""
    path = str(out / "ckpt.pt")
    jobs = {
        "resume": lambda: resumed(out, settings, data),
        "sample": lambda: list(load_for_sampling(path, "Once")[0].model.generate([1, 5], 2)),
        "export": lambda: export_model(load(path).model, str(export_folder / "model.bin")),
    }
    errors = {}
    for name, job in jobs.items():
        try:
            job()
            errors[name] = None
        except UserError as e:
            assert "\n" not in str(e)
            errors[name] = e
    return errors


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run(practice, tmp_path_factory):
    """(folder of a run with steps left, its settings, its data)."""
    out = tmp_path_factory.mktemp("small") / "out"
    flags = [*TINY, "--dim=16", "--n_layers=1", "--arch=llama", "--bigram_rows=8"]
    flags += [f"--data_dir={practice}", f"--out_dir={out}", "--max_iters=3", "--eval_interval=3"]
    done = script("train.py", *flags)
    assert done.returncode == 0, done.stderr
    settings = {
        **load_checkpoint(out / "ckpt.pt")["config"],
        **{"on_finish": "", "resume": "no", "estimate": False, "init_from": "scratch"},
    }
    for path in out.glob("*.pt"):  # leave one checkpoint, without finishing the run
        if path.name != "ckpt.pt":
            path.unlink()
    good = torch.load(out / "ckpt.pt", weights_only=True)
    good["config"]["max_iters"] = 10
    torch.save(good, out / "ckpt.pt")
    paths = DataPaths(str(practice), settings["vocab_source"], settings["vocab_size"])
    return out, settings, TokenData(paths, 64, None, check=False)


@pytest.mark.slow
def test_no_mutated_checkpoint_ends_in_a_traceback(run, tmp_path):
    """A mutated file is refused or can be used, and the folder does not change."""
    out, settings, data = run
    path = out / "ckpt.pt"
    good = path.read_bytes()
    assert set(outcomes(out, settings, data, tmp_path).values()) == {None}
    try:
        value = torch.load(path, weights_only=True)
        n, refusals, faults = 0, 0, []
        cases = itertools.chain(mutated_values(value), mutated_bytes(good, tmp_path / "x.pt"))
        (tmp_path / "x.pt").write_bytes(good)
        for mutation, bad in cases:
            if isinstance(bad, bytes):
                path.write_bytes(bad)
            else:
                torch.save(bad, path)
            before = contents(out)
            try:
                errors = outcomes(out, settings, data, tmp_path)
            except Exception as e:
                faults.append(f"{mutation}: {type(e).__name__}: {str(e)[:200]}")
                errors = {}
            assert contents(out) == before, mutation
            n, refusals = n + 1, refusals + any(errors.values())
    finally:
        path.write_bytes(good)
    print(f"{n} checkpoints, {refusals} refused, {len(faults)} faults")
    assert not faults, "\n".join(faults)
    assert n >= 300 and refusals > 0.6 * n and n - refusals > 20


# ---- small files that would take much memory


def number(n):
    return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


NESTED = b"}(" + b")" + b"\x85" * 1_000_000 + b"Nu"  # a dict with deeply nested tuples as its key
LONG = b"}(" + b"".join(number(i) + b"N" for i in range(50_000)) + b"u"
BOMBS = {
    "a bytearray of 6 GB": b"cbuiltins\nbytearray\n(" + number(6 << 30) + b"tR",
    "a tensor of 8 GB": b"ctorch\nTensor\n(" + number(2 << 30) + b"tR",
    "a storage of 6 GB": b"ctorch.storage\nUntypedStorage\n(" + number(6 << 30) + b"tR",
    "nested tuples": NESTED,  # would overflow Python's stack
    "thousands of copies": LONG
    + b"q\1](ccollections\nOrderedDict\nq\2"
    + b"h\2h\1\x85R" * 9000
    + b"e",
}
ONE_WEIGHT = b"\x80\x02}(" + text("model") + b"%s" + text("model_args") + b"}u."
READ = f"""
import resource, sys; sys.path.insert(0, {str(REPO)!r})
from configurator import UserError; from training.checkpoint import load_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_checkpoint(sys.argv[1])
except UserError as e:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, e)
"""


def kilobytes_to_refuse(path):
    """Run load_checkpoint() in a process with a memory limit; return (kilobytes used, message)."""
    limits = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))"
    command = [sys.executable, "-c", limits + READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    used, _, message = done.stdout.partition(" ")
    return int(used), message


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [*BOMBS, "deflated"])
def test_a_small_checkpoint_takes_little_memory(tmp_path, bomb):
    data = BOMBS.get(bomb) or text("x" * (1 << 28))
    method = zipfile.ZIP_DEFLATED if bomb == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w", method) as archive:
        archive.writestr("a/data.pkl", ONE_WEIGHT % data)
        archive.writestr("a/version", b"3\n")
    assert (tmp_path / "ckpt.pt").stat().st_size < 2 << 20
    used, message = kilobytes_to_refuse(tmp_path / "ckpt.pt")
    assert ("is damaged" in message or "holds more than tensors" in message) and used < 200_000


def test_a_huge_context_takes_memory_only_if_it_is_used(run, tmp_path):
    out, _, _ = run
    good = torch.load(out / "ckpt.pt", weights_only=True)
    good["model_args"]["max_seq_len"] = 1 << 24
    torch.save(good, tmp_path / "ckpt.pt")
    model = load(str(tmp_path / "ckpt.pt"), tokenizer="none").model
    assert len(model.rope_cos) <= 4096
    with torch.inference_mode():
        few = list(model.generate([1, 5], 3, temperature=0))
    assert len(few) == 3


def test_positions_past_the_first_tables_are_computed(run, monkeypatch):
    out, _, _ = run
    whole = load(str(out / "ckpt.pt"), tokenizer="none").model
    monkeypatch.setattr("model.INITIAL_ROOM", 4)
    short = load(str(out / "ckpt.pt"), tokenizer="none").model
    assert len(short.rope_cos) == 4
    short_cache = KVCache(short.args, 1, "cpu", torch.float32, 4)
    ids = []
    tokens = torch.arange(1, 41)[None]
    with torch.no_grad():
        expected = whole(tokens)
        for i in range(40):
            ids.append(short(tokens[:, i : i + 1], cache=short_cache))
        assert torch.equal(short(tokens), expected)
    torch.testing.assert_close(torch.cat(ids, 1), expected, atol=1e-5, rtol=1e-4)


# ---- not a regular file


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(run, practice, tmp_path, kind):
    path = tmp_path / "out" / "ckpt.pt"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    expected = "contains no model: expected|is not a sharded checkpoint: the folder has no"
    if kind != "folder":
        expected = "is a pipe or a device"
    flags = [f"--data_dir={practice}", f"--out_dir={tmp_path / 'new'}"]
    resume = [f"--data_dir={practice}", f"--out_dir={path.parent}", "--init_from=resume"]
    for command in (
        ["train.py", *flags, f"--init_from={path}"],
        ["train.py", *resume],
        ["sample.py", f"--out_dir={path.parent}"],
        ["sample.py", f"--checkpoint={path}"],
        ["generate.py", path],
        ["export.py", tmp_path / "model.bin", f"--checkpoint={path}"],
    ):
        done = script(*command)
        refused(done)
        assert re.search(expected, done.stderr), done.stderr
    assert os.listdir(path.parent) == ["ckpt.pt"]


def test_a_step_past_the_end_is_refused(run, practice, tmp_path):
    out, _, _ = run
    good = torch.load(out / "ckpt.pt", weights_only=True)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "ckpt.pt"
    torch.save({**good, "iter_num": 10**9}, path)
    before = path.read_bytes()
    done = script("train.py", f"--out_dir={path.parent}", "--init_from=resume")
    refused(done, "this run is complete (1000000000 steps); raise --max_iters")
    assert path.read_bytes() == before and os.listdir(path.parent) == ["ckpt.pt"]
