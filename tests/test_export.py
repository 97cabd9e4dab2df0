"""Checkpoints, model.bin and export.py: the exact bytes, the command line, and what is refused."""

import os
import re
import struct

import numpy as np
import pytest
import torch
from conftest import EVERYTHING, random_model, refused, script

from configurator import UserError
from formats import modelbin
from formats.modelbin import (
    DTYPES,
    MAGIC,
    V3_HEADER,
    V3_OPTIONS,
    V3_STRUCT,
    export_model,
    quantized,
    tensors,
)
from formats.table import FORMATS, SOURCES
from training.checkpoint import load_checkpoint, load_model, save_file


def save(model, path):
    save_file(path, {"model": model.state_dict(), "model_args": model.args.to_dict()})


@pytest.mark.parametrize("tied", [True, False])
def test_version_0_is_llama2cs_layout(tmp_path, tied):
    model = random_model(n_kv_heads=2, tie_embeddings=tied)
    export_model(model, tmp_path / "model.bin")
    data = (tmp_path / "model.bin").read_bytes()
    vocab = 105 if tied else -105
    assert struct.unpack_from("<7i", data) == (48, model.args.hidden_dim, 2, 4, 2, vocab, 32)
    floats, at = np.frombuffer(data, "<f4", offset=28), 0
    state = model.state_dict()

    def expect(*names):
        nonlocal at
        for name in names:
            tensor = state[name].flatten().numpy()
            assert (floats[at : at + len(tensor)] == tensor).all(), name
            at += len(tensor)

    def per_layer(name):
        expect(*(f"layers.{i}.{name}.weight" for i in range(2)))

    expect("tok_embeddings.weight")
    for name in ("attention_norm", *(f"attention.w{x}" for x in "qkvo"), "ffn_norm"):
        per_layer(name)
    for name in ("w1", "w2", "w3"):
        per_layer(f"feed_forward.{name}")
    expect("norm.weight")
    positions, pairs = np.meshgrid(np.arange(32), np.arange(6), indexing="ij")
    angles = positions * 10000.0 ** (-2 * pairs / 12)
    for table in (np.cos(angles), np.sin(angles)):
        assert np.abs(floats[at : at + 32 * 6] - table.ravel()).max() < 1e-5
        at += 32 * 6
    if not tied:
        expect("output.weight")
    assert at == len(floats)


# Options that version 0 cannot store, each with a value other than its default
OPTIONS = {
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "qk_norm": True,
    "norm_gains": False,
    "activation": "relu2",
    "logit_softcap": 15.0,
    "sliding_window": 5,
    "embedding_norm": True,
    "residual_scalars": True,
    "value_embeddings": 1,
    "bigram_rows": 64,
    "smear": True,
    "separate_documents": True,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_version_0_refuses_other_options_by_name(tmp_path, name):
    model = random_model(**{name: OPTIONS[name]})
    path = tmp_path / "model.bin"
    path.write_bytes(b"an older model")
    with pytest.raises(
        UserError, match=f"version 0 cannot store {name} = {OPTIONS[name]}: use --v"
    ):
        export_model(model, path, version=0)
    assert path.read_bytes() == b"an older model" and os.listdir(tmp_path) == ["model.bin"]


def version_of(path):
    magic, version = struct.unpack_from("<2I", path.read_bytes())
    return version if magic == MAGIC else 0


@pytest.mark.parametrize(
    "options, version",
    [
        ({}, 0),
        ({"tie_embeddings": False, "vocab_multiple": 64, "zero_init": True, "dropout": 0.1}, 0),
        ({"window_pattern": "SL"}, 0),
        ({"sliding_window": 5, "window_pattern": "L"}, 0),
        ({"sliding_window": 5, "window_pattern": "LS"}, 3),
        *(({name: value}, 3) for name, value in OPTIONS.items()),
    ],
)
def test_the_default_is_version_0_if_it_can_store_the_model(tmp_path, options, version):
    export_model(random_model(**options), tmp_path / "model.bin")
    assert version_of(tmp_path / "model.bin") == version


@pytest.mark.parametrize("version", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_past_the_vocabulary_are_not_exported(tmp_path, version, tied):
    options = {} if version == 0 else {"value_embeddings": 2}
    padded = random_model(vocab_multiple=64, tie_embeddings=tied, **options)
    state = padded.state_dict()
    assert len(state["tok_embeddings.weight"]) == len(state["output.weight"]) == 128
    plain = random_model(tie_embeddings=tied, **options)
    tables = ("tok_embeddings", "output", "value_embeddings")
    plain.load_state_dict({k: v[:105] if k.startswith(tables) else v for k, v in state.items()})
    for name, model in (("padded", padded), ("plain", plain)):
        export_model(model, tmp_path / name, version)
    assert (tmp_path / "padded").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, EVERYTHING], ids=repr)
def test_version_3_describes_itself_completely(tmp_path, options):
    model = random_model(**options)
    args, path = model.args, tmp_path / "model.bin"
    export_model(model, path, version=3, fingerprint=0xFEDCBA98)
    data = path.read_bytes()
    names = [name for name, *_ in V3_HEADER]
    fields = dict(zip(names, struct.unpack_from(V3_STRUCT, data), strict=True))
    assert list(fields)[:4] == ["magic", "version", "file_size", "header_size"]
    assert data[:8] == b"24ka\3\0\0\0" and fields.pop("magic") == 0x616B3432
    assert fields.pop("version") == 3 and fields.pop("file_size") == len(data)
    assert fields.pop("header_size") == 92 and fields.pop("dtype") == 0
    assert fields.pop("tokenizer") == 0xFEDCBA98
    bits = fields.pop("options")
    for bit, name in enumerate(V3_OPTIONS):
        assert bits >> bit & 1 == getattr(args, name), name
    assert not bits >> len(V3_OPTIONS)
    assert fields.pop("activation") == (args.activation == "relu2")
    for name, value in fields.items():
        assert value == np.float32(getattr(args, name)), name
    windows = struct.unpack_from(f"<{args.n_layers}i", data, 92)
    assert windows == ((5, 5, 0, 5, 5) if options is EVERYTHING else (0, 0))

    # each weight once; tensors start at multiples of 64, with zeros between them
    end, left = 92 + 4 * args.n_layers, set(model.state_dict())
    for name, parts in tensors(model):
        start = -(-end // 64) * 64
        assert not any(data[end:start])
        end = start
        for part in parts:
            values = np.frombuffer(data, "<f4", part.numel(), end)
            assert (values == part.detach().numpy().ravel()).all(), name
            end += 4 * part.numel()
        layers = range(len(parts))
        keys = {name, f"{name}.weight", *(f"layers.{i}.{name}.weight" for i in layers)}
        keys |= {f"layers.{i}.{name}" for i in layers}
        keys |= {f"{name}.{i}.weight" for i in layers}
        assert keys & left, name
        left -= keys
    assert end == len(data) and left == ({"output.weight"} if args.tie_embeddings else set())


def test_version_3_refuses_to_write_what_its_readers_refuse(tmp_path):
    expected = f"version 3 cannot store sliding_window = {1 << 25}: expected"
    with pytest.raises(UserError, match=expected):
        export_model(random_model(sliding_window=1 << 25), tmp_path / "model.bin")
    assert not os.listdir(tmp_path)


def test_an_option_that_version_3_does_not_know_is_refused_by_name(tmp_path, monkeypatch):
    without_smear = modelbin.Target(modelbin.V3_TARGET.supported - {"smear"})
    monkeypatch.setattr(modelbin, "V3_TARGET", without_smear)
    with pytest.raises(UserError, match="version 3 cannot store smear = True: use --format="):
        export_model(random_model(smear=True), tmp_path / "model.bin")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_values_are_close_to_the_originals(dtype):
    torch.manual_seed(0)
    codes, w = DTYPES[dtype], torch.randn(50, 150) * torch.logspace(-6, 2, 50)[:, None]
    w[7], w[8, 64:128] = 0, 0
    integers, scales = quantized(w, codes)
    n_groups = -(-150 // codes.group)
    assert integers.shape == w.shape and scales.shape == (50, n_groups)
    assert int(integers.min()) >= (1 if dtype == "int8" else 0)
    assert int(integers.max()) < 1 << codes.bits
    scales = scales.float().repeat_interleave(codes.group, 1)[:, :150]
    restored = (integers.float() - codes.zero) * scales
    error = (restored - w).square().sum() / w.square().sum()
    assert error.sqrt() < (0.006 if dtype == "int8" else 0.1)
    assert (restored[7] == 0).all() and (restored[8, 64:128] == 0).all()


def test_the_command_line_sets_version_and_dtype(tmp_path):
    out, checkpoint = tmp_path / "model.bin", f"--checkpoint={tmp_path / 'ckpt.pt'}"
    model = random_model()
    save(model, tmp_path / "ckpt.pt")
    for args, version in ([], 0), (["--version=3"], 3), (["--version", "0"], 0):
        export_model(model, tmp_path / "expected.bin", version)
        done = script("export.py", out, checkpoint, *args)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == (tmp_path / "expected.bin").read_bytes()
    export_model(model, tmp_path / "expected.bin", 3, "int8")
    done = script("export.py", out, checkpoint, "--dtype=int8")
    assert out.read_bytes() == (tmp_path / "expected.bin").read_bytes()
    refused(script("export.py", out, checkpoint, "--dtype=int3"), "fp32, bf16, int8, int4")
    done = script("export.py", out, checkpoint, "--dtype=bf16", "--version=0")
    refused(done, "version 0 cannot store dtype = bf16: use --version=3")
    for version, message in (
        (9, "version = 9: expected one of auto, 0, 3"),
        (2, "version = 2: llama2.c's int8 is read but not written; use --dtype=int8"),
    ):
        done = script("export.py", out, checkpoint, "--version", version)
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
    save(random_model(smear=True), tmp_path / "ckpt.pt")
    refused(script("export.py", out, checkpoint, "--version=0"), "cannot store smear = True")
    refused(script("export.py", out, f"--checkpoint={tmp_path / 'none'}"), "does not exist")
    (tmp_path / "previous").mkdir()
    done = script("export.py", out, f"--checkpoint={tmp_path / 'none'}")
    refused(done, "an earlier run is in", "previous")
    before = (tmp_path / "ckpt.pt").read_bytes()
    refused(script("export.py", tmp_path / "ckpt.pt", checkpoint), "part of the model to read")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    refused(script("export.py", tmp_path / "previous", checkpoint), "it is a folder")


def test_a_run_folder_stands_for_its_best_checkpoint_else_the_latest(tmp_path):
    run, out = tmp_path / "run", tmp_path / "model.bin"
    run.mkdir()
    refused(
        script("export.py", out, f"--checkpoint={run}"),
        f"{run} contains no model: expected best.pt, ckpt.pt or model.bin",
    )
    for seed, name in enumerate(("ckpt.pt", "best.pt")):
        model = random_model(seed=seed)
        save(model, run / name)
        export_model(model, tmp_path / "expected.bin")
        for path, args in (
            (out, [f"--checkpoint={run}"]),
            (run / "model.bin", ["--checkpoint", run]),
        ):
            done = script("export.py", path, *args)
            assert done.returncode == 0, done.stderr
            assert path.read_bytes() == (tmp_path / "expected.bin").read_bytes()
    before = {path: path.read_bytes() for path in run.iterdir()}
    for path in (run, *(run / name for name in ("ckpt.pt", "best.pt"))):
        to = "hf" if path == run else "checkpoint"
        done = script("export.py", path, f"--checkpoint={run}", f"--format={to}")
        refused(done, f"{path} already exists")
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_help_shows_every_setting_in_a_group_with_its_default():
    done = script("export.py", "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    head, _, settings = done.stdout.partition("\nusage: python export.py PATH [--key=value ...]\n")
    assert head.count("    python export.py ") >= 2
    groups = settings.split("\n\n")[1:]
    assert len(groups) == 7
    rows = [line for group in groups for line in group.splitlines()[1:]]
    assert all(group.splitlines()[0].endswith(":") for group in groups)
    assert all(re.fullmatch(r"  \S.*  +\S.*", row) for row in rows), "one line for each setting"
    shown = {row.split()[0] for row in rows}
    assert shown >= {"--checkpoint=out/ckpt.pt", "--dtype=DTYPE", "--version=auto", "--language=en"}
    assert shown >= {"--license=unknown", "--push-to-hub=USER/NAME", "--private", "--dry-run"}
    assert shown >= {f"--from-{name}=PATH" for name in SOURCES if name != "checkpoint"}
    assert shown >= {"--tokenizer=PATH", "--format=FORMAT", "--title=TEXT", *FORMATS}


def test_llama2cs_own_checkpoints_load(tmp_path):
    """With names as torch.compile leaves them, n_kv_heads = None, and no hidden_dim."""
    model = random_model(multiple_of=8)
    args = {k: getattr(model.args, k) for k in ("dim", "n_layers", "n_heads", "multiple_of")}
    args |= {"n_kv_heads": None, "vocab_size": 105, "max_seq_len": 32, "dropout": 0.0}
    state = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    torch.save({"model": state, "model_args": args, "iter_num": 5}, tmp_path / "ckpt.pt")
    loaded = load_model(load_checkpoint(tmp_path / "ckpt.pt"), "ckpt.pt")
    tokens = torch.randint(0, 105, (1, 9))
    assert torch.equal(loaded.eval()(tokens), model(tokens))


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-code-ran",))


def test_files_that_are_not_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(random_model(), tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    for data in (b"", b"text", whole[:1000], whole[: len(whole) // 2], whole[:-50]):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(UserError, match=r"bad.pt is damaged or not a checkpoint"):
            load_checkpoint(tmp_path / "bad.pt")
    torch.save({"model": Hostile(), "model_args": {}}, tmp_path / "bad.pt")
    with pytest.raises(
        UserError, match="was not loaded: it holds more than tensors and plain values"
    ):
        load_checkpoint(tmp_path / "bad.pt")
    assert not os.path.exists("hostile-code-ran")
    for value in ([1], {"model": {}}, torch.zeros(3)):
        torch.save(value, tmp_path / "bad.pt")
        with pytest.raises(
            UserError, match="is not a checkpoint: expected the fields model and model_args"
        ):
            load_checkpoint(tmp_path / "bad.pt")
    good = load_checkpoint(tmp_path / "good.pt")
    for args in ({"dim": 64}, {"window": 1}, {"n_heads": 5}, {"dim": "wide"}):
        with pytest.raises(UserError, match="does not fit"):
            load_model({**good, "model_args": {**good["model_args"], **args}}, "bad.pt")


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    save(random_model(), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_file(path, {"model": (lambda: 0)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_models_are_removed(tmp_path, prefix):
    """Checkpoints of other programs may keep the prefixes of DDP and torch.compile."""
    model = random_model()
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    loaded = load_model({"model": state, "model_args": model.args.to_dict()}, "x.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    state["net.norm.weight"] = state.pop(f"{prefix}norm.weight")
    with pytest.raises(UserError, match=r'x.pt does not fit this model: Missing .*"norm.weight"'):
        load_model({"model": state, "model_args": model.args.to_dict()}, "x.pt")


def test_export_suggests_the_nearest_setting_and_names_what_it_wrote(tmp_path, tokenizers):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(tokenizers[512].proto)
    export_model(random_model(vocab_size=512), tmp_path / "a" / "model.bin")
    source, out = tmp_path / "a" / "model.bin", tmp_path / "model.bin"
    done = script("export.py", out, f"--checkpont={source}")
    assert done.returncode == 2 and "did you mean --checkpoint?" in done.stderr
    done = script("export.py", out, f"--checkpoint={source}")
    assert done.stdout == f"wrote {tmp_path / 'tokenizer.bin'}\nwrote {out}\n"


def test_sample_notes_a_story_that_the_context_cuts(tmp_path, tokenizers):
    (tmp_path / "tokenizer.model").write_bytes(tokenizers[512].proto)
    model = random_model(vocab_size=512, tie_embeddings=False, max_seq_len=16)
    with torch.no_grad():  # at a low temperature no story ends
        model.output.weight[1:3] = 0
    export_model(model, tmp_path / "model.bin")
    args = [f"--checkpoint={tmp_path / 'model.bin'}", "--temperature=0"]
    note = "note: this story stops at the model's context of 16 tokens"
    assert note in script("sample.py", *args, "--max_new_tokens=100").stderr
    assert note not in script("sample.py", *args, "--max_new_tokens=5").stderr
