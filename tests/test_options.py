"""Every option of the architecture, and both optimizers: trained, resumed, shared, told in C."""

import shutil
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_model, read_log, script
from test_parallel import train_with

from loss import CrossEntropy
from model import ARCHS, KVCache, ModelArgs
from training.checkpoint import load_checkpoint

STEPS, HALF = 12, 6
WORDS = [f"--max_iters={STEPS}", f"--eval_interval={HALF}", "--log_interval=1", "--keep_last=3"]
PLAIN = ["--arch=llama", "--bigram_rows=0"]
OPTIONS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "no gains": {"norm_gains": False, "qk_norm": True},
    "zero_init": {"zero_init": True},
    "untied": {"tie_embeddings": False, "vocab_multiple": 64},
    "wide": {"tie_embeddings": False, "zero_init": True},
    "stds": {"tie_embeddings": False, "embedding_std": 1.0, "head_std": 0.05},
    "relu2": {"activation": "relu2"},
    "softcap": {"logit_softcap": 5.0},
    "windows": {"sliding_window": 8, "window_pattern": "SL"},
    "embedding_norm": {"embedding_norm": True},
    "scalars": {"residual_scalars": True},
    "values": {"value_embeddings": 1},
    "bigrams": {"bigram_rows": 64},
    "smear": {"smear": True, "embedding_norm": True},
    "modded": {**ARCHS["modded"], "bigram_rows": 64},
    "portable": ARCHS["portable"],
}


def test_no_option_is_left_out():
    """Each field of ModelArgs that is no size of plain Llama is tried above."""
    sizes = "dim n_layers n_heads n_kv_heads vocab_size hidden_dim multiple_of max_seq_len".split()
    others = {*sizes, "norm_eps", "rope_theta", "dropout"}
    tried = {name for options in OPTIONS.values() for name in options}
    assert {f.name for f in fields(ModelArgs)} == others | tried


def test_llama_is_what_remains_without_options():
    assert ModelArgs() == ModelArgs(**ARCHS["llama"])
    for arch in ARCHS.values():
        for name, value in arch.items():
            assert getattr(ModelArgs(), name) != value


def options_model(name, **numbers):
    return random_model(**{"n_layers": 3, "n_kv_heads": 2, **numbers, **OPTIONS[name]})


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_in_pieces_is_the_loss(name):
    """Loss and gradients of the fused head against logits and PyTorch's cross_entropy."""
    model = options_model(name, vocab_size=105)
    tokens = torch.randint(0, 105, (2, 32))
    targets = torch.randint(0, 105, (2, 32))
    targets[0, 3:9] = -1
    logits = model(tokens)
    assert logits.shape == (2, 32, 105)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    params = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_many_pieces_are_one_loss(softcap):
    """300 tokens in pieces of 128, the last one short, with padded rows and places left out."""
    torch.manual_seed(1)
    x, weight = torch.randn(300, 32, requires_grad=True), torch.randn(4096, 32, requires_grad=True)
    targets = torch.randint(0, 4090, (300,))
    targets[5:200:7] = -1
    logits = x @ weight[:4090].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets, ignore_index=-1)
    loss, alone = (
        CrossEntropy.apply(x, weight, targets, 4090, softcap, wants_gradients, False)
        for wants_gradients in (True, False)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(alone, expected)
    for a, b in zip(*(torch.autograd.grad(z, [x, weight]) for z in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cache_gives_the_logits_of_the_whole(name):
    model = options_model(name)
    tokens = torch.randint(0, 105, (2, 32))
    whole = model(tokens)
    cache = KVCache(model.args, 2, "cpu", torch.float32)
    with torch.no_grad():
        logits = [model(tokens[:, :5], cache=cache)]
        logits += [model(tokens[:, t : t + 1], cache=cache) for t in range(5, 31)]
        torch.testing.assert_close(torch.cat(logits, 1), whole[:, 4:31], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("numbers", [{}, {"dim": 128, "n_heads": 2}], ids=["small", "large"])
@pytest.mark.parametrize("T", [32, 31])
@pytest.mark.parametrize("name", ["plain", "windows", "modded"])
def test_bfloat16_attention_agrees(name, T, numbers):
    """The written-out attention of a CPU in bfloat16, small heads and large, against float32."""
    model = options_model(name, **numbers)
    tokens = torch.randint(0, 105, (2, T))
    expected = model(tokens, tokens)
    model.dtype = torch.bfloat16
    torch.testing.assert_close(model(tokens, tokens), expected, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("name", ["untied", "softcap"])
def test_an_8_bit_head_is_nearly_the_head(name):
    """Loss within a hundredth, gradients that point the same way; evaluation is not touched."""
    model = options_model(name, vocab_size=112)
    tokens = torch.randint(0, 112, (2, 32))
    targets = torch.randint(0, 112, (2, 32))
    targets[0, 3:9] = -1
    params = [model.output.weight, model.layers[0].attention.wq.weight]
    expected = model.train()(tokens, targets)
    gradients = torch.autograd.grad(expected, params)
    model.fp8_head = True
    loss = model(tokens, targets)
    assert loss != expected and loss.item() == pytest.approx(expected.item(), rel=0.01)
    for a, b in zip(torch.autograd.grad(loss, params), gradients, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.05)
    assert model.eval()(tokens, targets) == expected


def test_a_padded_vocabulary_is_never_drawn():
    model = options_model("untied")
    assert model.output.weight.shape[0] == 128 and model.args.vocab_size == 105
    torch.manual_seed(1)
    tokens = torch.randint(0, 105, (2, 32))
    loss = model(tokens, tokens)
    with torch.no_grad():
        model.output.weight[105:] = 1e4
    assert torch.equal(model(tokens, tokens), loss)


@pytest.fixture(scope="module")
def half_runs(tmp_path_factory, practice):
    """Of each option and optimizer the run of 12 steps with its checkpoint of step 6, on demand."""
    folder, made = tmp_path_factory.mktemp("options"), {}

    def run_of(name, optimizer):
        out = folder / f"{name}_{optimizer}".replace(" ", "_")
        if out not in made:
            made[out] = words = [*PLAIN, *WORDS, f"--optimizer={optimizer}"]
            words += [f"--{k}={v}" for k, v in OPTIONS[name].items()]
            flags = [f"--data_dir={practice}", f"--out_dir={out}"]
            done = script("train.py", *TINY, *flags, *words)
            assert done.returncode == 0, done.stderr
        return out, made[out]

    return run_of


def log_of(out):
    return {
        (e["kind"], e["step"]): e.get("loss", e.get("val_loss"))
        for e in read_log(out)
        if e["kind"] in ("train", "eval")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, optimizer",
    [*((name, "muon") for name in OPTIONS), ("plain", "adamw"), ("modded", "adamw")],
)
def test_every_option_resumes_and_is_shared(half_runs, practice, tmp_path, name, optimizer):
    """From the checkpoint of step 6: alone, bit for bit; by two processes, within 1e-5."""
    whole, words = half_runs(name, optimizer)
    for n in (1, 2):
        out = tmp_path / str(n)
        out.mkdir()
        shutil.copyfile(whole / f"ckpt_{HALF:06}.pt", out / "ckpt.pt")
        shutil.copyfile(whole / "log.jsonl", out / "log.jsonl")
        train_with(n, practice, out, *words, "--init_from=resume")
        found, expected = log_of(out), log_of(whole)
        assert found.keys() == expected.keys() and len(found) == STEPS + STEPS // HALF
        if n == 1:
            assert found == expected
            a, b = (load_checkpoint(folder / "ckpt.pt") for folder in (out, whole))
            for part in ("model", "optimizer"):
                assert a[part].keys() == b[part].keys()
                assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
        assert max(abs(found[key] - expected[key]) for key in found) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_trained_is_told_by_c(half_runs, run, name):
    """./run and sample.py tell the same story at temperature 0."""
    out, _ = half_runs(name, "muon")
    words = [f"--out_dir={out}", "--temperature=0", "--start=Once", "--max_new_tokens=30"]
    told = script("sample.py", *words, "--device=cpu")
    assert told.returncode == 0, told.stderr
    done = run(out / "model.bin", "-t", "0", "-n", "31", "-i", "Once")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip()[:20] == told.stdout.strip()[:20]
