"""The model: logits, loss, cache, attention backends and generation."""

import math
import shutil
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERYTHING, random_model
from torch.utils._python_dispatch import TorchDispatchMode

from attention import attend, attend_all, causal_mask
from model import (
    ACTIVATION_CHECKPOINTING,
    ARCHS,
    PRODUCTS,
    KVCache,
    ModelArgs,
    Transformer,
    places_of,
    sample_token,
)
from optim import by_role
from training import fit


@pytest.mark.parametrize(
    "values, part",
    [
        ({"dim": 100, "n_heads": 3}, "n_heads = 3 does not divide dim = 100"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads = 3 does not divide n_heads = 4"),
        ({"dim": 12, "n_heads": 4}, "dim / n_heads = 3: expected an even number"),
        ({"n_layers": 0}, "n_layers = 0: expected at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_kv_heads": -1}, "n_kv_heads"),
        ({"norm_eps": 2.0}, "norm_eps = 2.0: expected at most 1"),
        ({"rope_theta": 0.5}, "rope_theta = 0.5: expected at least 1"),
    ],
)
def test_invalid_model_args_are_refused(values, part):
    with pytest.raises(ValueError, match=part):
        ModelArgs(**{"dim": 48, "n_heads": 4, **values})


def test_hidden_dim_and_parameter_count():
    args = ModelArgs(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=4)
    assert args.hidden_dim == 172  # stories260K's
    model = random_model(dim=48, n_heads=4, n_kv_heads=2, hidden_dim=50, vocab_size=105)
    block = 2 * 48 + 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 50
    assert model.n_params() == 105 * 48 + 2 * block + 48


def test_activation_checkpointing_saves_memory_and_keeps_the_gradients():
    """Selective checkpointing also keeps the matrix products, so it computes none of them twice."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op in PRODUCTS:
                calls[kind] += 1
            return op(*args, **(kwargs or {}))

    model = random_model(n_layers=4, max_seq_len=128).train()
    tokens = torch.randint(0, 105, (2, 128))
    kept, calls, gradients = {}, {}, {}
    for kind, recompute in ACTIVATION_CHECKPOINTING.items():
        storages, calls[kind] = {}, 0

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t  # held, so that no address is reused
            return t

        for block in model.layers:
            block.recompute = recompute
        with Products():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = model(tokens, tokens)
            gradients[kind] = torch.autograd.grad(loss, list(model.parameters()))
        kept[kind] = sum(t.untyped_storage().nbytes() for t in storages.values())
    assert max(kept["block"], kept["selective"]) < 0.5 * kept["none"]
    assert calls["block"] > calls["selective"] == calls["none"] > 4 * 10
    for kind in ("block", "selective"):
        for a, b in zip(gradients[kind], gradients["none"], strict=True):
            torch.testing.assert_close(a, b)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="'window' is unknown"):
        ModelArgs.from_dict({"dim": 48, "window": 3})


def reference_logits(model, tokens):
    """Return Llama 2's logits, with a loop over heads and complex rotation, in float64."""
    args, T = model.args, len(tokens)
    p = {k: v.double() for k, v in model.state_dict().items()}

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + args.norm_eps).sqrt() * weight

    freqs = args.rope_theta ** (-torch.arange(0, args.head_dim, 2).double() / args.head_dim)
    turn = torch.polar(torch.ones(1).double(), torch.outer(torch.arange(T).double(), freqs))
    x = p["tok_embeddings.weight"][tokens]
    for i in range(args.n_layers):
        w = {k.removeprefix(f"layers.{i}."): v for k, v in p.items() if f"layers.{i}." in k}
        h = norm(x, w["attention_norm.weight"])
        q, k, v = (h @ w[f"attention.w{name}.weight"].T for name in "qkv")
        heads = []
        for j in range(args.n_heads):
            at, kv = j * args.head_dim, j * args.n_kv_heads // args.n_heads * args.head_dim

            def turned(t, at):
                pairs = t[:, at : at + args.head_dim].reshape(T, -1, 2).contiguous()
                return torch.view_as_real(torch.view_as_complex(pairs) * turn).reshape(T, -1)

            scores = turned(q, at) @ turned(k, kv).T / math.sqrt(args.head_dim)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, kv : kv + args.head_dim])
        x = x + torch.cat(heads, -1) @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate, up = (h @ w[f"feed_forward.w{name}.weight"].T for name in "13")
        x = x + (F.silu(gate) * up) @ w["feed_forward.w2.weight"].T
    return norm(x, p["norm.weight"]) @ p["output.weight"].T


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "hidden_dim": 77}])
def test_logits_match_llama_2(options):
    model = random_model(tie_embeddings=False, **options)
    tokens = torch.randint(0, 105, (20,))
    with torch.no_grad():
        logits = model(tokens[None])[0]
    assert logits.abs().max() > 1
    torch.testing.assert_close(logits.double(), reference_logits(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 6], [12]])
def test_the_cache_does_not_change_the_logits(cuts):
    model = random_model(n_kv_heads=2)
    tokens = torch.randint(0, 105, (1, 12))
    with torch.no_grad():
        whole = model(tokens)
        cache, at = KVCache(model.args, 1, "cpu", torch.float32), 0
        for n in cuts:
            logits = model(tokens[:, at : at + n], cache=cache)
            at += n
            torch.testing.assert_close(logits[:, -1], whole[:, at - 1])


def random_places(B, T, is_separate):
    """Return the places of T tokens in documents of about 20 tokens, or None."""
    return places_of((torch.rand(B, T) < 0.05).int(), 1) if is_separate else None


@pytest.mark.parametrize("is_separate", [False, True])
@pytest.mark.parametrize("T, window", [(128, 16), (128, 32), (128, 64), (120, 16), (120, 0)])
def test_windowed_attention_matches_pytorch(T, window, is_separate):
    """In blocks if they fit and are faster, else with a mask; four query heads, two key heads."""
    q, k, v = (torch.randn(2, n, T, 8) for n in (4, 2, 2))
    places = random_places(2, T, is_separate)
    mask = causal_mask(T, T, window, "cpu", places)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, window, places=places), expected)


@pytest.mark.parametrize("is_separate", [False, True])
@pytest.mark.parametrize("window", [0, 300])
def test_long_attention_in_pieces_matches_pytorch(window, is_separate):
    """1,100 positions make three pieces; four query heads, two key heads."""
    q, k, v = (torch.randn(2, n, 1100, 16) for n in (4, 2, 2))
    places = random_places(2, 1100, is_separate)
    mask = causal_mask(1100, 1100, window, "cpu", places)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend_all(q, k, v, window, places), expected)
    rough = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), window, places=places)
    torch.testing.assert_close(rough.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("options", [EVERYTHING, ARCHS["modded"]])
def test_separate_documents_are_read_as_if_each_were_alone(options):
    """The first one lacks its beginning, as in a window of a shard."""
    model = random_model(**{**options, "bigram_rows": 64, "separate_documents": True, "bos_id": 1})
    text = torch.randint(2, 105, (2, 32))
    text[0, [7, 8, 25]] = 1
    with torch.no_grad():
        logits = model(text)[0]
        for a, b in ((0, 7), (7, 8), (8, 25), (25, 32)):
            torch.testing.assert_close(logits[a:b], model(text[:1, a:b])[0])
        model.args.separate_documents = False
        assert (model(text)[0, 8:] - logits[8:]).abs().max() > 0.1


def test_loss_counts_only_real_targets():
    model = random_model()
    tokens, targets = torch.randint(0, 105, (2, 2, 10))
    targets[1, 4:] = -1
    with torch.no_grad():
        logp = model(tokens).log_softmax(-1)
        counted = [(b, t) for b in range(2) for t in range(10) if b == 0 or t < 4]
        expected = -sum(logp[b, t, targets[b, t]] for b, t in counted) / len(counted)
        torch.testing.assert_close(model(tokens, targets), expected)


def test_generation_ends_at_a_stop_token_the_length_or_the_context():
    model = random_model(tie_embeddings=False)  # a tied random model repeats itself
    text = list(model.generate([1, 5], 8, temperature=0))
    assert len(text) == 8
    i = max(text.index(token) for token in text)
    assert i > 0
    assert list(model.generate([1, 5], 8, temperature=0, stop=(text[i],))) == text[:i]
    assert len(list(model.generate([1, 5], 1000, temperature=0))) == 32 + 1 - 2
    seeded = [
        list(model.generate([1], 9, top_p=0.9, generator=torch.Generator().manual_seed(s)))
        for s in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]
    for prompt in ([], [1] * 33):
        with pytest.raises(ValueError, match="does not fit"):
            next(model.generate(prompt, 1))


def test_sampling_respects_top_k_and_top_p():
    logits = torch.tensor([3.0, 1.0, 2.0, -1.0, 0.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**limits):
        return {sample_token(logits, 1.0, generator=generator, **limits) for _ in range(400)}

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {0, 2}
    assert drawn(top_p=0.5) == {0}  # the most likely token alone has 0.64
    assert drawn(top_p=0.7) == {0, 2}
    assert sample_token(logits, 0) == 0
    assert sample_token(logits, 1e-300) == 0


@pytest.mark.parametrize("is_separate", [False, True])
@pytest.mark.parametrize("window", [0, 16])
def test_other_attention_kernels_compute_the_same(window, is_separate, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 64, 16) for heads in (4, 2, 2))
    places = random_places(2, 64, is_separate)
    expected = attend(q, k, v, window, places=places)

    def flash_attn_func(q, k, v, causal, window_size):
        """flash-attn's layout, (B, T, heads, head_dim), and its windows, (left, right)."""
        assert causal and q.shape[2:] == (4, 16) and k.shape[2:] == (2, 16)
        left = window_size[0] + 1 if window_size != (-1, -1) else 0
        assert window_size in ((-1, -1), (window - 1, 0))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v, left).transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, bounds, bounds_k, longest, longest_k, **options):
        """Sequences one after another, (tokens, heads, head_dim); each begins at a bound."""
        assert bounds is bounds_k and bounds.dtype == torch.int32 and longest == longest_k == 64
        lengths = bounds.diff().tolist()
        parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        return torch.cat([flash_attn_func(*(t[None] for t in p), **options)[0] for p in parts])

    functions = (flash_attn_func, flash_attn_varlen_func)
    flash = types.SimpleNamespace(**{f.__name__: f for f in functions})
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    for kernel in ("flex", "flash"):
        result = attend(q, k, v, window, kernel, places)
        assert torch.allclose(result, expected, atol=1e-5), kernel
    if is_separate:
        return
    decoding = attend(q[:, :, -1:], k, v, window, "flash")  # by SDPA
    assert torch.allclose(decoding, expected[:, :, -1:], atol=1e-5)


def test_the_initial_std_of_embedding_and_head_can_be_set():
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 2000}
    tied = Transformer(ModelArgs(**sizes, embedding_std=0.3))
    assert tied.output.weight.std().item() == pytest.approx(0.3, rel=0.02)
    two = Transformer(ModelArgs(**sizes, tie_embeddings=False, embedding_std=1.0, head_std=0.04))
    assert two.tok_embeddings.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert two.output.weight.std().item() == pytest.approx(0.04, rel=0.02)
    # an embedding with a large std has its own role, a small one trains at the rate of the head
    assert "embedding" in by_role(two)
    small = Transformer(ModelArgs(**sizes, tie_embeddings=False, embedding_std=0.05))
    assert "embedding" not in by_role(small)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_drop_what_the_others_drop():
    """So compile_model(), which compares their gradients, keeps them."""
    torch.manual_seed(1)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 32, "max_seq_len": 16}
    model = Transformer(ModelArgs(**sizes, dropout=0.5))
    tokens = torch.randint(32, (2, 16))
    fit.compile_model(model, tokens, tokens)
    assert model.fast_layers
