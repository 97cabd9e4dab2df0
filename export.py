"""
From a checkpoint to model.bin, which run.c reads.

    python export.py out/model.bin --checkpoint=out/ckpt.pt --dtype=int8

Version 0 is llama2.c's first format, byte for byte, and carries plain Llama 2 in fp32. Version 3
says everything about itself and carries every option of ModelArgs and every number format.
doc/format.md specifies both.

To add an option: its field or bit in V3_HEADER or V3_OPTIONS, its tensor in tensors(), and the same
in run.c and doc/format.md; until then both versions refuse it by name. To add a number format: its
place in DTYPES, its case in blobs(), and the same two. To add a version: a writer in VERSIONS that
refuses what it cannot carry.
"""

import argparse
import os
import struct
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from checkpoint import load_checkpoint, load_model
from configurator import UserError, one_sentence_errors
from files import atomic_write
from model import ACTIVATIONS, ModelArgs

V0_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
V0_CARRIED = {*V0_HEADER, "tie_embeddings"}
# no reader needs them; window_pattern is judged together with sliding_window
TRAINING_ONLY = {"multiple_of", "dropout", "zero_init", "vocab_multiple", "window_pattern"}

MAGIC = 0x616B3432  # "ak42" as a number, that of llama2.c's versions 1 and 2
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
LANES = 16  # rows of a matrix that lie together: run.c multiplies so many at once


class Codes(NamedTuple):
    """A number format of whole numbers, `zero` of which is subtracted, times a scale."""

    bits: int
    group: int  # columns of a row that share a scale
    zero: int
    per_code: int  # columns of a row that lie together


FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# number formats of matrices and tables; the place is the field `dtype`
DTYPES = {
    "fp32": None,
    "bf16": None,
    "int8": Codes(bits=8, group=64, zero=128, per_code=4),
    "int4": Codes(bits=4, group=32, zero=8, per_code=8),
}

# Bits of the field `options`, the lowest first
V3_OPTIONS = (
    "tie_embeddings",
    "qk_norm",
    "norm_gains",
    "embedding_norm",
    "residual_scalars",
    "smear",
)

# Version 3: name, struct code, least and most value of each field, little-endian, without gaps
V3_HEADER = (
    ("magic", "I", MAGIC, MAGIC),
    ("version", "i", 3, 3),
    ("file_size", "Q", 1, 1 << 62),  # bytes
    ("header_size", "I", 80, 80),  # bytes of these fields
    ("options", "I", 0, (1 << len(V3_OPTIONS)) - 1),
    ("dtype", "I", 0, len(DTYPES) - 1),  # of the tensors
    ("activation", "I", 0, len(ACTIVATIONS) - 1),  # the place in ACTIVATIONS
    ("dim", "i", 1, 1 << 16),
    ("hidden_dim", "i", 1, 1 << 20),
    ("n_layers", "i", 1, 1 << 12),
    ("n_heads", "i", 1, 1 << 12),
    ("n_kv_heads", "i", 1, 1 << 12),
    ("vocab_size", "i", 3, 1 << 24),
    ("max_seq_len", "i", 1, 1 << 24),
    ("value_embeddings", "i", 0, 1 << 12),
    ("bigram_rows", "i", 0, 1 << 28),
    ("norm_eps", "f", 0, 1),
    ("rope_theta", "f", 1, 1e12),
    ("logit_softcap", "f", 0, 1e6),
)
V3_STRUCT = "<" + "".join(code for _, code, _, _ in V3_HEADER)
MAX_WINDOW = 1 << 24
TABLES = {"value_embeddings", "bigram_embeddings"}  # of rows that are looked up, not multiplied
V3_CARRIED = {*V3_OPTIONS, *(name for name, *_ in V3_HEADER), "sliding_window"}

LAYER_TENSORS = (
    "attention_norm",
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "ffn_norm",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def windows(args):
    """The window of each layer, 0 where it sees everything."""
    return [args.window(layer) for layer in range(args.n_layers)]


def not_carried(args, carried):
    """The first field, of dataclasses, that readers of only the `carried` would miss, or None."""
    for field in fields(ModelArgs):
        if field.name in carried | TRAINING_ONLY or getattr(args, field.name) == field.default:
            continue
        if field.name != "sliding_window" or any(windows(args)):
            return field
    return None


def refuse(args, carried, version):
    """Raise UserError, naming the option, for a model that is more than the version can say."""
    if field := not_carried(args, carried):
        raise UserError(
            f"version {version} cannot carry {field.name} = {getattr(args, field.name)}: "
            f"its readers take {field.default} for granted"
        )


def tensors(model, with_rope_tables=False):
    """
    (name, parts) of each tensor of a model file, in the order of every version; the parts lie one
    behind the other. Rows past vocab_size, and what the model does not have, are left out.
    """
    args, state = model.args, model.state_dict()
    state |= {"rope_cos": model.rope_cos, "rope_sin": model.rope_sin}

    def found(name, *keys):
        parts = [state[key] for key in keys if key in state]
        if name in ("tok_embeddings", "output", "value_embeddings"):
            parts = [part[: args.vocab_size] for part in parts]
        return [(name, parts)] if parts else []

    def per_layer(name):
        return found(name, *(f"layers.{i}.{name}.weight" for i in range(args.n_layers)))

    yield from found("tok_embeddings", "tok_embeddings.weight")
    for name in LAYER_TENSORS:
        yield from per_layer(name)
    yield from found("norm", "norm.weight")
    if with_rope_tables:
        yield from found("rope_cos", "rope_cos")
        yield from found("rope_sin", "rope_sin")
    if not args.tie_embeddings:
        yield from found("output", "output.weight")
    yield from per_layer("attention.q_norm")
    yield from per_layer("attention.k_norm")
    yield from found("embedding_norm", "embedding_norm.weight")
    yield from found("residual_scalars", "residual_scalars")
    yield from found("x0_scalars", "x0_scalars")
    tables = (f"value_embeddings.{i}.weight" for i in range(args.value_embeddings))
    yield from found("value_embeddings", *tables)
    yield from found("bigram_embeddings", "bigram_embeddings.weight")
    yield from found("smear_gate", "smear_gate.weight")


def quantized(matrix, codes):
    """
    Whole numbers (rows, cols), uint8, and scales (rows, groups), bfloat16, of a matrix, which is
    about (numbers - codes.zero) * scales. int8 has the largest number of a group near -127 or 127.
    int4 takes, of some scales around the one that has it at -8, that of the least squared error.
    """
    rows, cols = matrix.shape
    w = F.pad(matrix.float(), (0, -cols % codes.group)).view(rows, -1, codes.group)
    largest = w.gather(2, w.abs().argmax(2, keepdim=True))  # with its sign
    if codes.bits == 8:  # a little more, since bfloat16 may round the scale down
        tries, least, most = [largest.abs() / 127 * (1 + 2**-8)], -127, 127
    else:
        tries, least, most = [largest / -8 * (0.8 + 0.02 * i) for i in range(16)], -8, 7
    best = torch.full_like(largest, torch.inf)
    numbers, scales = torch.zeros_like(w), torch.zeros_like(largest)
    for scale in tries:
        scale = scale.bfloat16().float()
        q = (w / torch.where(scale == 0, 1, scale)).round().clamp(least, most)
        error = (w - q * scale).square().sum(2, keepdim=True)
        numbers = torch.where(error < best, q, numbers)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    numbers = (numbers + codes.zero).to(torch.uint8).view(rows, -1)[:, :cols]
    return numbers, scales.squeeze(2).bfloat16()


def laid_out(numbers, scales, codes, lanes):
    """
    The two in the order of the file, see doc/format.md: blocks of `lanes` rows, of which the first
    columns of each lie one behind the other, then the next ones; filled up with zeros.
    """
    rows, cols = numbers.shape
    fill = (0, -cols % codes.per_code, 0, -rows % lanes)
    numbers = F.pad(numbers, fill, value=codes.zero)
    numbers = numbers.view(-1, lanes, numbers.shape[1] // codes.per_code, codes.per_code // 4, 4)
    numbers = numbers.transpose(1, 2)  # (blocks, steps, lanes, 1 or 2, 4)
    if codes.bits == 4:
        numbers = numbers[:, :, :, 0] | numbers[:, :, :, 1] << 4
    scales = F.pad(scales, (0, 0, 0, -rows % lanes)).view(-1, lanes, scales.shape[1])
    return numbers.contiguous(), scales.transpose(1, 2).contiguous()


def raw(tensor):
    """The bytes of a tensor, little-endian."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]
    array = tensor.detach().cpu().reshape(-1).view(whole).numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def write_v0(model, f, dtype):
    args = model.args
    refuse(args, V0_CARRIED, 0)
    if dtype != "fp32":
        raise UserError(
            f"version 0 cannot carry dtype = {dtype}: its readers take fp32 for granted"
        )
    header = [getattr(args, name) for name in V0_HEADER]
    if not args.tie_embeddings:
        header[V0_HEADER.index("vocab_size")] *= -1
    f.write(struct.pack("<7i", *header))
    for _, parts in tensors(model, with_rope_tables=True):
        f.writelines(raw(part.float()) for part in parts)


def blobs(model, dtype):
    """What lies behind the header of a version 3 file, each aligned, as iterables of bytes."""
    codes = DTYPES[dtype]
    for name, parts in tensors(model):
        if parts[0].dim() == 1 or name == "smear_gate":  # gains and other vectors
            yield (raw(part.float()) for part in parts)
        elif codes is None:
            yield (raw(part.to(FLOATS[dtype])) for part in parts)
        else:
            untied = name == "tok_embeddings" and not model.args.tie_embeddings
            lanes = 1 if name in TABLES or untied else LANES
            made = [laid_out(*quantized(part, codes), codes, lanes) for part in parts]
            yield (raw(numbers) for numbers, _ in made)
            yield (raw(scales) for _, scales in made)


def write_v3(model, f, dtype):
    args = model.args
    refuse(args, V3_CARRIED, 3)
    values = {
        **args.to_dict(),
        "magic": MAGIC,
        "version": 3,
        "file_size": 1,  # not known yet
        "header_size": struct.calcsize(V3_STRUCT),
        "options": sum(getattr(args, name) << bit for bit, name in enumerate(V3_OPTIONS)),
        "dtype": list(DTYPES).index(dtype),
        "activation": ACTIVATIONS.index(args.activation),
    }
    limits = [*V3_HEADER, ("sliding_window", "i", 0, MAX_WINDOW)]
    for name, _, least, most in limits:
        if not least <= values[name] <= most:
            raise UserError(
                f"version 3 cannot carry {name} = {values[name]}: expected {least} to {most}"
            )
    f.write(bytes(values["header_size"]))
    f.write(struct.pack(f"<{args.n_layers}i", *windows(args)))
    for pieces in blobs(model, dtype):
        f.write(bytes(-f.tell() % ALIGNMENT))
        f.writelines(pieces)
    values["file_size"] = f.tell()
    f.seek(0)
    f.write(struct.pack(V3_STRUCT, *(values[name] for name, *_ in V3_HEADER)))


VERSIONS = {0: write_v0, 3: write_v3}


def export_model(model, path, version=None, dtype="fp32"):
    """
    Write a Transformer as a model file; on any error `path` stays as it was. version None: 0 where
    that carries the model, so that llama2.c's readers take it, else 3.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype}: expected one of {', '.join(DTYPES)}")
    if version is None:
        version = 3 if dtype != "fp32" or not_carried(model.args, V0_CARRIED) else 0
    if version not in VERSIONS:
        raise UserError(
            f"version {version}: expected auto or one of {', '.join(map(str, VERSIONS))}"
        )
    try:
        with atomic_write(path) as f:
            VERSIONS[version](model, f, dtype)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def is_checkpoint(path):
    """Whether a file begins as torch.save() makes them, a zip file."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return f.read(4) == b"PK\3\4"


if __name__ == "__main__":
    one_sentence_errors()
    parser = argparse.ArgumentParser(description="Make a model.bin for ./run from a checkpoint.")
    parser.add_argument("path", help="the file to write, such as out/model.bin")
    parser.add_argument("--checkpoint", default="out/ckpt.pt", help="default: %(default)s")
    parser.add_argument(
        "--version",
        default="auto",
        help="file format: 0, llama2.c's first, for plain Llama 2 alone; 3, which carries every "
        "option; auto (default), 0 if it carries the model and else 3",
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        help=f"number format of the weights: {', '.join(DTYPES)} (default: %(default)s)",
    )
    words = parser.parse_args()
    if is_checkpoint(words.path):
        raise UserError(
            f"{words.path} is a checkpoint, which would be lost: name another file for the model"
        )
    version = {"auto": None, **{str(v): v for v in VERSIONS}}.get(words.version, words.version)
    model = load_model(load_checkpoint(words.checkpoint), words.checkpoint)
    export_model(model, words.path, version, words.dtype)
    print(f"wrote {words.path}")
