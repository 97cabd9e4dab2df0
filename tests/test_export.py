"""Checkpoints and model files: the exact bytes, what is refused, and that nothing is lost."""

import os
import struct

import numpy as np
import pytest
import torch
from conftest import random_model, refused, script

from checkpoint import load_checkpoint, load_model, save_file
from configurator import UserError
from export import export_model


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


@pytest.mark.parametrize("option", [{"norm_eps": 1e-6}, {"rope_theta": 500000.0}])
def test_what_version_0_cannot_carry_is_refused_by_name(tmp_path, option):
    model = random_model(**option)
    path = tmp_path / "model.bin"
    path.write_bytes(b"an older model")
    with pytest.raises(UserError, match=f"cannot carry {next(iter(option))}"):
        export_model(model, path)
    assert path.read_bytes() == b"an older model" and os.listdir(tmp_path) == ["model.bin"]


def test_command_line(tmp_path):
    model = random_model()
    save(model, tmp_path / "ckpt.pt")
    export_model(model, tmp_path / "expected.bin")
    out = tmp_path / "model.bin"
    done = script("export.py", out, f"--checkpoint={tmp_path / 'ckpt.pt'}", "--version=0")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "expected.bin").read_bytes()
    done = script("export.py", out, f"--checkpoint={tmp_path / 'ckpt.pt'}", "--version=9")
    refused(done, "version 9: expected one of 0")
    refused(script("export.py", out, f"--checkpoint={tmp_path / 'none'}"), "does not exist")


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
