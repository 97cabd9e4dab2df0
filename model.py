"""
The model: a Llama decoder with options, and text generation. It uses attention.py and loss.py.

With every option off, this is plain Llama 2: pre-norm layers of grouped-query attention with rotary
embeddings and a SwiGLU feed-forward, RMSNorm, no biases. Each option is a field of ModelArgs and an
`if` where it applies; ARCHS lists three useful presets. Checkpoints store all of ModelArgs,
model.bin only what run.c needs. Parameters are named as in llama2.c and Meta's release.

To add an activation, add a row to ACTIVATIONS. In engine/model.h, add its name at the same position
of `Activation`, and a case in is_gated() if it has a gate; in engine/kernels.h, add its formula to
activate(). Extend class MLP in formats/modeling_modded_llama.py and the row `activation` in
doc/format.md. Test it with cases in OPTIONS of tests/test_options.py, PARITY of tests/test_run.py
and CASES of tests/test_formats.py.

To add an option, add a field to ModelArgs whose default is plain Llama, a setting to train.py, and
its `if` below. Give its parameters an initial std in init_std and a role in optim.py. Extend
formats/modelbin.py, doc/format.md and run.c; formats/huggingface.py and modeling_modded_llama.py;
the three tests above; and experiments/ablations.py.
"""

import math
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from attention import attend
from loss import cross_entropy

# name: (function, whether w3 gates it), see FeedForward; model.bin stores the index of the row
ACTIVATIONS = {
    "swiglu": (F.silu, True),  # Shazeer 2020, arXiv:2002.05202
    "relu2": (lambda x: F.relu(x).square(), False),  # So et al. 2021, arXiv:2109.08668
}


@dataclass
class ModelArgs:
    """The architecture. Raises ValueError if the values are invalid or do not fit together."""

    dim: int = 288
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 0  # 0: n_heads (no grouping)
    vocab_size: int = 4096
    hidden_dim: int = 0  # 0: 4 * dim, or two thirds of that if gated (SwiGLU)
    multiple_of: int = 32  # an automatic hidden_dim is rounded up to a multiple of this
    max_seq_len: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True  # the output head is the embedding table
    dropout: float = 0.0
    # ---- options; the defaults are plain Llama 2
    qk_norm: bool = False  # RMSNorm of each query and key head, before RoPE (Qwen3)
    norm_gains: bool = True  # learned gains in RMSNorm; False: it only normalizes
    zero_init: bool = False  # projections into the residual stream, and an untied head, start at 0
    activation: str = "swiglu"  # of the feed-forward: swiglu, or relu2 (two matrices, not three)
    logit_softcap: float = 0.0  # c: logits become c * tanh(logits / c); 0: no cap
    sliding_window: int = 0  # positions that an S layer sees, including its own; 0: all
    window_pattern: str = "S"  # one letter per layer, repeated: S sees the window, L sees all
    embedding_norm: bool = False  # RMSNorm after the embedding
    residual_scalars: bool = False  # layer i reads a_i x + b_i x0, where x0 is the embedding
    value_embeddings: int = 0  # the first n layers add a token embedding to their values; -1: all
    bigram_rows: int = 0  # rows of a hashed embedding table of (previous token, token) pairs
    smear: bool = False  # add the previous token's embedding through a gate
    embedding_conv: int = 0  # tokens in a causal convolution of the first layer's input; 0: none
    key_conv: int = 0  # tokens in a causal convolution of each layer's keys; 0: none
    orders: bool = False  # trained on stories with orders, see text/orders.py
    separate_documents: bool = False  # no document in a sequence sees the one before it
    bos_id: int = 1  # the token that starts a document; not exported, because a tokenizer has it
    # ---- for training only, never exported
    embedding_std: float = 0.0  # initial std of the embedding; 0: automatic, see init_std
    head_std: float = 0.0  # initial std of an untied head; 0: automatic
    vocab_multiple: int = 1  # in memory, round embedding and head rows up to a multiple of this

    def __post_init__(self):
        for field in fields(self):
            kind, value = type(field.default), getattr(self, field.name)
            if kind is float and type(value) is int:
                setattr(self, field.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"{field.name} = {value!r}: expected {KINDS[kind]}")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                bound = f"at least {low}" if value < low else f"at most {high:.9g}"
                raise ValueError(f"{name} = {value}: expected {bound}")
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.value_embeddings == -1:
            self.value_embeddings = self.n_layers
        for problem in self.problems():
            raise ValueError(problem)
        if not self.hidden_dim:
            _, is_gated = ACTIVATIONS[self.activation]
            hidden = 2 * 4 * self.dim // 3 if is_gated else 4 * self.dim
            self.hidden_dim = self.multiple_of * math.ceil(hidden / self.multiple_of)

    def problems(self):
        """Yield a message for each value that is unknown or does not fit the others."""
        if self.dim % self.n_heads:
            yield (
                f"n_heads = {self.n_heads} does not divide dim = {self.dim}: "
                f"use a dim that is a multiple of {self.n_heads}"
            )
        if self.n_heads % self.n_kv_heads:
            yield f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}"
        if self.head_dim % 2:
            yield f"dim / n_heads = {self.head_dim}: expected an even number, as RoPE rotates pairs"
        if self.dropout == 1:
            yield "dropout = 1.0: expected at least 0 and less than 1"
        if self.activation not in ACTIVATIONS:
            yield f"activation = {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}"
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            letters = "expected letters S (window) and L (all)"
            yield f"window_pattern = {self.window_pattern!r}: {letters}"
        if not 0 <= self.value_embeddings <= self.n_layers:
            expected = f"expected 0 to n_layers = {self.n_layers}, or -1 for all"
            yield f"value_embeddings = {self.value_embeddings}: {expected}"
        for name in ("bigram_rows", "embedding_conv", "key_conv"):
            if getattr(self, name) == 1:
                yield f"{name} = 1: expected 0 (none), or 2 or more"

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def vocab_rows(self):
        """Rows of the embedding and the head in memory; rows after vocab_size are padding."""
        return self.vocab_multiple * math.ceil(self.vocab_size / self.vocab_multiple)

    @property
    def wide_embedding(self):
        """Whether the embedding starts with a standard deviation near 1 instead of 0.02."""
        is_automatic = self.zero_init or self.embedding_norm
        is_wide = self.embedding_std > 0.1 if self.embedding_std else is_automatic
        return is_wide and not self.tie_embeddings

    def window(self, layer):
        """Return how many positions a query of this layer sees, including its own; 0: all."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.sliding_window if letter == "S" else 0

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Return the ModelArgs of a checkpoint's dict; raise ValueError for an unknown field."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"model option {sorted(unknown)[0]!r} is unknown to this version")
        return cls(**{k: v for k, v in values.items() if v is not None})


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
MAX_CONV = 16  # tokens of a convolution
INITIAL_ROOM = 1 << 12  # positions that are allocated at first; more are added when needed
# Minimum and maximum of each value, as in engine/model.h: a larger one is a typo that would exhaust
# memory
LIMITS = {
    "dim": (1, 1 << 16),
    "n_layers": (1, 1 << 12),
    "n_heads": (1, 1 << 12),
    "n_kv_heads": (0, 1 << 12),
    "vocab_size": (1, 1 << 24),
    "hidden_dim": (0, 1 << 20),
    "multiple_of": (1, 1 << 16),
    "max_seq_len": (1, 1 << 24),
    "norm_eps": (0, 1),
    "rope_theta": (1, 1e12),
    "dropout": (0, 1),
    "logit_softcap": (0, 1e6),
    "sliding_window": (0, math.inf),
    "bigram_rows": (0, 1 << 28),
    "embedding_conv": (0, MAX_CONV),
    "key_conv": (0, MAX_CONV),
    "bos_id": (-1, 1 << 24),
    "embedding_std": (0, sys.float_info.max),
    "head_std": (0, sys.float_info.max),
    "vocab_multiple": (1, 1 << 16),
}

# The presets of --arch: the options that differ from the defaults of ModelArgs
ARCHS = {
    "llama": {},
    # can be stored without loss as a Qwen3 model for transformers and llama.cpp
    "portable": {"qk_norm": True},
    # the lowest loss in a given time, however complex the model
    "modded": {
        "qk_norm": True,
        "norm_gains": False,
        "activation": "relu2",
        "embedding_norm": True,
        "residual_scalars": True,
        "value_embeddings": -1,
        "bigram_rows": 16384,
        "smear": True,
        "embedding_conv": 4,
        "key_conv": 4,
        "sliding_window": 256,
        "separate_documents": True,
    },
}


def linear(x, *weights):
    """
    Multiply x (..., n) by the transpose of each matrix (rows, n), in x's dtype, and return (...,
    total rows). Several matrices are concatenated first.
    """
    weights = [w.to(x.dtype) for w in weights]
    return F.linear(x, weights[0] if len(weights) == 1 else torch.cat(weights))


def places_of(tokens, bos_id):
    """Return the place of each token in its document, 0 for the first one: (B, T) like tokens."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return places - torch.where(tokens == bos_id, places, 0).cummax(1).values


def causal_conv(x, weight, cache=None, name="", places=None):
    """
    Return a causal depthwise convolution of x (B, T, dim), as in Canon layers (Allen-Zhu 2025,
    arXiv:2512.17351): y[t] = x[t] + sum over j >= 1 of weight[:, j - 1] * x[t - j], with x = 0
    before the first token. weight: (dim, n). cache, name: a KVCache and the name of x in it, if
    earlier tokens precede x. places: None, or those of the tokens in their documents (B, T): x = 0
    before the first token of each.
    """
    n, T = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, n, 0)) if cache is None else cache.extended(name, x, n)
    for j, column in enumerate(weight.to(x.dtype).unbind(1), start=1):
        earlier = padded[:, n - j : n - j + T]
        if places is not None:
            earlier = earlier * (places >= j)[..., None]
        x = x + column * earlier
    return x


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, args, dim):
        super().__init__()
        self.eps = args.norm_eps
        self.weight = nn.Parameter(torch.ones(dim)) if args.norm_gains else None  # (dim,)

    def forward(self, x):
        # always in float32: PyTorch's bfloat16 kernel is seven times slower on a CPU
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


def rope_tables(head_dim, max_seq_len, theta):
    """
    Return cosine and sine of the rotary angles, two tensors (max_seq_len, head_dim // 2), fp32.
    Position p turns pair i by p * theta ** (-2 i / head_dim) (Su et al. 2021, arXiv:2104.09864).
    """
    freqs = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), freqs)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """
    Rotate x (B, T, n_heads, head_dim) by the angles of its positions, cos and sin
    (T, head_dim // 2). Element i of a head's first half is paired with element i of its second.
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def pairs_to_halves(weight, head_dim):
    """
    Reorder the rows of each head to 0, 2, 4, ..., 1, 3, 5, ..., in a projection
    (n_heads * head_dim, ...) or in gains (head_dim,).

    Llama rotates pairs of neighboring elements. In this order, one element of each pair is in the
    first half of the head and the other in the second half, so that all pairs are rotated by a few
    vector operations. Queries and keys are reordered alike, so their dot products do not change.
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


class HeadNorm(RMSNorm):
    """RMSNorm of heads that pairs_to_halves has reordered; gains are stored in Llama's order."""

    def forward(self, x):
        gains = None if self.weight is None else pairs_to_halves(self.weight, x.shape[-1])
        return F.rms_norm(x.float(), x.shape[-1:], gains, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary embeddings."""

    kernel = "sdpa"  # training may replace it with another name from attention.KERNELS
    attend = staticmethod(attend)  # training/estimate.py sets one that only counts memory

    def __init__(self, args, layer):
        super().__init__()
        self.args, self.layer, self.window = args, layer, args.window(layer)
        kv_dim = args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)  # (dim, dim)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)  # (kv_dim, dim)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)  # (kv_dim, dim)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)  # (dim, dim)
        if args.key_conv:
            self.key_conv = nn.Parameter(torch.zeros(kv_dim, args.key_conv - 1))
        if args.qk_norm:
            self.q_norm = HeadNorm(args, args.head_dim)
            self.k_norm = HeadNorm(args, args.head_dim)

    def forward(self, x, *context):
        """x (B, T, dim) -> (B, T, dim); context: the other arguments of mixed()."""
        return linear(self.mixed(x, *context), self.wo.weight)

    def mixed(self, x, extra_values, cos, sin, cache, places=None):
        """
        Return what all heads read (B, T, dim), the input of wo, for x (B, T, dim). extra_values:
        None or (B, T, kv_dim); cos and sin: (T, head_dim // 2); cache: None or the KVCache of the
        earlier positions; places: None or those of the tokens in their documents (B, T).
        """
        args = self.args
        B, T, _ = x.shape
        wq, wk = (pairs_to_halves(m.weight, args.head_dim) for m in (self.wq, self.wk))
        heads = linear(x, wq, wk, self.wv.weight).view(B, T, -1, args.head_dim)
        q, k, v = heads.split((args.n_heads, args.n_kv_heads, args.n_kv_heads), dim=2)
        if extra_values is not None:  # option value_embeddings
            v = v + extra_values.view(v.shape)
        if args.key_conv:
            weight = pairs_to_halves(self.key_conv, args.head_dim)
            name = f"keys {self.layer}"
            k = causal_conv(k.flatten(2), weight, cache, name, places).view(k.shape)
        if args.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, n_kv_heads, all positions, head_dim)
        y = self.attend(q, k, v, self.window, self.kernel, places)  # (B, n_heads, T, head_dim)
        return y.transpose(1, 2).reshape(B, T, args.dim)


class FeedForward(nn.Module):
    """w2(activation(w1 x) * w3 x) as in SwiGLU, or w2(activation(w1 x)) without a gate."""

    def __init__(self, args):
        super().__init__()
        self.activation, self.is_gated = ACTIVATIONS[args.activation]
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # (hidden_dim, dim)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)  # (dim, hidden_dim)
        if self.is_gated:
            self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # (hidden_dim, dim)

    def forward(self, x):
        return linear(self.hidden(x), self.w2.weight)

    def hidden(self, x):
        """Return the input of w2 (B, T, hidden_dim) for x (B, T, dim)."""
        if self.is_gated:
            gate, up = linear(x, self.w1.weight, self.w3.weight).chunk(2, dim=-1)
            return self.activation(gate) * up
        return self.activation(linear(x, self.w1.weight))


class Block(nn.Module):
    """One layer: x (B, T, dim) -> (B, T, dim)."""

    recompute = None  # training may set a function from ACTIVATION_CHECKPOINTING

    def __init__(self, args, layer):
        super().__init__()
        self.attention_norm = RMSNorm(args, args.dim)
        self.attention = Attention(args, layer)
        self.ffn_norm = RMSNorm(args, args.dim)
        self.feed_forward = FeedForward(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, *context):
        if self.recompute and self.training:
            return self.recompute(self.compute, x, *context)
        return self.compute(x, *context)

    def compute(self, x, *context):
        """Compute the layer; context: the other arguments of Attention.mixed."""
        x = x + self.dropout(self.attention(self.attention_norm(x), *context))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """
    The model. Training sets four attributes: `dtype`, in which matrices are multiplied; `fp8_head`,
    whether training steps compute the head's product in 8 bits; `stress`, see cross_entropy; and
    `fast_layers`, see compile_layers.
    """

    def __init__(self, args):
        super().__init__()
        self.args, self.dtype, self.fp8_head, self.fast_layers = args, torch.float32, False, None
        self.stress = 1.0
        self.tok_embeddings = nn.Embedding(args.vocab_rows, args.dim)  # (vocab_rows, dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args, args.dim)
        self.output = nn.Linear(args.dim, args.vocab_rows, bias=False)  # (vocab_rows, dim)
        cos, sin = rope_tables(args.head_dim, min(args.max_seq_len, INITIAL_ROOM), args.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        if args.embedding_norm:
            self.embedding_norm = RMSNorm(args, args.dim)
        if args.bigram_rows:
            self.bigram_embeddings = nn.Embedding(args.bigram_rows, args.dim)
        if args.embedding_conv:
            self.embedding_conv = nn.Parameter(torch.zeros(args.dim, args.embedding_conv - 1))
        if args.smear:
            self.smear_gate = nn.Linear(args.dim, 1, bias=False)
        if args.residual_scalars:
            self.residual_scalars = nn.Parameter(torch.ones(args.n_layers))
            self.x0_scalars = nn.Parameter(torch.zeros(args.n_layers))
        kv_dim, n = args.n_kv_heads * args.head_dim, args.value_embeddings
        tables = (nn.Embedding(args.vocab_rows, kv_dim) for _ in range(n))
        self.value_embeddings = nn.ModuleList(tables)
        self.init_weights()
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self):
        """Draw matrices and tables from a normal distribution, see init_std; keep all others."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, mean=0.0, std=self.init_std(name))

    def init_std(self, name):
        """
        Return the initial standard deviation of a parameter: 0.02, or 0.02 / sqrt(2 n_layers) for
        the two projections that write to the residual stream, so that the variance of the stream
        does not grow with depth (GPT-2). Bigram and value embeddings, the smear gate and the
        convolutions start at 0.

        With zero_init, these projections and an untied head start at zero: each layer passes its
        input on, and all tokens are equally likely. The embedding then starts with std 1, unless
        it is tied; see wide_embedding.
        """
        args = self.args
        writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
        is_untied_head = name == "output.weight" and not args.tie_embeddings
        if is_untied_head and args.head_std:
            return args.head_std
        if name.startswith("tok_embeddings") and (args.embedding_std or args.wide_embedding):
            return args.embedding_std or 1.0
        starts_at_0 = name.startswith(("bigram_embeddings", "smear_gate", "value_embeddings"))
        if starts_at_0 or name.endswith("_conv"):
            return 0.0
        if args.zero_init and (writes_residual or is_untied_head):
            return 0.0
        return 0.02 / math.sqrt(2 * args.n_layers) if writes_residual else 0.02

    def rope(self, start, end):
        """Return the cosine and sine tables (end - start, head_dim // 2) of some positions."""
        if end > (n := len(self.rope_cos)):
            with torch.inference_mode(False):  # training may use them later
                tables = rope_tables(self.args.head_dim, max(end, 2 * n), self.args.rope_theta)
                self.rope_cos, self.rope_sin = (t.to(self.rope_cos.device) for t in tables)
        return self.rope_cos[start:end], self.rope_sin[start:end]

    def embed(self, tokens, cache, places):
        """
        Return the input of the first layer (B, T, dim) for tokens (B, T) and forward's cache.
        places: see Attention.mixed.
        """
        args = self.args
        first = torch.full_like(tokens[:, :1], -1) if cache is None else cache.token
        before = torch.cat((first, tokens[:, :-1]), dim=1)  # (B, T), the previous token; -1: none
        if places is not None:
            before = torch.where(places > 0, before, -1)
        ids = torch.cat((first.clamp(min=0), tokens), dim=1) if args.smear else tokens
        x = self.tok_embeddings(ids).to(self.dtype)
        if args.embedding_norm:
            x = self.embedding_norm(x)
        if args.smear:
            earlier, x = x[:, :-1], x[:, 1:]  # (B, T, dim) each
            gate = torch.sigmoid(linear(x, self.smear_gate.weight)) * (before >= 0)[..., None]
            x = x + gate * earlier
        if args.bigram_rows:
            rows = bigram_hash(before, tokens, args.bigram_rows)  # (B, T)
            x = x + self.bigram_embeddings(rows).to(x.dtype)
        if args.embedding_conv:
            x = causal_conv(x, self.embedding_conv, cache, "embedding", places)
        return self.dropout(x)

    def forward(self, tokens, targets=None, cache=None):
        """
        Return the logits (B, T, vocab_size), float32, of tokens (B, T), int64.

        With targets (B, T), return their mean cross-entropy in nats instead, see cross_entropy; a
        target of -1 does not count. With a KVCache, the tokens follow the positions in the cache,
        in the same document, and only the last logits (B, 1, vocab_size) are returned. Raises
        ValueError for positions past max_seq_len.
        """
        args = self.args
        start = 0 if cache is None else cache.n
        end = start + tokens.shape[1]
        if end > args.max_seq_len:
            raise ValueError(f"{end} positions exceed max_seq_len = {args.max_seq_len}")
        cos, sin = self.rope(start, end)  # (T, head_dim // 2)
        is_separate = args.separate_documents and cache is None
        places = places_of(tokens, args.bos_id) if is_separate else None  # (B, T)
        x = x0 = self.embed(tokens, cache, places)  # (B, T, dim)
        if args.residual_scalars:
            a, b = self.residual_scalars.to(x.dtype), self.x0_scalars.to(x.dtype)  # (n_layers,)
        layers = self.fast_layers if self.fast_layers and self.training else self.layers
        for i, block in enumerate(layers):
            if args.residual_scalars:
                x = a[i] * x + b[i] * x0
            extra_values = None
            if i < args.value_embeddings:
                extra_values = self.value_embeddings[i](tokens).to(x.dtype)  # (B, T, kv_dim)
            x = block(x, extra_values, cos, sin, cache, places)
        if cache is not None:
            cache.n, cache.token = end, tokens[:, -1:]
            x = x[:, -1:]
        x, head = self.norm(x), self.output.weight
        if targets is not None:
            is_fp8 = self.fp8_head and self.training
            options = args.logit_softcap, is_fp8, self.stress
            return cross_entropy(x, head, targets, args.vocab_size, *options)
        logits = linear(x, head)[..., : args.vocab_size].float()
        if args.logit_softcap:
            logits = args.logit_softcap * torch.tanh(logits / args.logit_softcap)
        return logits

    def n_params(self):
        """Return the number of parameters; a shared table counts once."""
        return sum(p.numel() for p in self.parameters())

    def compile_layers(self):
        """
        Compile the layers for training steps. Layers with the same shapes and window share a graph.
        Compiling them takes two thirds as long as compiling the whole model, and the result is just
        as fast. On a CPU, dropout draws the same numbers as without compiling (fallback_random), so
        that compile_model() can compare gradients.
        """
        on_cpu = self.tok_embeddings.weight.device.type == "cpu"
        how = {"dynamic": False, "options": {"fallback_random": on_cpu}}
        self.fast_layers = [torch.compile(block, **how) for block in self.layers]

    def flops_per_token(self):
        """
        Return the floating-point operations of training on one token: 6 per matrix element (2
        forward, 4 backward), and in each layer 12 * dim times the number of keys that a position
        sees, averaged over a full sequence (as in PaLM, Chowdhery et al. 2022, arXiv:2204.02311,
        appendix B, except that PaLM also counts the keys after a position). Lookups, norms and the
        softmax are not counted.
        """
        args, T = self.args, self.args.max_seq_len
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        keys = 0.0
        for layer in range(args.n_layers):
            window = min(args.window(layer) or T, T)
            keys += window - window * (window - 1) / (2 * T)
        return 6 * matrices + 12 * args.dim * keys

    @torch.inference_mode()
    def generate(
        self,
        tokens,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stop=(),
        generator=None,
        wanted=None,
    ):
        """
        Yield new token ids after `tokens`, a non-empty list of ids, until a token in `stop` (not
        yielded), max_new_tokens, or the end of the context.

        temperature = 0 picks the most likely token. top_k > 0 samples from the k most likely
        tokens, top_p < 1 from the smallest set of likely tokens with a total probability of top_p
        or more (Holtzman et al. 2020, arXiv:1904.09751). `generator` (a torch.Generator on the
        CPU) makes the result repeatable. `wanted` (text.orders.Wanted) favors what an order asks
        for. Raises ValueError if the tokens do not fit the context.
        """
        device = self.output.weight.device
        limit = min(max_new_tokens, self.room_after(tokens))
        cache = KVCache(self.args, 1, device, self.dtype, len(tokens) + limit)
        step = torch.tensor([tokens], device=device)  # (1, T), then (1, 1)
        for _ in range(limit):
            logits = self(step, cache=cache)[0, -1].float().cpu()  # (vocab_size,)
            if wanted:
                wanted.raise_logits(logits)
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if token in stop:
                return
            if wanted:
                wanted.read(token)
            yield token
            step = torch.tensor([[token]], device=device)

    @torch.inference_mode()
    def generate_batch(
        self, prompts, draws, temperature=1.0, top_k=0, top_p=1.0, stop=(), wanted=None
    ):
        """
        Continue n prompts, lists of T ids each, at once; see generate(). Each continuation reads
        its random numbers, float64 in [0, 1), from one row of `draws` (n, max_new_tokens), so none
        depends on the rest of the batch. wanted: None, or n of what generate() takes. Yields a list
        of n token ids after each step, with None for those that have ended.
        """
        device = self.output.weight.device
        n, max_new_tokens = draws.shape
        limit = min(max_new_tokens, self.room_after(prompts[0]))
        cache = KVCache(self.args, n, device, self.dtype, len(prompts[0]) + limit)
        step = torch.tensor(prompts, device=device)  # (n, T), then (rows, 1)
        running = list(range(n))  # which continuation each row of the batch continues
        for i in range(limit):
            logits = self(step, cache=cache)[:, -1]  # (rows, vocab_size)
            for row, j in enumerate(running if wanted else ()):
                wanted[j].raise_logits(logits[row])
            new = draw_tokens(logits, draws[running, i], temperature, top_k, top_p)
            rows = [row for row, token in enumerate(new) if token not in stop]
            by_continuation = {running[row]: new[row] for row in rows}
            for j, token in by_continuation.items() if wanted else ():
                wanted[j].read(token)
            yield [by_continuation.get(j) for j in range(n)]
            if not rows:
                return
            if len(rows) < len(running):
                cache.keep(rows)
                running = [running[row] for row in rows]
            step = torch.tensor([[new[row]] for row in rows], device=device)

    def room_after(self, tokens):
        """Return how many tokens can follow `tokens`; raise ValueError if they do not fit."""
        longest = self.args.max_seq_len
        if not 0 < len(tokens) <= longest:
            expected = f"expected 1 to max_seq_len = {longest}"
            raise ValueError(f"a prompt of {len(tokens)} tokens does not fit: {expected}")
        # + 1: the last position still predicts a token after it
        return longest + 1 - len(tokens)


def bigram_hash(before, tokens, rows):
    """
    Return the row of the bigram table for each pair (previous token, token); all three are int64
    tensors of one shape. Row 0 is for the first token, where `before` is -1. run.c computes the
    same rows.
    """
    mixed = (before * 36313) ^ (tokens * 27191)
    return torch.where(before < 0, 0, 1 + mixed % (rows - 1))


# ---- activation checkpointing: what a layer keeps for the backward pass

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
recomputed = partial(checkpoint, use_reentrant=False)
ACTIVATION_CHECKPOINTING = {
    "none": None,  # keep everything
    # keep only the input and recompute the rest (Chen et al. 2016, arXiv:1604.06174)
    "block": recomputed,
    # keep the input and the matrix products
    "selective": partial(
        recomputed, context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS)
    ),
}


# ---- generation


class KVCache:
    """
    Keys and values of the first n positions, the last token, and the last inputs of convolutions.
    n_positions: how many to expect. The cache starts with room for INITIAL_ROOM positions at most,
    and grows when it is full.
    """

    def __init__(self, args, batch_size, device, dtype, n_positions=INITIAL_ROOM):
        n_positions = min(n_positions, INITIAL_ROOM, args.max_seq_len)
        shape = (args.n_layers, batch_size, args.n_kv_heads, n_positions, args.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.n = 0
        self.token = torch.full((batch_size, 1), -1, device=device)  # the last token; -1: none
        self.inputs = {}

    def append(self, layer, k, v):
        """Append k and v (B, n_kv_heads, T, head_dim) to those of a layer; return all of them."""
        end, room = self.n + k.shape[2], self.k.shape[3]
        if end > room:
            more = 0, 0, 0, max(end, 2 * room) - room
            self.k, self.v = F.pad(self.k, more), F.pad(self.v, more)
        self.k[layer, :, :, self.n : end] = k
        self.v[layer, :, :, self.n : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def extended(self, name, x, n):
        """
        Return x (B, T, dim) after the n inputs before it, zeros at the start of a text, and keep
        the last n of them for the next call with this name.
        """
        earlier = self.inputs.get(name)
        earlier = x.new_zeros(len(x), n, x.shape[2]) if earlier is None else earlier
        x = torch.cat((earlier, x), dim=1)
        self.inputs[name] = x[:, -n:]
        return x

    def keep(self, rows):
        """Keep only some rows of the batch, a list of indices."""
        self.inputs = {name: x[rows] for name, x in self.inputs.items()}
        self.k, self.v, self.token = self.k[:, rows], self.v[:, rows], self.token[rows]


def likeliest(logits, temperature, top_k=0, top_p=1.0):
    """
    Return the probabilities (..., vocab_size) in descending order, 0 for tokens that top_k or top_p
    exclude, and the token ids in that order. The parameters are those of Transformer.generate, with
    temperature > 0.
    """
    # a temperature that float32 rounds to 0 would give 0 / 0 for the most likely token
    logits = logits - logits.amax(-1, keepdim=True)
    probs = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
    probs, order = probs.sort(descending=True)
    if top_k > 0:
        probs[..., top_k:] = 0
    if 0 < top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # keeps the token that reaches p
    return probs, order


def sample_token(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """Sample a token id from logits (vocab_size,); parameters as in Transformer.generate."""
    if temperature == 0:
        return int(logits.argmax())
    probs, order = likeliest(logits, temperature, top_k, top_p)
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def draw_tokens(logits, draws, temperature, top_k=0, top_p=1.0):
    """
    Return a list of n token ids from logits (n, vocab_size): in each row, the first token at which
    the cumulative probability, most likely tokens first, exceeds the number in `draws` (n,).
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probs, order = likeliest(logits, temperature, top_k, top_p)
    sums = probs.cpu().double().cumsum(-1)
    places = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)
    return order.cpu().gather(1, places).flatten().tolist()
