"""Calibration: int4 keeps what a model computes on a text, or on its own stories."""

import pytest
import torch
from conftest import random_model, refused, script

from configurator import UserError
from formats import calibration
from formats.calibration import calibrate, gptq, solve
from formats.modelbin import DTYPES, export_model, quantized, read_bin, values_of
from formats.table import load
from model import ARCHS

CODES = DTYPES["int4"]
MODELS = {
    "llama": {"dim": 72, "n_heads": 3, "n_kv_heads": 1, "hidden_dim": 100, "tie_embeddings": False},
    "modded": {**ARCHS["modded"], "bigram_rows": 200, "dim": 64, "n_heads": 2},
}


@pytest.mark.parametrize("columns", (32, 72, 200))
def test_products_keep_more_of_correlated_inputs(columns):
    generator = torch.Generator().manual_seed(columns)
    matrix = torch.randn(40, columns, generator=generator)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(1000, columns // 4, generator=generator) @ mixing
    x += 0.1 * torch.randn(1000, columns, generator=generator)
    x[:, 3] = 0  # an input that is always 0
    expected = x @ matrix.T

    def error(integers, scales):
        assert integers.shape == matrix.shape and int(integers.max()) <= 15
        assert scales.shape == (40, -(-columns // 32)) and scales.dtype == torch.bfloat16
        return float((x @ values_of(integers, scales, CODES).T - expected).square().mean())

    assert error(*gptq(matrix, *solve(x, x), CODES)) < 0.5 * error(*quantized(matrix, CODES))


def test_a_text_cannot_be_read_without_its_tokenizer():
    with pytest.raises(UserError, match="needs the tokenizer"):
        calibrate(random_model(vocab_size=512), None, "text.txt")


def errors_of_logits(model, tokenizer, texts, ways, path):
    """Return the mean squared errors of int4 logits on texts, for some ways of calibration."""
    tokens = torch.tensor([tokenizer.encode(text)[:60] for text in texts])
    errors = []
    with torch.no_grad():
        expected = model(tokens)
        for how in ways:
            export_model(model, path, dtype="int4", rounded=calibrate(model, tokenizer, how))
            errors.append(float((read_bin(path).eval()(tokens) - expected).square().mean()))
    return errors


def test_a_matrix_makes_up_for_what_is_wrong_with_its_inputs():
    generator = torch.Generator().manual_seed(1)
    matrix, exact = (torch.randn(n, 64, generator=generator) for n in (40, 1000))
    x = exact * 0.7 + 0.1 * exact.roll(1, 1)
    expected, errors = exact @ matrix.T, []
    for target in (x, exact):
        result = values_of(*gptq(matrix, *solve(x, target), CODES), CODES)
        errors.append(float((x @ result.T - expected).square().mean()))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_calibrated_model_computes_nearly_the_same(tokenizers, stories, tmp_path, name):
    model = random_model(vocab_size=512, max_seq_len=64, **MODELS[name])
    before = {key: t.clone() for key, t in model.state_dict().items()}
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(stories[:200]))
    compared = model, tokenizers[512], stories[500:532], ("none", str(text)), tmp_path / "m.bin"
    plain, calibrated = errors_of_logits(*compared)
    assert calibrated < 0.9 * plain
    assert all(t.equal(before[key]) for key, t in model.state_dict().items())


def test_a_trained_model_needs_no_text(trained, stories, tmp_path):
    model, tokenizer, _ = load(str(trained / "ckpt.pt"))
    compared = model.eval(), tokenizer, stories[:32], ("none", ""), tmp_path / "m.bin"
    plain, calibrated = errors_of_logits(*compared)
    assert calibrated < 0.9 * plain


def test_export_calibrates_int4_and_refuses_what_it_cannot_use(trained, tmp_path, monkeypatch):
    def export(*flags):
        return script("export.py", tmp_path / "m.bin", f"--checkpoint={trained}", *flags)

    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "short.txt").write_text("Once upon a time.")
    refused(export("--dtype=int4", f"--calibrate={tmp_path}/missing.txt"), "does not exist")
    refused(export("--dtype=int4", f"--calibrate={tmp_path}/empty.txt"), "no text to calibrate on")
    refused(export("--dtype=int8", "--calibrate=none"), "--dtype=int4")
    assert not (tmp_path / "m.bin").exists()
    files = set()
    for flags in ([], ["--calibrate=none"], [f"--calibrate={tmp_path}/short.txt"]):
        done = export("--dtype=int4", *flags)
        assert not done.returncode, done.stderr
        files.add((tmp_path / "m.bin").read_bytes())
    assert len(files) == 3 and len({len(data) for data in files}) == 1


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e30))
def test_a_model_that_cannot_be_calibrated_is_rounded(tokenizers, tmp_path, value):
    model = random_model(vocab_size=512)
    with torch.no_grad():
        model.layers[0].feed_forward.w1.weight[0, 0] = value
    rounded = calibrate(model, tokenizers[512], "")
    export_model(model, tmp_path / "m.bin", dtype="int4", rounded=rounded)
    assert read_bin(tmp_path / "m.bin").args.dim == model.args.dim


def test_a_model_that_ends_its_stories_at_once_is_calibrated(tokenizers, monkeypatch):
    monkeypatch.setattr(calibration, "N_TOKENS", 300)
    model = random_model(vocab_size=512, max_seq_len=16, tie_embeddings=False)
    with torch.no_grad():
        model.output.weight[tokenizers[512].stop[0]] *= 0
        model.output.weight[tokenizers[512].stop[0]] += 100 * model.norm.weight
    assert len(calibrate(model, tokenizers[512], "")) == 2 * 7 + 2
