"""
Causal attention: attend() and its backends.

Shapes: q (B, n_heads, T, head_dim); k, v (B, n_kv_heads, S, head_dim), where the last T positions
are those of the queries; the result has the shape of q. window: how many positions a query sees,
including its own; 0: all up to its own. places: None, or for T == S the place of each token in its
document (B, T), counted from 0: a query sees no other document.

To add a backend for training, add a function (q, k, v, window, places) for T == S to KERNELS.
Before using it, train.py compares its gradients with those of PyTorch's attention.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F


def is_visible(distance, window):
    """Return whether a query sees a key `distance` positions before it, a tensor of ints."""
    return (distance >= 0) & (distance < window) if window else distance >= 0


def causal_mask(n_queries, n_keys, window, device, places=None):
    """
    Return whether a query sees a key, both of which end at one position: (n_queries, n_keys) bool,
    or with the places of the queries (B, n_queries), (B, 1, n_queries, n_keys).
    """
    positions = torch.arange(n_keys, device=device)
    distance = positions[n_keys - n_queries :, None] - positions
    mask = is_visible(distance, window)
    return mask if places is None else mask & (distance <= places[:, None, :, None])


def additive(mask, dtype):
    """Return the mask to add to scores: 0 where a bool mask is true, -infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def attend(q, k, v, window, kernel="sdpa", places=None):
    """
    Return the causal attention, computed by the fastest implementation for these inputs. kernel: a
    name in KERNELS, used for whole sequences (T == S).
    """
    T, S = q.shape[2], k.shape[2]
    window = 0 if window >= S else window
    if kernel != "sdpa" and T == S > 1:
        return KERNELS[kernel](q, k, v, window, places)
    if q.device.type == "cpu" and T == S:
        is_bf16 = q.dtype is torch.bfloat16  # slow in SDPA
        if window and T % window == 0 and (is_bf16 or 4 * window <= T):
            return attend_blocks(q, k, v, window, places)
        if is_bf16 and (T <= 512 or q.shape[0] * q.shape[1] * T * T <= 1 << 26):  # 128 MB
            return attend_all(q, k, v, window, places)
    if T == 1 and window:  # decoding
        k, v, window = k[:, :, -window:], v[:, :, -window:], 0
    needs_mask = window or 1 < T < S or places is not None
    mask = causal_mask(T, S, window, q.device, places) if needs_mask else None
    options = {"is_causal": mask is None and T > 1, "enable_gqa": q.shape[1] > k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def attend_all(q, k, v, window=0, places=None):
    """
    Compute attend() with all scores in memory, on a CPU in bfloat16 up to three times as fast as
    SDPA. Queries are processed in pieces of at most 512, and a piece skips the keys after its end:
    at least two pieces, or four for small heads, where scores are most of the work.
    """
    (B, n_heads, T, head_dim), n_kv_heads = q.shape, k.shape[1]
    size = min(512, math.ceil(T / (4 if head_dim < 32 else 2)))
    q = q.reshape(B * n_kv_heads, -1, T, head_dim)  # groups query heads that share keys
    k, v = k.reshape(-1, T, head_dim), v.reshape(-1, T, head_dim)
    out = []
    for start in range(0, T, size):
        end = min(start + size, T)
        here = None if places is None else places[:, start:end]
        mask = additive(causal_mask(end - start, end, window, q.device, here), q.dtype)
        mask = mask.tile(n_heads // n_kv_heads, 1)
        if places is not None:
            mask = mask.expand(-1, n_kv_heads, -1, -1).flatten(0, 1)
        queries = q[:, :, start:end].flatten(1, 2)
        scores = torch.baddbmm(mask, queries, k[:, :end].mT, alpha=head_dim**-0.5)
        y = scores.softmax(-1) @ v[:, :end]
        out.append(y.view(B, n_heads, end - start, head_dim))
    return torch.cat(out, dim=2)


def attend_blocks(q, k, v, window, places=None):
    """Compute attend() for T a multiple of window: each block of queries sees two key blocks."""
    T, head_dim = q.shape[2:]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.unflatten(2, (-1, window)) for t in (q, k, v))  # (B, heads, blocks, window, dim)

    def with_block_before(t):
        return torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t), dim=3)

    scores = (q * head_dim**-0.5) @ with_block_before(k).mT  # (B, heads, blocks, window, 2 window)
    if places is None:
        places = torch.arange(T, device=q.device)[None]
    places = places.unflatten(1, (-1, window)).flatten(0, 1)  # (B or 1 * blocks, window)
    mask = causal_mask(window, 2 * window, window, q.device, places)
    mask = additive(mask, q.dtype).unflatten(0, (-1, T // window)).transpose(1, 2)
    weights = (scores + mask).softmax(-1)
    return (weights @ with_block_before(v)).flatten(2, 3)


@cache
def flex_kernel(device):
    """Return FlexAttention, compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device.type == "cuda" else flex_attention


@cache
def flex_mask(T, window, device, places=None):
    """Return the block mask of FlexAttention for T positions; see attend()."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch, _head, query, key):
        distance = query - key
        is_seen = is_visible(distance, window)
        return is_seen if places is None else is_seen & (distance <= places[batch, query])

    return create_block_mask(sees, None if places is None else len(places), None, T, T, device)


def attend_flex(q, k, v, window, places=None):
    """Compute attend() by FlexAttention (arXiv:2412.05496), which skips what nobody sees."""
    make = flex_mask if places is None else flex_mask.__wrapped__  # other places at each step
    kernel, mask = flex_kernel(q.device), make(q.shape[2], window, q.device, places)
    # compiled for a CPU, it read other strides in the wrong order (torch 2.13)
    q, k, v = (t.contiguous() for t in (q, k, v))
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] > k.shape[1])


def attend_flash(q, k, v, window, places=None):
    """Compute attend() by the package flash-attn (Dao 2023, arXiv:2307.08691)."""
    import flash_attn

    B, _, T, _ = q.shape
    options = {"causal": True, "window_size": (window - 1, 0) if window else (-1, -1)}
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # its layout: (B, T, heads, head_dim)
    if places is None:
        return flash_attn.flash_attn_func(q, k, v, **options).transpose(1, 2)
    bounds = bounds_of(places)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    y = flash_attn.flash_attn_varlen_func(q, k, v, bounds, bounds, T, T, **options)
    return y.unflatten(0, (B, T)).transpose(1, 2)


@torch.compiler.disable  # the number of documents varies
def bounds_of(places):
    """Return where documents start in B * T tokens, and the end: int32 (documents + 1,)."""
    starts = (places == 0).flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=places.numel()).int()


# The values of --attention. SDPA is PyTorch's attention: on GPUs it uses FlashAttention in layers
# that see everything, but with windows or separate documents it also computes what is hidden
KERNELS = {"sdpa": attend, "flex": attend_flex, "flash": attend_flash}
