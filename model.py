"""
The model: a plain Llama 2 decoder, and generation with a KV cache.

Pre-norm blocks of grouped-query attention with rotary embeddings and a SwiGLU feed-forward,
RMSNorm, no biases. Every number of the architecture is a field of ModelArgs; it is saved in
checkpoints, carried by export.py, and read by run.c. Parameter names are those of llama2.c and
Meta's release.

To add an option: a field in ModelArgs whose default leaves plain Llama unchanged, its use below,
and a line in export.py that writes it or refuses it.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelArgs:
    """The architecture. Raises ValueError, one sentence, for numbers that do not fit together."""

    dim: int = 288
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 0  # 0: as many as n_heads (no grouping)
    vocab_size: int = 4096
    hidden_dim: int = 0  # 0: 2/3 of 4 * dim, rounded up to a multiple of multiple_of
    multiple_of: int = 32
    max_seq_len: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True  # the output head is the embedding table
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_kv_heads", "hidden_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
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
        if not self.hidden_dim:
            hidden = 2 * 4 * self.dim // 3
            self.hidden_dim = self.multiple_of * math.ceil(hidden / self.multiple_of)

    @property
    def head_dim(self):
        return self.dim // self.n_heads

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

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))  # (dim,)

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_tables(head_dim, max_seq_len, theta):
    """
    Cosine and sine of the rotary angles, two tensors (max_seq_len, head_dim // 2), fp32: position p
    turns pair i by p * theta ** (-2 i / head_dim) (Su et al. 2021, arXiv:2104.09864).
    """
    freqs = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), freqs)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Turn neighbouring pairs of x (B, T, n_heads, head_dim) by the angles of their positions."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class KVCache:
    """Keys and values of every position so far, and how many positions are filled."""

    def __init__(self, args, batch_size, device, dtype):
        shape = (args.n_layers, batch_size, args.n_kv_heads, args.max_seq_len, args.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.n = 0

    def append(self, layer, k, v):
        """Store k, v (B, n_kv_heads, T, head_dim) behind the filled part; return all up to them."""
        end = self.n + k.shape[2]
        self.k[layer, :, :, self.n : end] = k
        self.v[layer, :, :, self.n : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.args, self.layer = args, layer
        kv_dim = args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)  # (dim, dim)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)  # (kv_dim, dim)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)  # (kv_dim, dim)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)  # (dim, dim)

    def forward(self, x, cos, sin, cache):
        args = self.args
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, args.n_heads, args.head_dim)
        k = self.wk(x).view(B, T, args.n_kv_heads, args.head_dim)
        v = self.wv(x).view(B, T, args.n_kv_heads, args.head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        past = 0
        if cache is not None:
            past = cache.n
            k, v = cache.append(self.layer, k, v)
        repeats = args.n_heads // args.n_kv_heads
        if repeats > 1:  # each key and value head serves several query heads
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        mask = None
        if past and T > 1:  # is_causal aligns the first query with the first key, so say it in full
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=not past and T > 1,
            dropout_p=args.dropout if self.training else 0.0,
        )
        return self.wo(y.transpose(1, 2).reshape(B, T, args.dim))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # (hidden_dim, dim)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)  # (dim, hidden_dim)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)  # (hidden_dim, dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, cos, sin, cache):
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, cache))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)  # (vocab_size, dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)  # (vocab_size, dim)
        cos, sin = rope_tables(args.head_dim, args.max_seq_len, args.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self):
        """
        Normal with std 0.02; the two projections that write to the residual stream get
        0.02 / sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2).
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
            std = 0.02 / math.sqrt(2 * self.args.n_layers) if writes_residual else 0.02
            nn.init.normal_(p, mean=0.0, std=std)

    def n_params(self):
        """Number of trained numbers; a shared table counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens, targets=None, cache=None):
        """
        tokens (B, T) int64 -> logits (B, T, vocab_size); with targets (B, T), where -1 marks a
        place that does not count, the mean cross-entropy in nats instead. With a KVCache, tokens
        follow the positions it holds, and only the logits of the last, (B, 1, vocab_size), come
        back. Raises ValueError past max_seq_len.
        """
        start = cache.n if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.args.max_seq_len:
            raise ValueError(f"{end} positions exceed max_seq_len = {self.args.max_seq_len}")
        cos, sin = self.rope_cos[start:end], self.rope_sin[start:end]
        x = self.dropout(self.tok_embeddings(tokens))
        for block in self.layers:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.n = end
            x = x[:, -1:]
        logits = self.output(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

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
        if not 0 < len(tokens) <= self.args.max_seq_len:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens does not fit: expected 1 to "
                f"max_seq_len = {self.args.max_seq_len}"
            )
        weight = self.tok_embeddings.weight
        cache = KVCache(self.args, 1, weight.device, weight.dtype)
        step = torch.tensor([tokens], device=weight.device)
        # one more than max_seq_len: the token after the last position is still a prediction
        for _ in range(min(max_new_tokens, self.args.max_seq_len + 1 - len(tokens))):
            logits = self(step, cache=cache)[0, -1].float().cpu()
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if token in stop:
                return
            yield token
            step = torch.tensor([[token]], device=weight.device)


def sample_token(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """One token id from logits (vocab_size,); the parameters are those of Transformer.generate."""
    if temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    probs, order = probs.sort(descending=True)
    if top_k > 0:
        probs[top_k:] = 0
    if 0 < top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # keeps the token that crosses p
    return int(order[torch.multinomial(probs, 1, generator=generator)])
