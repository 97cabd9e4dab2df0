"""
The model: a Llama decoder with the options of today's speedruns, its loss, and generation.

With every option of ModelArgs off it is plain Llama 2: pre-norm blocks of grouped-query attention
with rotary embeddings and a SwiGLU feed-forward, RMSNorm, no biases. ARCHS names three choices of
options. Every number of the architecture is a field of ModelArgs; it is saved in checkpoints,
carried by export.py, and read by run.c. Parameter names are those of llama2.c and Meta's release.

To add an option: a field in ModelArgs whose default leaves plain Llama unchanged, its use below, a
line in doc/format.md, formats/modelbin.py and run.c, its place in formats/huggingface.py and
modeling_modded_llama.py, a role in optim.py for its parameters, and a row in ablate.py.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as with_recomputation
from torch.utils.checkpoint import create_selective_checkpoint_contexts

ACTIVATIONS = ("swiglu", "relu2")

# The presets of --arch: the options that differ from ModelArgs' defaults, which are Llama 2
ARCHS = {
    "llama": {},
    # what Qwen3 of transformers and llama.cpp carries exactly
    "portable": {"qk_norm": True},
    # the lowest loss in a given time, whatever it needs
    "modded": {
        "qk_norm": True,
        "norm_gains": False,
        "activation": "relu2",
        "embedding_norm": True,
        "residual_scalars": True,
        "value_embeddings": -1,
        "bigram_rows": 16384,
        "smear": True,
        "sliding_window": 64,
    },
}


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
# as in run.c: larger ones are slips, and would only end in a lack of memory
LARGEST = {
    "dim": 1 << 16,
    "hidden_dim": 1 << 20,
    "n_layers": 1 << 12,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "vocab_size": 1 << 24,
    "max_seq_len": 1 << 24,
    "multiple_of": 1 << 16,
    "vocab_multiple": 1 << 16,
    "bigram_rows": 1 << 28,
}


@dataclass
class ModelArgs:
    """The architecture. Raises ValueError, one sentence, for numbers that do not fit together."""

    dim: int = 288
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 0  # 0: as many as n_heads (no grouping)
    vocab_size: int = 4096
    hidden_dim: int = 0  # 0: 2/3 of 4 * dim for SwiGLU, 4 * dim for ReLU², see multiple_of
    multiple_of: int = 32  # rounds a hidden_dim that is not given up
    max_seq_len: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True  # the output head is the embedding table
    dropout: float = 0.0
    # ---- options; off, and so plain Llama 2, by default
    qk_norm: bool = False  # RMSNorm of each query and key head, before RoPE (Qwen3)
    norm_gains: bool = True  # RMSNorm has learned gains; False: it only normalises
    zero_init: bool = False  # projections into the residual stream, and an untied head, begin at 0
    activation: str = "swiglu"  # of the feed-forward: swiglu, or relu2 (two matrices, not three)
    logit_softcap: float = 0.0  # c: logits become c * tanh(logits / c); 0: none
    sliding_window: int = 0  # a position of an S layer sees this many, itself included; 0: all
    window_pattern: str = "SSSL"  # layer i has letter i modulo its length: S window, L everything
    embedding_norm: bool = False  # RMSNorm behind the embedding
    residual_scalars: bool = False  # layer i begins with a_i x + b_i x0; x0 is the embedding
    value_embeddings: int = 0  # so many layers, the first, add an embedding to values; -1: all do
    bigram_rows: int = 0  # rows of a hashed table of (token before, token), added to the embedding
    smear: bool = False  # a gate adds the embedding of the token before
    # ---- for training alone, never exported
    embedding_std: float = 0.0  # of the embedding, and so of a tied head, at the start; 0: a rule
    head_std: float = 0.0  # of a head of its own at the start; 0: a rule, see init_weights
    vocab_multiple: int = 1  # rows of embedding and head in memory, rounded up

    def __post_init__(self):
        for field in fields(self):
            kind, value = type(field.default), getattr(self, field.name)
            if kind is float and type(value) is int:
                setattr(self, field.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"{field.name} = {value!r}: expected {WORDS[kind]}")
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, most in LARGEST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at most {most}")
        not_negative = "n_kv_heads hidden_dim logit_softcap sliding_window embedding_std head_std"
        for name in not_negative.split():
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name, least, most in (("norm_eps", 0, 1), ("rope_theta", 1, 1e12)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} = {getattr(self, name)}: expected {least} to {most:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.dim % self.n_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} does not divide dim = {self.dim}; "
                f"take a dim that is a multiple of {self.n_heads}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"dim / n_heads = {self.head_dim} is odd; rotary embeddings turn pairs, "
                f"so it must be even"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation = {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(
                f"window_pattern = {self.window_pattern!r}: expected letters S (window) and L (all)"
            )
        if self.value_embeddings == -1:
            self.value_embeddings = self.n_layers
        if not 0 <= self.value_embeddings <= self.n_layers:
            raise ValueError(
                f"value_embeddings = {self.value_embeddings}: expected 0 to "
                f"n_layers = {self.n_layers}, or -1 for all"
            )
        if self.bigram_rows < 0 or self.bigram_rows == 1:
            raise ValueError(f"bigram_rows = {self.bigram_rows}: expected 0 (none), or 2 or more")
        if self.vocab_multiple < 1:
            raise ValueError(f"vocab_multiple must be at least 1, not {self.vocab_multiple}")
        if not self.hidden_dim:
            hidden = 4 * self.dim if self.activation == "relu2" else 2 * 4 * self.dim // 3
            self.hidden_dim = self.multiple_of * math.ceil(hidden / self.multiple_of)

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def vocab_rows(self):
        """Rows of the embedding and the head in memory; those past vocab_size mean nothing."""
        return self.vocab_multiple * math.ceil(self.vocab_size / self.vocab_multiple)

    @property
    def wide_embedding(self):
        """Whether the embedding begins large, with a standard deviation near 1 and not 0.02."""
        if self.tie_embeddings:
            return False
        return self.embedding_std > 0.1 or (
            not self.embedding_std and (self.zero_init or self.embedding_norm)
        )

    def window(self, layer):
        """How many positions one of this layer sees, itself included; 0: all before it."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.sliding_window if letter == "S" else 0

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """ModelArgs from a checkpoint's dict; raises ValueError for a field it does not know."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"model option {sorted(unknown)[0]!r} is unknown to this version")
        return cls(**{k: v for k, v in values.items() if v is not None})


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, args, dim):
        super().__init__()
        self.shape, self.eps = (dim,), args.norm_eps
        self.weight = nn.Parameter(torch.ones(dim)) if args.norm_gains else None  # (dim,)

    def gains(self):
        return self.weight

    def forward(self, x):
        # in float32 whatever x is: PyTorch's kernel for bfloat16 on a CPU is seven times slower
        return F.rms_norm(x.float(), self.shape, self.gains(), self.eps).to(x.dtype)


def linear(x, *weights):
    """
    x (..., n) times the transposes of one or more matrices (rows, n), in x's number format; one
    product for all of them, (..., sum of rows).
    """
    weights = [w.to(x.dtype) for w in weights]
    return F.linear(x, weights[0] if len(weights) == 1 else torch.cat(weights))


def rope_tables(head_dim, max_seq_len, theta):
    """
    Cosine and sine of the rotary angles, two tensors (max_seq_len, head_dim // 2), fp32: position p
    turns pair i by p * theta ** (-2 i / head_dim) (Su et al. 2021, arXiv:2104.09864).
    """
    freqs = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), freqs)
    return angles.cos(), angles.sin()


def pairs_to_halves(weight, head_dim):
    """
    The rows of a projection (n_heads * head_dim, ...), or gains (head_dim,), in the order 0, 2, 4,
    ..., 1, 3, 5, ... of each head. RoPE turns neighbouring numbers of a head, which processors
    cannot load at once; in this order it turns its halves. Queries and keys moved alike have the
    same products, so that nothing else notices.
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


class HeadNorm(RMSNorm):
    """RMSNorm of heads whose numbers are in the order of pairs_to_halves; its gains are not."""

    def gains(self):
        return None if self.weight is None else pairs_to_halves(self.weight, len(self.weight))


def apply_rope(x, cos, sin):
    """
    Turn x (B, T, n_heads, head_dim), number i of the first half of a head with number i of the
    second, by the angles of their positions.
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def bigram_hash(before, tokens, rows):
    """
    The row of the bigram table for each token and the one before it, both int64 tensors of one
    shape; `before` is -1 where there is none, which is row 0. run.c computes the same.
    """
    mixed = (before * 36313) ^ (tokens * 27191)
    return torch.where(before < 0, 0, 1 + mixed % (rows - 1))


def causal_mask(n_queries, n_keys, window, device):
    """
    (n_queries, n_keys) bool, true where a query may look: the last query stands at the last key,
    and sees the `window` keys up to its own place, or all (0).
    """
    places = torch.arange(n_keys, device=device)
    behind = places[n_keys - n_queries :, None] - places  # how far a key lies before a query
    return (behind >= 0) & (behind < window) if window else behind >= 0


def attend(q, k, v, window, dropout, kernel="sdpa"):
    """
    Causal attention of q (B, n_heads, T, head_dim) over k and v (B, n_kv_heads, S, head_dim), of
    which the last T are the queries' own places: (B, n_heads, T, head_dim). window: as in
    causal_mask. kernel: of KERNELS, for whole sequences without dropout.
    """
    T, S = q.shape[2], k.shape[2]
    window = 0 if window >= S else window
    if kernel != "sdpa" and T == S > 1 and not dropout:
        return KERNELS[kernel](q, k, v, window)
    if q.device.type == "cpu" and T == S and not dropout:
        is_bf16 = q.dtype is torch.bfloat16  # in which SDPA is slow
        if window and T % window == 0 and (is_bf16 or 8 * window <= T):
            return attend_blocks(q, k, v, window)
        if is_bf16 and (T <= 512 or q.shape[0] * q.shape[1] * T * T <= 1 << 26):  # 128 MB
            return attend_all(q, k, v, window)
    if T == 1 and window:  # decoding
        k, v, window = k[:, :, -window:], v[:, :, -window:], 0
    mask = causal_mask(T, S, window, q.device) if window or 1 < T < S else None
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        dropout_p=dropout,
        enable_gqa=q.shape[1] > k.shape[1],
    )


def attend_all(q, k, v, window=0):
    """
    attend with all scores written out, for a CPU, where that is up to three times as fast as SDPA
    in bfloat16, where there is the memory. The queries come in pieces, each spared the keys behind
    it: halves, or quarters where heads are so small that scores are most of the work, or 512.
    """
    (B, n_heads, T, head_dim), n_kv_heads = q.shape, k.shape[1]
    size = min(512, math.ceil(T / (4 if head_dim < 32 else 2)))
    q = q.reshape(B * n_kv_heads, -1, T, head_dim)  # heads that share keys side by side
    k, v = k.reshape(-1, T, head_dim), v.reshape(-1, T, head_dim)
    out = []
    for start in range(0, T, size):
        end = min(start + size, T)
        mask = additive(causal_mask(end - start, end, window, q.device), q.dtype)
        mask = mask.repeat(n_heads // n_kv_heads, 1)
        queries = q[:, :, start:end].flatten(1, 2)
        scores = torch.baddbmm(mask, queries, k[:, :end].mT, alpha=head_dim**-0.5)
        y = scores.softmax(-1) @ v[:, :end]
        out.append(y.view(B, n_heads, end - start, head_dim))
    return torch.cat(out, dim=2)


def attend_blocks(q, k, v, window):
    """attend for T a multiple of window: a block of queries sees its own keys and those before."""
    T, head_dim = q.shape[2:]
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    q, k, v = (t.unflatten(2, (-1, window)) for t in (q, k, v))  # (B, heads, blocks, window, dim)

    def with_block_before(t):
        return torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t), dim=3)

    scores = (q * head_dim**-0.5) @ with_block_before(k).mT  # (B, heads, blocks, window, 2 window)
    mask = causal_mask(window, 2 * window, window, q.device)
    is_first = torch.arange(T // window, device=q.device)[:, None, None] == 0
    mask = mask & ~(is_first & (torch.arange(2 * window, device=q.device) < window))
    weights = (scores + additive(mask, q.dtype)).softmax(-1)
    return (weights @ with_block_before(v)).flatten(2, 3)


@cache
def flex_kernel(T, window, device):
    """FlexAttention, compiled on a GPU, and the blocks of a T x T causal mask that it computes."""
    from torch.nn.attention import flex_attention as flex

    def seen(_batch, _head, query, key):
        behind = query - key
        return (behind >= 0) & (behind < window) if window else behind >= 0

    mask = flex.create_block_mask(seen, None, None, T, T, device=device)
    kernel = flex.flex_attention
    return (torch.compile(kernel) if device.type == "cuda" else kernel), mask


def attend_flex(q, k, v, window):
    """attend by FlexAttention (arXiv:2412.05496), which passes over what a window hides."""
    kernel, mask = flex_kernel(q.shape[2], window, q.device)
    # compiled for a CPU it has been seen to read others in the wrong order (torch 2.13)
    q, k, v = (t.contiguous() for t in (q, k, v))
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] > k.shape[1])


def attend_flash(q, k, v, window):
    """attend by the package flash-attn (Dao 2023, arXiv:2307.08691), heads behind positions."""
    from flash_attn import flash_attn_func

    size = (window - 1, 0) if window else (-1, -1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flash_attn_func(q, k, v, causal=True, window_size=size).transpose(1, 2)


# What can compute the attention of training steps. PyTorch's own, SDPA, takes FlashAttention where
# a layer sees everything, and computes what a window hides as well
KERNELS = {"sdpa": attend, "flex": attend_flex, "flash": attend_flash}


def additive(mask, dtype):
    """0 where a mask is true, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


class KVCache:
    """
    Keys and values of every position so far, how many positions are filled, and the last token.
    n_positions: how many there is room for; 0: max_seq_len.
    """

    def __init__(self, args, batch_size, device, dtype, n_positions=0):
        n_positions = n_positions or args.max_seq_len
        shape = (args.n_layers, batch_size, args.n_kv_heads, n_positions, args.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.n = 0
        self.last = torch.full((batch_size, 1), -1, device=device)  # -1: there is none

    def append(self, layer, k, v):
        """Store k, v (B, n_kv_heads, T, head_dim) behind the filled part; return all up to them."""
        end = self.n + k.shape[2]
        self.k[layer, :, :, self.n : end] = k
        self.v[layer, :, :, self.n : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows):
        """Go on with these rows of the batch alone, a list."""
        self.k, self.v, self.last = self.k[:, rows], self.v[:, rows], self.last[rows]


class Attention(nn.Module):
    """`kernel`: of KERNELS."""

    kernel = "sdpa"

    def __init__(self, args, layer):
        super().__init__()
        self.args, self.layer, self.window = args, layer, args.window(layer)
        kv_dim = args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)  # (dim, dim)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)  # (kv_dim, dim)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)  # (kv_dim, dim)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)  # (dim, dim)
        if args.qk_norm:
            self.q_norm = HeadNorm(args, args.head_dim)
            self.k_norm = HeadNorm(args, args.head_dim)

    def forward(self, x, extra_values, cos, sin, cache):
        args = self.args
        B, T, _ = x.shape
        wq, wk = (pairs_to_halves(m.weight, args.head_dim) for m in (self.wq, self.wk))
        heads = linear(x, wq, wk, self.wv.weight).view(B, T, -1, args.head_dim)
        q, k, v = heads.split((args.n_heads, args.n_kv_heads, args.n_kv_heads), dim=2)
        if extra_values is not None:
            v = v + extra_values.view(v.shape)
        if args.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = args.dropout if self.training else 0.0
        y = attend(q, k, v, self.window, dropout, self.kernel)
        return linear(y.transpose(1, 2).reshape(B, T, args.dim), self.wo.weight)


class FeedForward(nn.Module):
    """
    SwiGLU, w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv:2002.05202), or squared ReLU, w2(relu(w1 x)²)
    (So et al. 2021, arXiv:2109.08668).
    """

    def __init__(self, args):
        super().__init__()
        self.is_gated = args.activation == "swiglu"
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # (hidden_dim, dim)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)  # (dim, hidden_dim)
        if self.is_gated:
            self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # (hidden_dim, dim)

    def forward(self, x):
        if not self.is_gated:
            return linear(F.relu(linear(x, self.w1.weight)).square(), self.w2.weight)
        gate, up = linear(x, self.w1.weight, self.w3.weight).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.w2.weight)


ATEN = torch.ops.aten
PRODUCTS = [
    ATEN.mm.default,
    ATEN.bmm.default,
    ATEN.baddbmm.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]
# What a layer keeps for the backward pass: all it computed; what goes into it, the rest being
# computed once more (Chen et al. 2016, arXiv:1604.06174); or its products as well
ACTIVATION_CHECKPOINTING = {
    "none": None,
    "block": partial(with_recomputation, use_reentrant=False),
    "selective": partial(
        with_recomputation,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS),
    ),
}


class Block(nn.Module):
    """One layer. `recompute`: None, or how training saves memory, of ACTIVATION_CHECKPOINTING."""

    recompute = None

    def __init__(self, args, layer):
        super().__init__()
        self.attention_norm = RMSNorm(args, args.dim)
        self.attention = Attention(args, layer)
        self.ffn_norm = RMSNorm(args, args.dim)
        self.feed_forward = FeedForward(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, extra_values, cos, sin, cache):
        if self.recompute and self.training:
            return self.recompute(self.work, x, extra_values, cos, sin, cache)
        return self.work(x, extra_values, cos, sin, cache)

    def work(self, x, extra_values, cos, sin, cache):
        h = self.attention(self.attention_norm(x), extra_values, cos, sin, cache)
        x = x + self.dropout(h)
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


def fp8_mm(a, b, a_format=torch.float8_e4m3fn):
    """
    a (m, k) times the transpose of b (n, k), (m, n) in a's number format, from both rounded to 8
    bits under one scale each: e4m3 is the finer format, e5m2 has the range that gradients need
    (Micikevicius et al. 2022, arXiv:2209.05433). GPUs want multiples of 16 for k and n.
    """
    rounded, scales = [], []
    for t, number_format in ((a, a_format), (b, torch.float8_e4m3fn)):
        scale = t.abs().amax().float().clamp(min=1e-12) / torch.finfo(number_format).max
        rounded.append((t / scale).to(number_format).contiguous())
        scales.append(scale)
    return torch._scaled_mm(rounded[0], rounded[1].t(), *scales, out_dtype=a.dtype)


class CrossEntropy(torch.autograd.Function):
    """
    The mean cross-entropy of hidden states through the head, a piece of the tokens at a time: the
    logits, the largest tensor of a step, are never in memory as a whole, and their gradients are
    taken while a piece is still in the cache. Computing those in the forward pass is the idea of
    Liger Kernel's fused loss (Hsu et al. 2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, wants_gradients, is_fp8):
        """
        x (N, dim); weight (rows, dim), of which vocab_size count; targets (N,) int64, -1 where a
        place does not count; softcap as in ModelArgs; is_fp8: products by fp8_mm -> the mean in
        nats, float32. With gradients, a place where the target is less likely than 2e-38 counts as
        if it were that likely (smaller numbers are denormal, and 0 in train.py).
        """
        w = weight.to(x.dtype)
        # about as much as the cache of a CPU's core holds; a GPU wants large products
        size = (1 << 19 if x.device.type == "cpu" else 1 << 27) // len(w)
        size = max(16, size // 16 * 16)  # fp8_mm's multiples
        # one piece after another is worked out in these
        logits_buffer = x.new_empty(min(size, len(x)), len(w))
        if wants_gradients:
            p_buffer = torch.empty_like(logits_buffer, dtype=torch.float32)
            dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        n = (targets >= 0).sum()
        total = x.new_zeros((), dtype=torch.float32)
        for i in range(0, len(x), size):
            h, y = x[i : i + size], targets[i : i + size, None]
            counts, y = y >= 0, y.clamp(min=0)
            logits = logits_buffer[: len(h)]
            z = logits.copy_(fp8_mm(h, w)) if is_fp8 else torch.mm(h, w.t(), out=logits)
            if softcap:
                capped = z.float().div_(softcap).tanh_()
                z = capped * softcap
            z[:, vocab_size:] = -math.inf
            if not wants_gradients:
                log_p = torch.log_softmax(z, -1, dtype=torch.float32)
                total -= (log_p.gather(1, y) * counts).sum()
                continue
            p = torch.softmax(z, -1, dtype=torch.float32, out=p_buffer[: len(h)])
            total -= (p.gather(1, y).clamp_(min=2e-38).log_() * counts).sum()
            # the gradient of the sum: with respect to logits, p minus one at the target
            p.scatter_add_(1, y, p.new_full((1, 1), -1.0).expand_as(y))
            if softcap:
                p *= 1 - capped.square_()
            d = logits.copy_(p)  # z, which may be the same memory, is not needed any more
            h = h * counts
            if is_fp8:
                dx[i : i + size] = fp8_mm(d, w.t(), torch.float8_e5m2)
                dw += fp8_mm(d.t(), h.t(), torch.float8_e5m2)
            else:
                torch.mm(d, w, out=dx[i : i + size])
                dw += d.t() @ h
            dx[i : i + size] *= counts
        if wants_gradients:
            ctx.save_for_backward(dx, dw, n)
        return total / n

    @staticmethod
    def backward(ctx, gradient):
        dx, dw, n = ctx.saved_tensors
        scale = gradient / n
        return dx * scale.to(dx.dtype), dw * scale, None, None, None, None, None


class Transformer(nn.Module):
    """
    The model. `dtype` is the number format of its products, float32 unless it is set; with
    fp8_head those of the head have 8 bits in training steps; fast_layers, if they are set, are
    compiled `layers` that training steps use instead.
    """

    def __init__(self, args):
        super().__init__()
        self.args, self.dtype, self.fp8_head, self.fast_layers = args, torch.float32, False, None
        self.tok_embeddings = nn.Embedding(args.vocab_rows, args.dim)  # (vocab_rows, dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args, args.dim)
        self.output = nn.Linear(args.dim, args.vocab_rows, bias=False)  # (vocab_rows, dim)
        if args.embedding_norm:
            self.embedding_norm = RMSNorm(args, args.dim)
        if args.bigram_rows:
            self.bigram_embeddings = nn.Embedding(args.bigram_rows, args.dim)
        if args.smear:
            self.smear_gate = nn.Linear(args.dim, 1, bias=False)
        if args.residual_scalars:
            self.residual_scalars = nn.Parameter(torch.empty(args.n_layers))
            self.x0_scalars = nn.Parameter(torch.empty(args.n_layers))
        self.value_embeddings = nn.ModuleList(
            nn.Embedding(args.vocab_rows, args.n_kv_heads * args.head_dim)
            for _ in range(args.value_embeddings)
        )
        cos, sin = rope_tables(args.head_dim, args.max_seq_len, args.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self):
        """
        Normal with std 0.02; the two projections that write to the residual stream get
        0.02 / sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2).

        With zero_init those, and an untied head, begin at zero: each block passes on what it gets,
        and all tokens are equally likely. The embedding then has std 1, see wide_embedding.
        embedding_std and head_std set these two by hand.
        """
        args = self.args
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
            std = 0.02 / math.sqrt(2 * args.n_layers) if writes_residual else 0.02
            if args.zero_init:
                is_zero = writes_residual or (name == "output.weight" and not args.tie_embeddings)
                std = 0.0 if is_zero else std
            if name.startswith("tok_embeddings"):
                std = args.embedding_std or (1.0 if args.wide_embedding else std)
            if name == "output.weight" and not args.tie_embeddings:
                std = args.head_std or std
            if name.startswith(("bigram_embeddings", "smear_gate", "value_embeddings")):
                std = 0.0
            nn.init.normal_(p, mean=0.0, std=std)
        if args.residual_scalars:
            self.residual_scalars.fill_(1.0)
            self.x0_scalars.zero_()

    def n_params(self):
        """Number of trained numbers; a shared table counts once."""
        return sum(p.numel() for p in self.parameters())

    def compile_layers(self):
        """
        Have training steps use compiled layers: those with the same shapes and window share one
        graph, which takes two thirds of the time that the whole model would, and runs as fast.
        """
        self.fast_layers = [torch.compile(block, dynamic=False) for block in self.layers]

    def flops_per_token(self):
        """
        Floating-point operations of training on one token: 6 for each number of the matrices (2
        forward, 4 backward), and 12 * dim for each key that an average position of a full sequence
        sees, of each layer (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B, which counts
        the keys behind a position as well). Look-ups, norms and the softmax are not counted.
        """
        args, T = self.args, self.args.max_seq_len
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        keys = 0.0
        for layer in range(args.n_layers):
            window = min(args.window(layer) or T, T)
            keys += window - window * (window - 1) / (2 * T)
        return 6 * matrices + 12 * args.dim * keys

    def embed(self, tokens, before):
        """What the first layer gets, (B, T, dim), of tokens and those before them, -1: none."""
        looked_up = tokens
        if self.args.smear:  # with the token before all
            looked_up = torch.cat((before[:, :1].clamp(min=0), tokens), dim=1)
        x = self.tok_embeddings(looked_up).to(self.dtype)
        if self.args.embedding_norm:
            x = self.embedding_norm(x)
        if self.args.smear:
            earlier, x = x[:, :-1], x[:, 1:]
            gate = torch.sigmoid(linear(x, self.smear_gate.weight)) * (before >= 0)[..., None]
            x = x + gate * earlier
        if self.args.bigram_rows:
            rows = bigram_hash(before, tokens, self.args.bigram_rows)
            x = x + self.bigram_embeddings(rows).to(self.dtype)
        return self.dropout(x)

    def hidden(self, tokens, cache=None):
        """
        tokens (B, T) -> what the head reads, (B, T, dim); with a cache, of the last position alone.
        """
        start = cache.n if cache is not None else 0
        end = start + tokens.shape[1]
        cos, sin = self.rope_cos[start:end], self.rope_sin[start:end]
        first = tokens.new_full((len(tokens), 1), -1) if cache is None else cache.last
        x = x0 = self.embed(tokens, torch.cat((first, tokens[:, :-1]), dim=1))
        if self.args.residual_scalars:  # once for all layers
            kept, added = self.residual_scalars.to(x.dtype), self.x0_scalars.to(x.dtype)
        layers = self.fast_layers if self.fast_layers and self.training else self.layers
        for i, block in enumerate(layers):
            if self.args.residual_scalars:
                x = kept[i] * x + added[i] * x0
            extra_values = None
            if i < len(self.value_embeddings):
                extra_values = self.value_embeddings[i](tokens).to(x.dtype)
            x = block(x, extra_values, cos, sin, cache)
        if cache is not None:
            cache.n, cache.last = end, tokens[:, -1:]
            x = x[:, -1:]
        return self.norm(x)

    def forward(self, tokens, targets=None, cache=None):
        """
        tokens (B, T) int64 -> logits (B, T, vocab_size), float32; with targets (B, T), where -1
        marks a place that does not count, the mean cross-entropy in nats instead. With a KVCache,
        tokens follow the positions it holds, and only the logits of the last, (B, 1, vocab_size),
        come back. Raises ValueError past max_seq_len.
        """
        end = tokens.shape[1] + (cache.n if cache is not None else 0)
        if end > self.args.max_seq_len:
            raise ValueError(f"{end} positions exceed max_seq_len = {self.args.max_seq_len}")
        x = self.hidden(tokens, cache)
        vocab_size, softcap = self.args.vocab_size, self.args.logit_softcap
        if targets is not None:
            x, y, weight = x.flatten(0, 1), targets.flatten(), self.output.weight
            wants_gradients = torch.is_grad_enabled()  # cannot be seen from inside
            is_fp8 = self.fp8_head and self.training
            return CrossEntropy.apply(x, weight, y, vocab_size, softcap, wants_gradients, is_fp8)
        logits = linear(x, self.output.weight)[..., :vocab_size].float()
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    @torch.inference_mode()
    def generate(
        self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=(), generator=None
    ):
        """
        Yield one new token id after another behind `tokens`, a non-empty list of ids, until a token
        in `stop` (not yielded), max_new_tokens, or the end of the context.

        temperature 0 takes the likeliest token; top_k > 0 samples among the k likeliest; top_p < 1
        among the likeliest whose probabilities first sum to p (Holtzman et al. 2020,
        arXiv:1904.09751). `generator` (torch.Generator on CPU) makes it repeatable. Raises
        ValueError where the tokens do not fit the context.
        """
        weight = self.tok_embeddings.weight
        limit = min(max_new_tokens, self.room_behind(tokens))
        cache = KVCache(self.args, 1, weight.device, self.dtype)
        step = torch.tensor([tokens], device=weight.device)
        for _ in range(limit):
            logits = self(step, cache=cache)[0, -1].float().cpu()
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if token in stop:
                return
            yield token
            step = torch.tensor([[token]], device=weight.device)

    @torch.inference_mode()
    def generate_batch(self, tokens, draws, temperature=1.0, top_k=0, top_p=1.0, stop=()):
        """
        generate() for several stories at once: one for each row of `draws` (n, max_new_tokens),
        float64 numbers from 0 to below 1 that decide what is drawn, so that a story does not depend
        on those beside it. Yields a list of n after each step: the new token id of each story, None
        for those that have ended.
        """
        weight = self.tok_embeddings.weight
        n, max_new_tokens = draws.shape
        limit = min(max_new_tokens, self.room_behind(tokens))
        n_positions = min(len(tokens) + limit, self.args.max_seq_len)
        cache = KVCache(self.args, n, weight.device, self.dtype, n_positions)
        step = torch.tensor([tokens] * n, device=weight.device)
        running = list(range(n))  # the stories behind the rows of the batch
        for i in range(limit):
            logits = self(step, cache=cache)[:, -1]
            new = draw_tokens(logits, draws[running, i], temperature, top_k, top_p)
            rows = [row for row, token in enumerate(new) if token not in stop]
            told = {running[row]: new[row] for row in rows}
            yield [told.get(story) for story in range(n)]
            if not rows:
                return
            if len(rows) < len(running):
                cache.keep(rows)
                running = [running[row] for row in rows]
            step = torch.tensor([[new[row]] for row in rows], device=weight.device)

    def room_behind(self, tokens):
        """How many tokens can follow these; ValueError where they do not fit the context."""
        if not 0 < len(tokens) <= self.args.max_seq_len:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens does not fit: expected 1 to "
                f"max_seq_len = {self.args.max_seq_len}"
            )
        # one more than max_seq_len: the token after the last position is still a prediction
        return self.args.max_seq_len + 1 - len(tokens)


def likeliest(logits, temperature, top_k=0, top_p=1.0):
    """
    Probabilities (..., vocab_size) of logits at a temperature above 0, the largest first and those
    that are not drawn from 0, and the ids they belong to; the parameters are those of
    Transformer.generate.
    """
    # a temperature that is 0 in float32 would make 0 / 0 of the likeliest
    logits = logits - logits.amax(-1, keepdim=True)
    probs = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
    probs, order = probs.sort(descending=True)
    if top_k > 0:
        probs[..., top_k:] = 0
    if 0 < top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # keeps the token that crosses p
    return probs, order


def sample_token(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """One token id from logits (vocab_size,); the parameters are those of Transformer.generate."""
    if temperature == 0:
        return int(logits.argmax())
    probs, order = likeliest(logits, temperature, top_k, top_p)
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def draw_tokens(logits, draws, temperature, top_k=0, top_p=1.0):
    """
    A list of n token ids from logits (n, vocab_size): of each row the first at which the sum of the
    probabilities, the largest first, goes above the number of `draws` (n,).
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probs, order = likeliest(logits, temperature, top_k, top_p)
    sums = probs.cpu().double().cumsum(-1)
    places = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)
    return order.cpu().gather(1, places).flatten().tolist()
