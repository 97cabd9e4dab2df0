"""Every option of the architecture, and both optimizers: trained, resumed, shared, run in C."""

import shutil
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_model, read_log, script
from test_parallel import train_with

from dataset import STRESSED
from loss import CrossEntropy
from model import ARCHS, KVCache, ModelArgs
from training.checkpoint import load_checkpoint

STEPS, HALF = 12, 6
ARGS = [f"--max_iters={STEPS}", f"--eval_interval={HALF}", "--log_interval=1", "--keep_last=3"]
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
    "embedding_conv": {"embedding_conv": 4, "bigram_rows": 64},
    "key_conv": {"key_conv": 3, "qk_norm": True},
    "documents": {"separate_documents": True, "bos_id": 5},
    "modded": {**ARCHS["modded"], "bigram_rows": 64},
    "portable": ARCHS["portable"],
}


def test_no_option_is_left_out():
    """OPTIONS covers every field of ModelArgs except the sizes of plain Llama."""
    sizes = "dim n_layers n_heads n_kv_heads vocab_size hidden_dim multiple_of max_seq_len".split()
    others = {*sizes, "norm_eps", "rope_theta", "dropout", "orders"}
    covered = {name for options in OPTIONS.values() for name in options}
    assert {f.name for f in fields(ModelArgs)} == others | covered


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model = random_model(vocab_size=105).train()
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    loss = model(tokens, torch.full_like(tokens, -1))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_plain_llama_is_the_default():
    assert ModelArgs() == ModelArgs(**ARCHS["llama"])
    for arch in ARCHS.values():
        for name, value in arch.items():
            assert getattr(ModelArgs(), name) != value


def options_model(name, **sizes):
    return random_model(**{"n_layers": 3, "n_kv_heads": 2, **sizes, **OPTIONS[name]})


@pytest.mark.parametrize("name", OPTIONS)
def test_the_fused_loss_equals_cross_entropy(name):
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
def test_a_loss_in_chunks_equals_cross_entropy(softcap):
    """300 tokens in chunks of 128; padded rows, and targets that are ignored or count thrice."""
    torch.manual_seed(1)
    x, weight = torch.randn(300, 32, requires_grad=True), torch.randn(4096, 32, requires_grad=True)
    targets = torch.randint(0, 4090, (300,))
    targets[5:200:7] = -1
    logits = x @ weight[:4090].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    counts = torch.where(targets < 0, 0, 1.0)
    counts[::11] *= 3
    expected = (counts * F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")).sum()
    expected = expected / counts.sum()
    stressed = torch.where(targets < 0, -1, targets | STRESSED)
    targets = torch.where(torch.arange(300) % 11 == 0, stressed, targets)
    loss, loss_only = (
        CrossEntropy.apply(x, weight, targets, 4090, softcap, wants_gradients, False, 3.0)
        for wants_gradients in (True, False)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss_only, expected)
    for a, b in zip(*(torch.autograd.grad(z, [x, weight]) for z in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cache_gives_the_same_logits(name):
    model = options_model(name)
    tokens = torch.randint(0, 105, (2, 32))
    expected = model(tokens)
    cache = KVCache(model.args, 2, "cpu", torch.float32)
    with torch.no_grad():
        logits = [model(tokens[:, :5], cache=cache)]
        logits += [model(tokens[:, t : t + 1], cache=cache) for t in range(5, 31)]
        torch.testing.assert_close(torch.cat(logits, 1), expected[:, 4:31], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sizes", [{}, {"dim": 128, "n_heads": 2}], ids=["small", "large"])
@pytest.mark.parametrize("T", [32, 31])
@pytest.mark.parametrize("name", ["plain", "windows", "modded"])
def test_bfloat16_attention_agrees_with_float32(name, T, sizes):
    """The explicit attention that a CPU uses in bfloat16, with small and large heads."""
    model = options_model(name, **sizes)
    tokens = torch.randint(0, 105, (2, T))
    expected = model(tokens, tokens)
    model.dtype = torch.bfloat16
    torch.testing.assert_close(model(tokens, tokens), expected, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("name", ["untied", "softcap"])
def test_an_fp8_head_is_close_to_the_exact_head(name):
    """The loss is within 1 %, gradients point the same way, and evaluation does not change."""
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


def test_padding_of_the_vocabulary_does_not_change_the_loss():
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
    """A function that makes the run of an option and optimizer once: 12 steps, saved at step 6."""
    folder, made = tmp_path_factory.mktemp("options"), {}

    def run_of(name, optimizer):
        out = folder / f"{name}_{optimizer}".replace(" ", "_")
        if out not in made:
            made[out] = args = [*PLAIN, *ARGS, f"--optimizer={optimizer}"]
            # bos_id is no setting: train.py reads it from the vocabulary
            args += [f"--{k}={v}" for k, v in OPTIONS[name].items() if k != "bos_id"]
            flags = [f"--data_dir={practice}", f"--out_dir={out}"]
            done = script("train.py", *TINY, *flags, *args)
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
def test_every_option_can_be_resumed_and_shared(half_runs, practice, tmp_path, name, optimizer):
    """From the checkpoint of step 6: bit for bit in one process, within 1e-5 in two."""
    whole, args = half_runs(name, optimizer)
    for n in (1, 2):
        out = tmp_path / str(n)
        out.mkdir()
        shutil.copyfile(whole / f"ckpt_{HALF:06}.pt", out / "ckpt.pt")
        shutil.copyfile(whole / "log.jsonl", out / "log.jsonl")
        train_with(n, practice, out, *args, "--init_from=resume")
        actual, expected = log_of(out), log_of(whole)
        assert actual.keys() == expected.keys() and len(actual) == STEPS + STEPS // HALF
        if n == 1:
            assert actual == expected
            a, b = (load_checkpoint(folder / "ckpt.pt") for folder in (out, whole))
            for part in ("model", "optimizer"):
                assert a[part].keys() == b[part].keys()
                assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
        assert max(abs(actual[key] - expected[key]) for key in actual) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_c_engine_runs_every_option(half_runs, run, name):
    """./run and sample.py generate the same story at temperature 0."""
    out, _ = half_runs(name, "muon")
    args = [f"--out_dir={out}", "--temperature=0", "--start=Once", "--max_new_tokens=30"]
    sampled = script("sample.py", *args, "--device=cpu")
    assert sampled.returncode == 0, sampled.stderr
    done = run(out / "model.bin", "-t", "0", "-n", "31", "-i", "Once")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip()[:20] == sampled.stdout.strip()[:20]
