"""Checkpoints and model files: the exact bytes, what is refused, and that nothing is lost."""

import os
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


# A value other than the default of each option that version 0 cannot carry
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
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_version_0_cannot_carry_is_refused_by_name(tmp_path, name):
    model = random_model(**{name: OPTIONS[name]})
    path = tmp_path / "model.bin"
    path.write_bytes(b"an older model")
    with pytest.raises(UserError, match=f"version 0 cannot carry {name} = {OPTIONS[name]}"):
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
def test_the_version_is_0_where_that_carries_the_model(tmp_path, options, version):
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
def test_version_3_says_everything_about_itself(tmp_path, options):
    model = random_model(**options)
    args, path = model.args, tmp_path / "model.bin"
    export_model(model, path, version=3, fingerprint=0xFEDCBA98)
    data = path.read_bytes()
    names = [name for name, *_ in V3_HEADER]
    fields = dict(zip(names, struct.unpack_from(V3_STRUCT, data), strict=True))
    assert list(fields)[:4] == ["magic", "version", "file_size", "header_size"]
    assert data[:8] == b"24ka\3\0\0\0" and fields.pop("magic") == 0x616B3432
    assert fields.pop("version") == 3 and fields.pop("file_size") == len(data)
    assert fields.pop("header_size") == 84 and fields.pop("dtype") == 0
    assert fields.pop("tokenizer") == 0xFEDCBA98
    bits = fields.pop("options")
    for bit, name in enumerate(V3_OPTIONS):
        assert bits >> bit & 1 == getattr(args, name), name
    assert not bits >> len(V3_OPTIONS)
    assert fields.pop("activation") == (args.activation == "relu2")
    for name, value in fields.items():
        assert value == np.float32(getattr(args, name)), name
    windows = struct.unpack_from(f"<{args.n_layers}i", data, 84)
    assert windows == ((5, 5, 0, 5, 5) if options is EVERYTHING else (0, 0))

    # every number of the model, once, from multiples of 64 on, with zeros between
    end, left = 84 + 4 * args.n_layers, set(model.state_dict())
    for name, parts in tensors(model):
        place = -(-end // 64) * 64
        assert not any(data[end:place])
        end = place
        for part in parts:
            found = np.frombuffer(data, "<f4", part.numel(), end)
            assert (found == part.detach().numpy().ravel()).all(), name
            end += 4 * part.numel()
        layers = range(len(parts))
        keys = {name, f"{name}.weight", *(f"layers.{i}.{name}.weight" for i in layers)}
        keys |= {f"{name}.{i}.weight" for i in layers}
        assert keys & left, name
        left -= keys
    assert end == len(data) and left == ({"output.weight"} if args.tie_embeddings else set())


def test_version_3_writes_nothing_that_its_readers_refuse(tmp_path):
    expected = f"version 3 cannot carry sliding_window = {1 << 25}: expected"
    with pytest.raises(UserError, match=expected):
        export_model(random_model(sliding_window=1 << 25), tmp_path / "model.bin")
    assert not os.listdir(tmp_path)


def test_an_option_that_export_does_not_know_is_refused_by_name(tmp_path, monkeypatch):
    without_smear = modelbin.Target(modelbin.V3_TARGET.can - {"smear"})
    monkeypatch.setattr(modelbin, "V3_TARGET", without_smear)
    with pytest.raises(UserError, match="version 3 cannot carry smear = True"):
        export_model(random_model(smear=True), tmp_path / "model.bin")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_numbers_are_near(dtype):
    torch.manual_seed(0)
    codes, w = DTYPES[dtype], torch.randn(50, 150) * torch.logspace(-6, 2, 50)[:, None]
    w[7], w[8, 64:128] = 0, 0
    numbers, scales = quantized(w, codes)
    n_groups = -(-150 // codes.group)
    assert numbers.shape == w.shape and scales.shape == (50, n_groups)
    assert int(numbers.min()) >= (1 if dtype == "int8" else 0)
    assert int(numbers.max()) < 1 << codes.bits
    scales = scales.float().repeat_interleave(codes.group, 1)[:, :150]
    found = (numbers.float() - codes.zero) * scales
    error = (found - w).square().sum() / w.square().sum()
    assert error.sqrt() < (0.006 if dtype == "int8" else 0.1)
    assert (found[7] == 0).all() and (found[8, 64:128] == 0).all()


def test_command_line(tmp_path):
    out, checkpoint = tmp_path / "model.bin", f"--checkpoint={tmp_path / 'ckpt.pt'}"
    model = random_model()
    save(model, tmp_path / "ckpt.pt")
    for words, version in ([], 0), (["--version=3"], 3):
        export_model(model, tmp_path / "expected.bin", version)
        done = script("export.py", out, checkpoint, *words)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == (tmp_path / "expected.bin").read_bytes()
    export_model(model, tmp_path / "expected.bin", 3, "int8")
    done = script("export.py", out, checkpoint, "--dtype=int8")
    assert out.read_bytes() == (tmp_path / "expected.bin").read_bytes()
    refused(script("export.py", out, checkpoint, "--dtype=int3"), "fp32, bf16, int8, int4")
    done = script("export.py", out, checkpoint, "--dtype=bf16", "--version=0")
    refused(done, "version 0 cannot carry dtype = bf16")
    done = script("export.py", out, checkpoint, "--version=9")
    assert done.returncode == 2 and "choose from" in done.stderr
    save(random_model(smear=True), tmp_path / "ckpt.pt")
    refused(script("export.py", out, checkpoint, "--version=0"), "cannot carry smear = True")
    refused(script("export.py", out, f"--checkpoint={tmp_path / 'none'}"), "does not exist")
    (tmp_path / "previous").mkdir()
    done = script("export.py", out, f"--checkpoint={tmp_path / 'none'}")
    refused(done, "the run before it is in", "previous")
    before = (tmp_path / "ckpt.pt").read_bytes()
    refused(script("export.py", tmp_path / "ckpt.pt", checkpoint), "would be lost")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    refused(script("export.py", tmp_path / "previous", checkpoint), "it is a folder")


def test_llama2cs_own_checkpoints_load(tmp_path):
    """Names as torch.compile leaves them, None for n_kv_heads, and no hidden_dim."""
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


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(random_model(), tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    for data in (b"", b"text", whole[:1000], whole[: len(whole) // 2], whole[:-50]):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(UserError, match=r"bad.pt is damaged or no checkpoint"):
            load_checkpoint(tmp_path / "bad.pt")
    torch.save({"model": Hostile(), "model_args": {}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="holds more than numbers and was not loaded"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not os.path.exists("hostile-code-ran")
    for value in ([1], {"model": {}}, torch.zeros(3)):
        torch.save(value, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="has no model and model_args"):
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
def test_names_of_wrapped_models(tmp_path, prefix):
    """Checkpoints of other programs keep the prefixes of DDP and torch.compile."""
    model = random_model()
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    found = load_model({"model": state, "model_args": model.args.to_dict()}, "x.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True)
    )
    state["net.norm.weight"] = state.pop(f"{prefix}norm.weight")
    with pytest.raises(UserError, match=r'x.pt does not fit this model: Missing .*"norm.weight"'):
        load_model({"model": state, "model_args": model.args.to_dict()}, "x.pt")
