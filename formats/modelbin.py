"""
model.bin, which run.c reads: written by export_model(), read by read_bin().

Version 0 is llama2.c's first format, byte for byte, and carries plain Llama 2 in fp32. Version 3
describes itself completely and carries every option of ModelArgs and every number format.
doc/format.md specifies both. llama2.c's versions 1 and 2 are read as well.

To add an option: its field or bit in V3_HEADER or V3_OPTIONS, its tensor in NAMES of tensors.py,
and the same in run.c and doc/format.md; until then both versions refuse it by name. To add an
activation: nothing here, since its code in the header is its place in ACTIVATIONS of model.py; the
head of model.py lists the places to touch. To add a number format: its place in DTYPES, its case in
blobs() and read_blobs(), and the same in run.c and doc/format.md. To add a version: a writer in
VERSIONS that refuses what it cannot carry.
"""

import math
import os
import struct
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError
from formats.tensors import (
    NAMES,
    PADDED,
    Target,
    misfit,
    shortest,
    skeleton,
    window_settings,
    windows,
)
from model import ACTIVATIONS, ModelArgs, Transformer
from system.files import atomic_write

V0_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
V0_TARGET = Target({*V0_HEADER, "tie_embeddings"})

MAGIC = 0x616B3432  # "ak42" as a number, that of llama2.c's versions 1 and 2
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
LANES = 16  # rows of a matrix that lie together, since run.c multiplies them at once


class Codes(NamedTuple):
    """A number format of integers: a number is (integer - zero) * scale."""

    bits: int
    group: int  # columns of a row that share a scale
    zero: int
    per_code: int  # columns of a row that lie together


# number formats of matrices and tables; the place is the field `dtype`
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
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
    ("header_size", "I", 80, 84),  # bytes of these fields; 80 in files without the last one
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
    ("tokenizer", "I", 0, (1 << 32) - 1),  # its fingerprint, see tokenizer.py; 0: unknown
)
V3_STRUCT = "<" + "".join(code for _, code, _, _ in V3_HEADER)
V3_SHORTEST = 80  # bytes of the header of earlier files, which lack `tokenizer`
MAX_WINDOW = 1 << 24
TABLES = {"value_embeddings", "bigram_embeddings"}  # of rows that are looked up, not multiplied
V3_TARGET = Target({*V3_OPTIONS, *(name for name, *_ in V3_HEADER), "sliding_window"})


def refuse(args, target, version):
    """Raise UserError, naming the option, for a model that is more than the version can say."""
    if name := misfit(args, target):
        raise UserError(
            f"version {version} cannot carry {name} = {getattr(args, name)}: "
            f"its readers take {getattr(ModelArgs, name)} for granted"
        )


def tensors(model, with_rope_tables=False):
    """
    Yield (name, parts) of each tensor of a model file in the order of NAMES, the same in every
    version: one part, or one for each layer or table that has it. Rows past vocab_size are left
    out, and so is a tied head.
    """
    args, state = model.args, model.state_dict()
    for key, *_ in NAMES:
        if key == "output" and with_rope_tables:
            cos, sin = model.rope(0, args.max_seq_len)
            yield from (("rope_cos", [cos]), ("rope_sin", [sin]))
        if key == "output" and args.tie_embeddings:
            continue
        name = key.removeprefix("layers.{}.").removesuffix(".{}")
        keys = [key.format(i) for i in range(args.n_layers)] if "{}" in key else [key]
        keys = [k for key in keys for k in (key, f"{key}.weight") if k in state]
        n_rows = args.vocab_size if name in PADDED else None
        if keys:
            yield name, [state[key][:n_rows] for key in keys]


def quantized(matrix, codes):
    """
    Integers (rows, cols), uint8, and scales (rows, groups), bfloat16, of a matrix, which is about
    (integers - codes.zero) * scales. int8 puts the largest number of a group near -127 or 127. int4
    tries several scales around the one that puts it at -8 and takes that of least squared error.
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
    Both in the order of the file, see doc/format.md: blocks of `lanes` rows, in which the first
    columns of each row come first, then the next columns; padded with zeros.
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


def write_v0(model, f, dtype, fingerprint):
    args = model.args
    refuse(args, V0_TARGET, 0)
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


def lanes_of(name, args):
    """How many rows of a matrix lie together; 1 for a table whose rows are only looked up."""
    is_untied = name == "tok_embeddings" and not args.tie_embeddings
    return 1 if name in TABLES or is_untied else LANES


def is_vector(name, parts):
    """Whether a tensor stays in float32 in every number format: gains and other vectors."""
    return parts[0].dim() == 1 or name == "smear_gate"


def blobs(model, dtype):
    """What follows the header of a version 3 file: iterables of bytes, each to be aligned."""
    for name, parts in tensors(model):
        kind = torch.float32 if is_vector(name, parts) else DTYPES[dtype]
        if isinstance(kind, Codes):
            lanes = lanes_of(name, model.args)
            made = [laid_out(*quantized(part, kind), kind, lanes) for part in parts]
            yield (raw(numbers) for numbers, _ in made)
            yield (raw(scales) for _, scales in made)
        else:
            yield (raw(part.to(kind)) for part in parts)


def write_v3(model, f, dtype, fingerprint):
    args = model.args
    refuse(args, V3_TARGET, 3)
    values = {
        **args.to_dict(),
        "magic": MAGIC,
        "version": 3,
        "file_size": 1,  # not known yet
        "header_size": struct.calcsize(V3_STRUCT),
        "options": sum(getattr(args, name) << bit for bit, name in enumerate(V3_OPTIONS)),
        "dtype": list(DTYPES).index(dtype),
        "activation": list(ACTIVATIONS).index(args.activation),
        "tokenizer": fingerprint,
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


def export_model(model, path, version=None, dtype="fp32", fingerprint=0):
    """
    Write a Transformer as a model file; on any error `path` stays as it was. version None: 0 if
    that carries the model, so that llama2.c's readers can read it, else 3. fingerprint: that of its
    Tokenizer, which version 3 carries; 0: unknown.
    """
    if version is None:
        version = 3 if dtype != "fp32" or misfit(model.args, V0_TARGET) else 0
    try:
        with atomic_write(path) as f:
            VERSIONS[version](model, f, dtype, fingerprint)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


# ---- reading


class Bytes:
    """The bytes of a file, from which one array after another is taken. Raises UserError."""

    def __init__(self, path):
        self.path, self.at = path, 0
        try:
            self.size = os.path.getsize(path)
            self.data = np.memmap(path, np.uint8, "r") if self.size else np.empty(0, np.uint8)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None

    def take(self, code, count):
        """The next `count` numbers, an array of numpy's type `code`."""
        end = self.at + count * np.dtype(code).itemsize
        if end > self.size:
            raise UserError(f"{self.path} ends at byte {self.size}, but goes on to {end}")
        found = self.data[self.at : end].view(code)
        self.at = end
        return found

    def floats(self, count, code="<f4"):
        return torch.from_numpy(self.take(code, count).astype(np.float32))

    def halves(self, count):
        """The next `count` numbers in bfloat16, as float32."""
        bits = torch.from_numpy(self.take("<i2", count).astype(np.int16))
        return bits.view(torch.bfloat16).float()

    def align(self):
        self.at += -self.at % ALIGNMENT

    def refuse(self, what):
        raise UserError(f"{self.path} is no model.bin that this version reads: {what}")


def read_bin(path):
    """
    The Transformer of a model file of any version, on the CPU, all numbers in float32. Raises
    UserError, one sentence, for anything else.
    """
    data = Bytes(path)
    magic, version = data.take("<u4", 2).tolist()
    version = version if magic == MAGIC else 0
    if version not in (0, 1, 2, 3):
        data.refuse(f"version {version}; expected 0 to 3")
    data.at = 8 if version in (1, 2) else 0
    try:
        model = read_v3(data) if version == 3 else read_llama2cs(data, version)
    except (ValueError, RuntimeError) as e:  # sizes that do not fit, or are too large
        data.refuse(str(e).splitlines()[0])
    if data.at != data.size:
        data.refuse(f"it has {data.size} bytes, and its header stands for {data.at}")
    return model


def model_for(data, args):
    """A Transformer to read into, once the file is known to be large enough for it."""
    if skeleton(args).n_params() > 2 * data.size:  # a number takes half a byte at least
        data.refuse(f"its {data.size} bytes are too few for its header")
    return Transformer(args)


def read_llama2cs(data, version):
    """A model of llama2.c's versions 0, 1 and 2."""
    values = dict(zip(V0_HEADER, data.take("<i4", 7).tolist(), strict=True))
    tied, group = values["vocab_size"] > 0, 0
    values["vocab_size"] = abs(values["vocab_size"])
    if version:
        tied = bool(data.take("u1", 1)[0])
        group = int(data.take("<i4", 1)[0])  # of version 2
    for name, code, least, most in V3_HEADER:
        if code == "i" and name in values and not least <= values[name] <= most:
            data.refuse(f"{name} = {values[name]}, expected {least} to {most}")
    args = ModelArgs(**values, tie_embeddings=tied)
    if version == 2 and (group < 1 or args.dim % group or args.hidden_dim % group):
        data.refuse(f"groups of {group} numbers do not divide its rows")
    model = model_for(data, args)
    order = list(tensors(model, with_rope_tables=version == 0))
    if version:  # the vectors first
        data.at = 256
        order.sort(key=lambda one: not is_vector(*one))
    for name, parts in order:
        if name.startswith("rope"):
            angles = data.floats(parts[0].numel()).view(parts[0].shape)
            if not torch.allclose(angles, parts[0], rtol=0, atol=1e-3):
                data.refuse("its rotary angles are not those of rope_theta = 10000")
            continue
        for part in parts:
            if version == 2 and not is_vector(name, parts):
                found = data.floats(part.numel(), "i1").view(-1, group)
                found *= data.floats(len(found))[:, None]
            else:
                found = data.floats(part.numel())
            part.copy_(found.view(part.shape))
    return model


def read_fingerprint(path):
    """The fingerprint of its Tokenizer in a file that read_bin() reads; 0: unknown."""
    data = Bytes(path)
    is_v3 = data.size >= 8 and data.take("<u4", 2).tolist() == [MAGIC, 3]
    data.at = 0
    return read_v3_header(data)["tokenizer"] if is_v3 else 0


def read_v3_header(data):
    """{field: value} of a version 3 file, and what follows it is next in `data`."""
    header = data.take("u1", V3_SHORTEST).tobytes()
    is_short = header[16:20] == struct.pack("<I", V3_SHORTEST)
    n_more = struct.calcsize(V3_STRUCT) - V3_SHORTEST
    header += bytes(n_more) if is_short else data.take("u1", n_more).tobytes()
    header = struct.unpack(V3_STRUCT, header)
    values = {}
    for (name, code, least, most), value in zip(V3_HEADER, header, strict=True):
        if not least <= value <= most:
            data.refuse(f"{name} = {value}, expected {least} to {most}")
        values[name] = shortest(value) if code == "f" else value
    if values["header_size"] not in (V3_SHORTEST, struct.calcsize(V3_STRUCT)):
        data.refuse(f"header_size = {values['header_size']}")
    return values


def read_v3(data):
    values = read_v3_header(data)
    if values["file_size"] != data.size:
        data.refuse(f"it has {data.size} bytes, and its header says {values['file_size']}")
    sizes = data.take("<i4", values["n_layers"]).tolist()
    if len(set(sizes) - {0}) > 1 or min(sizes) < 0:
        data.refuse("its layers have windows of different sizes")
    values["activation"] = list(ACTIVATIONS)[values["activation"]]
    for bit, name in enumerate(V3_OPTIONS):
        values[name] = bool(values["options"] >> bit & 1)
    options = {k: v for k, v in values.items() if k in ModelArgs.__dataclass_fields__}
    model = model_for(data, ModelArgs(**options, **window_settings(sizes)))
    read_blobs(data, model, list(DTYPES.values())[values["dtype"]])
    return model


def read_blobs(data, model, dtype):
    """Read into a model what blobs() wrote; dtype: a value of DTYPES."""
    for name, parts in tensors(model):
        data.align()
        kind = torch.float32 if is_vector(name, parts) else dtype
        if isinstance(kind, Codes):
            lanes = lanes_of(name, model.args)
            numbers = [taken_numbers(data, *part.shape, kind, lanes) for part in parts]
            data.align()
            scales = [taken_scales(data, *part.shape, kind, lanes) for part in parts]
            found = [n * s for n, s in zip(numbers, scales, strict=True)]
        else:
            take = data.floats if kind is torch.float32 else data.halves
            found = [take(part.numel()) for part in parts]
        for part, one in zip(parts, found, strict=True):
            part.copy_(one.view(part.shape))


def taken_numbers(data, rows, cols, codes, lanes):
    """The integers of a matrix that laid_out() wrote, minus codes.zero: (rows, cols), float32."""
    blocks, steps = math.ceil(rows / lanes), math.ceil(cols / codes.per_code)
    q = torch.from_numpy(data.take("u1", blocks * steps * lanes * 4).copy())
    q = q.view(blocks, steps, lanes, 1, 4)
    if codes.bits == 4:
        q = torch.cat((q & 15, q >> 4), dim=3)
    q = q.transpose(1, 2).reshape(blocks * lanes, -1)[:rows, :cols]
    return q.float() - codes.zero


def taken_scales(data, rows, cols, codes, lanes):
    """The scale of each number of a matrix, (rows, cols), float32."""
    blocks, groups = math.ceil(rows / lanes), math.ceil(cols / codes.group)
    scales = data.halves(blocks * groups * lanes).view(blocks, groups, lanes)
    scales = scales.transpose(1, 2).reshape(blocks * lanes, groups)[:rows]
    return scales.repeat_interleave(codes.group, dim=1)[:, :cols]
