"""
What the formats share: names of tensors in other programs, which options a format can store, and
building a model from the tensors of a file.

To add a tensor, add its row to NAMES. The readers in huggingface.py and gguf.py may raise any error
on a damaged file; load() in table.py turns it into one sentence.
"""

import math
import os
from collections.abc import Collection
from dataclasses import fields
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError
from model import ModelArgs, Transformer, pairs_to_halves

# Tensor names: ours, Hugging Face's, and GGUF's if its architectures have the tensor, in the order
# of model.bin. {} is the layer or table; all names except those of the scalars end in .weight.
NAMES = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
    ("layers.{}.attention.q_norm", "model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    ("layers.{}.attention.k_norm", "model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    ("embedding_norm", "model.embedding_norm"),
    ("residual_scalars", "model.residual_scalars"),
    ("x0_scalars", "model.x0_scalars"),
    ("value_embeddings.{}", "model.value_embeddings.{}"),
    ("bigram_embeddings", "model.bigram_embeddings"),
    ("smear_gate", "model.smear_gate"),
    ("embedding_conv", "model.embedding_conv"),
    ("layers.{}.attention.key_conv", "model.layers.{}.self_attn.key_conv"),
)
# Their rows follow RoPE
ROTATED = ("wq.weight", "wk.weight", "q_norm.weight", "k_norm.weight", "key_conv")
PADDED = ("tok_embeddings", "output", "value_embeddings")  # may have rows past vocab_size in memory
IGNORED = "rotary_emb.inv_freq"  # a tensor in old folders that can be computed
READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes
# Fields that no reader needs; window_pattern is checked together with sliding_window
TRAINING_ONLY = set(
    "multiple_of dropout zero_init embedding_std head_std vocab_multiple window_pattern "
    "bos_id".split()
)


# ---- options


def windows(args):
    """Return the window of each layer; 0 means all positions."""
    return [args.window(layer) for layer in range(args.n_layers)]


def unsupported_field(args, supported):
    """Return the first dataclass field whose value a format would lose, or None."""
    for field in fields(ModelArgs):
        if field.name in supported | TRAINING_ONLY or getattr(args, field.name) == field.default:
            continue
        if field.name != "sliding_window" or any(windows(args)):
            return field
    return None


class Target(NamedTuple):
    """What an architecture of another program, or a version of a format, can store."""

    supported: Collection  # fields of ModelArgs; all others must have their defaults
    required: Collection = ()  # fields that are always on, in every layer


def misfit(args, target):
    """Return the first field of ModelArgs that does not fit a Target, or None."""
    is_on = {"sliding_window": all(windows(args))}
    missing = [name for name in target.required if not is_on.get(name, getattr(args, name))]
    unsupported = unsupported_field(args, target.supported)
    return missing[0] if missing else unsupported and unsupported.name


def shortest(value):
    """Return the shortest decimal that rounds to `value` in float32: 1e-5, not 9.999999747e-06."""
    with np.errstate(over="ignore"):  # a value too large for float32 becomes inf, refused later
        return float(str(np.float32(value)))


def window_settings(sizes):
    """Return the fields of ModelArgs for a list of window sizes, one per layer."""
    if not any(sizes):
        return {}
    letters = "".join("S" if size else "L" for size in sizes)
    n = len(letters)
    period = next(p for p in range(1, n + 1) if all(letters[i] == letters[i % p] for i in range(n)))
    return {"sliding_window": max(sizes), "window_pattern": letters[:period]}


def expect_neutral(path, name, value, values):
    """Raise UserError unless a field that our model lacks has a value that changes nothing."""
    expected = f"{' or '.join(map(str, values))}{', or ' if values else ''}no such field"
    expect(value is None or value in values, path, name, value, expected)


def expect(is_valid, path, name, value, expected):
    """Raise UserError about a field of a file unless it is valid."""
    if not is_valid:
        raise UserError(f"cannot read {path}: {name} = {value}; expected {expected}")


# ---- tensors


def renamed(name, column):
    """Return another program's name for one of our tensors; column: 1 Hugging Face, 2 GGUF."""
    stem = name.removesuffix(".weight")
    index = next((part for part in stem.split(".") if part.isdigit()), None)
    key = stem if index is None else stem.replace(f".{index}", ".{}", 1)
    row = next(row for row in NAMES if row[0] == key)
    return row[column].replace("{}", index or "") + name[len(stem) :]


hf_name, gguf_name = partial(renamed, column=1), partial(renamed, column=2)


def halves_to_pairs(weight, head_dim):
    """Invert pairs_to_halves()."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def exported(model, in_halves):
    """
    Yield (our name, tensor) for the tensors of a Transformer, without a tied head and padding rows.
    in_halves: queries and keys are in the order of pairs_to_halves().
    """
    args = model.args
    for name, tensor in model.state_dict().items():
        if name == "output.weight" and args.tie_embeddings:
            continue
        if name.startswith(PADDED):
            tensor = tensor[: args.vocab_size].clone()
        if in_halves and name.endswith(ROTATED):
            tensor = pairs_to_halves(tensor, args.head_dim)
        yield name, tensor


def skeleton(args):
    """
    Return a Transformer on the meta device, which has shapes but takes no memory. Raises UserError
    if the RoPE tables would be large, and larger than all weights.
    """
    with torch.device("meta"):
        model = Transformer(args)
    if args.max_seq_len * args.head_dim > max(1 << 24, model.n_params()):
        raise UserError(
            f"max_seq_len = {args.max_seq_len}: its RoPE tables would be larger than the model "
            f"({model.n_params():,} parameters)"
        )
    return model


def check_tensor_sizes(shapes, paths):
    """
    Raise UserError if tensors have more elements than their files have bytes. Torch's tensors can
    share storage, or repeat it, so a small file can claim any size.
    """
    n, size = sum(map(math.prod, shapes)), sum(map(os.path.getsize, paths))
    if n > size:  # an element takes at least two bytes, but an embedding may also be the head
        raise UserError(f"cannot read {paths[0]}: {n:,} values in files of {size:,} bytes")


def build_model(args, source, path, rename, in_halves):
    """
    Return the Transformer of ModelArgs with the tensors of `source`, {name: (shape, function that
    reads it)}; all of them must be used. rename: maps our name to the name in `source`; in_halves:
    as in exported(). Raises UserError with the tensor's name; names and shapes are checked before
    the model takes memory.
    """

    def refuse(reason):
        raise UserError(f"cannot read {path}: {reason}")

    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(args).state_dict().items()}
    names = [(name, rename(name)) for name in shapes]
    for ours, theirs in names:
        is_tied = ours == "output.weight" and args.tie_embeddings
        if theirs not in source and not is_tied:
            refuse(f"{theirs} is missing")
        if theirs in source and source[theirs][0] != shapes[ours]:
            refuse(f"{theirs} is {source[theirs][0]}, expected {shapes[ours]}")
    unused = {name for name in source if not name.endswith(IGNORED)} - set(dict(names).values())
    if unused:
        refuse(f"{min(unused)} is not a tensor of this model")
    model = Transformer(args)
    state = model.state_dict()
    for ours, theirs in names:
        if theirs not in source:
            continue
        tensor = source[theirs][1]()
        if tensor.dtype not in READABLE:
            refuse(f"{theirs} is {tensor.dtype}, expected float32, bfloat16 or float16")
        if ours == "output.weight" and args.tie_embeddings:
            if not torch.equal(tensor.float(), state[ours]):
                refuse(f"{theirs} differs from the embedding it is tied to")
            continue
        if in_halves and ours.endswith(ROTATED):
            tensor = halves_to_pairs(tensor, args.head_dim)
        state[ours].copy_(tensor)
    return model


def check_dtype_range(name, tensor, limit, dtype):
    """Raise UserError if a tensor has finite values above the limit of a dtype."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if limit < largest < math.inf:
        raise UserError(
            f"{dtype} cannot store {name}, which has values up to {largest:g}: use --dtype=bf16 or "
            f"fp32"
        )
