"""
What the formats share: the tensors of a model by their names elsewhere, which of its options a
format carries, and how a model is put together from the tensors of a file.

To add a tensor: its row in NAMES. Readers of huggingface.py and gguf.py may raise any error on a
damaged file: load() of table.py turns it into one sentence.
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

# Names of tensors: ours, Hugging Face's, and GGUF's if its architectures have the tensor; in the
# order of model.bin. {} stands for a number, and all names but those of the scalars end in .weight
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
)
TURNED = ("wq.weight", "wk.weight", "q_norm.weight", "k_norm.weight")  # by RoPE: pairs, or halves
PADDED = ("tok_embeddings", "output", "value_embeddings")  # in memory, with rows past vocab_size
BENIGN = "rotary_emb.inv_freq"  # a tensor of old folders that can be computed
READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # number formats
# Fields that no reader needs; window_pattern is judged together with sliding_window
TRAINING_ONLY = set(
    "multiple_of dropout zero_init embedding_std head_std vocab_multiple window_pattern".split()
)


# ---- options


def windows(args):
    """The window of each layer, 0 where it sees everything."""
    return [args.window(layer) for layer in range(args.n_layers)]


def not_carried(args, carried):
    """The first dataclass field with a value that a format without it would lose; or None."""
    for field in fields(ModelArgs):
        if field.name in carried | TRAINING_ONLY or getattr(args, field.name) == field.default:
            continue
        if field.name != "sliding_window" or any(windows(args)):
            return field
    return None


class Target(NamedTuple):
    """An architecture of another program, or a version of a format."""

    can: Collection  # fields of ModelArgs that it has; all others must be ModelArgs' defaults
    must: Collection = ()  # fields that are always on there, in every layer


def misfit(args, target):
    """The first field of ModelArgs that keeps a model from a Target, or None."""
    is_on = {"sliding_window": all(windows(args))}
    missing = [name for name in target.must if not is_on.get(name, getattr(args, name))]
    lost = not_carried(args, target.can)
    return missing[0] if missing else lost and lost.name


def shortest(value):
    """The number with the fewest digits that is `value` in float32: 1e-5, not 9.999999747e-06."""
    with np.errstate(over="ignore"):  # past float32 it is infinite, and refused as such
        return float(str(np.float32(value)))


def window_settings(sizes):
    """The fields of ModelArgs for the window of each layer: one size, or 0."""
    if not any(sizes):
        return {}
    letters = "".join("S" if size else "L" for size in sizes)
    n = len(letters)
    period = next(p for p in range(1, n + 1) if all(letters[i] == letters[i % p] for i in range(n)))
    return {"sliding_window": max(sizes), "window_pattern": letters[:period]}


def expect_neutral(path, name, value, values):
    """Raise UserError unless a field that this model lacks has a value that changes nothing."""
    expected = f"a model without it{', or ' if values else ''}{' or '.join(map(str, values))}"
    expect(value is None or value in values, path, name, value, expected)


def expect(is_so, path, name, value, expected):
    """Raise UserError about a field of a file unless it is as expected."""
    if not is_so:
        raise UserError(f"{path} cannot be read: {name} = {value}; expected {expected}")


# ---- tensors


def renamed(name, column):
    """The name of one of our tensors in a column of NAMES: 1 Hugging Face, 2 GGUF."""
    stem = name.removesuffix(".weight")
    number = next((part for part in stem.split(".") if part.isdigit()), None)
    key = stem if number is None else stem.replace(f".{number}", ".{}", 1)
    row = next(row for row in NAMES if row[0] == key)
    return row[column].replace("{}", number or "") + name[len(stem) :]


hf_name, gguf_name = partial(renamed, column=1), partial(renamed, column=2)


def halves_to_pairs(weight, head_dim):
    """The inverse of pairs_to_halves."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def exported(model, in_halves):
    """
    Yield (our name, tensor) of a Transformer without a tied head and padded rows; in_halves: with
    queries and keys in the order of pairs_to_halves().
    """
    args = model.args
    for name, tensor in model.state_dict().items():
        if name == "output.weight" and args.tie_embeddings:
            continue
        if name.startswith(PADDED):
            tensor = tensor[: args.vocab_size].clone()
        if in_halves and name.endswith(TURNED):
            tensor = pairs_to_halves(tensor, args.head_dim)
        yield name, tensor


def skeleton(args):
    """
    The model without its numbers, to know its shapes before memory is taken for them. Raises
    UserError where the tables of RoPE would be large, and larger than all weights.
    """
    with torch.device("meta"):
        model = Transformer(args)
    if args.max_seq_len * args.head_dim > max(1 << 24, model.n_params()):
        raise UserError(
            f"max_seq_len = {args.max_seq_len} is more than this program reads for a model of "
            f"{model.n_params():,} weights"
        )
    return model


def check_numbers(shapes, paths):
    """
    Raise UserError where tensors have more numbers than their files have bytes: tensors of torch
    may share their numbers, and repeat them without end.
    """
    n, size = sum(map(math.prod, shapes)), sum(map(os.path.getsize, paths))
    if n > size:  # a number takes two bytes at least, and an embedding may be the head as well
        raise UserError(f"{paths[0]} cannot be read: {n:,} numbers in files of {size:,} bytes")


def filled(args, source, path, rename, in_halves):
    """
    The Transformer of ModelArgs with the tensors of `source`, {name: (shape, function that reads
    it)}, all of which must be used. rename: our name -> the name there; in_halves: as in
    exported(). Raises UserError, which names the tensor; where names or shapes do not fit, before
    memory is taken for the model.
    """

    def refuse(what):
        raise UserError(f"{path} cannot be read: {what}")

    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(args).state_dict().items()}
    names = [(name, rename(name)) for name in shapes]
    for ours, theirs in names:
        is_tied = ours == "output.weight" and args.tie_embeddings
        if theirs not in source and not is_tied:
            refuse(f"it has no {theirs}")
        if theirs in source and source[theirs][0] != shapes[ours]:
            refuse(f"{theirs} is {source[theirs][0]}, expected {shapes[ours]}")
    left = {name for name in source if not name.endswith(BENIGN)} - set(dict(names).values())
    if left:
        refuse(f"{min(left)} has no place in this model")
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
                refuse(f"{theirs} is not the embedding it is tied to")
            continue
        is_turned = in_halves and ours.endswith(TURNED)
        state[ours].copy_(halves_to_pairs(tensor, args.head_dim) if is_turned else tensor)
    return model


def check_range(name, tensor, most, dtype):
    """Raise UserError where a tensor has numbers that a number format cannot hold."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if most < largest < math.inf:
        raise UserError(
            f"dtype = {dtype} cannot carry {name}, which has numbers up to {largest:g}; "
            f"take bf16 or fp32"
        )
