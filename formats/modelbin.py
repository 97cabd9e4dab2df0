"""
model.bin, the file that run.c reads: export_model() writes it, read_bin() reads it.

Version 0 is llama2.c's first format, byte for byte, and stores plain Llama 2 in fp32. Version 3 is
self-describing and stores every option of ModelArgs in every dtype. doc/format.md specifies both.
llama2.c's versions 1 and 2 can be read, but not written.

To add an option, add its field to V3_HEADER or its bit to V3_OPTIONS, its tensor to NAMES in
tensors.py, and the same to run.c and doc/format.md; until then both versions refuse it by name.
To add an activation, see the top of model.py; nothing changes here, because its code in the header
is its index in ACTIVATIONS. To add a dtype, add it to DTYPES, to blobs() and read_blobs(), and to
run.c and doc/format.md. To add a version, add a writer to VERSIONS that refuses what the version
cannot store.
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
from model import ACTIVATIONS, MAX_CONV, ModelArgs, Transformer
from system.files import atomic_write

V0_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
V0_TARGET = Target({*V0_HEADER, "tie_embeddings"})

MAGIC = 0x616B3432  # "ak42" as an integer, as in llama2.c's versions 1 and 2
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
LANES = 16  # rows of a matrix that are interleaved, because run.c multiplies them together


class Codes(NamedTuple):
    """A quantized dtype: a value is (integer - zero) * scale."""

    bits: int
    group: int  # columns of a row that share a scale
    zero: int
    per_code: int  # adjacent columns of a row that are stored together


# Dtypes of matrices and tables; the field `dtype` is an index into this
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": Codes(bits=8, group=64, zero=128, per_code=4),
    "int4": Codes(bits=4, group=32, zero=8, per_code=8),
}

# Bits of the field `options`, lowest first
V3_OPTIONS = (
    "tie_embeddings",
    "qk_norm",
    "norm_gains",
    "embedding_norm",
    "residual_scalars",
    "smear",
    "orders",
    "separate_documents",
)

# Version 3: name, struct code, minimum and maximum of each field; little-endian, without gaps
V3_HEADER = (
    ("magic", "I", MAGIC, MAGIC),
    ("version", "i", 3, 3),
    ("file_size", "Q", 1, 1 << 62),  # bytes
    ("header_size", "I", 80, 92),  # bytes of these fields; older files lack the last ones
    ("options", "I", 0, (1 << len(V3_OPTIONS)) - 1),
    ("dtype", "I", 0, len(DTYPES) - 1),  # index into DTYPES
    ("activation", "I", 0, len(ACTIVATIONS) - 1),  # index into ACTIVATIONS
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
    ("tokenizer", "I", 0, (1 << 32) - 1),  # fingerprint, see tokenizer.py; 0: unknown
    ("embedding_conv", "i", 0, MAX_CONV),
    ("key_conv", "i", 0, MAX_CONV),
)
V3_STRUCT = "<" + "".join(code for _, code, _, _ in V3_HEADER)
V3_SIZES = 80, 84, 92  # bytes of the header: without the last three fields, without two, whole
MAX_WINDOW = 1 << 24
TABLES = {"value_embeddings", "bigram_embeddings"}  # rows are looked up, not multiplied
V3_TARGET = Target({*V3_OPTIONS, *(name for name, *_ in V3_HEADER), "sliding_window"})


def refuse(args, target, version):
    """Raise UserError with the option's name if the version cannot store the model."""
    if name := misfit(args, target):
        instead = "--version=3" if version == 0 else "--format=checkpoint"
        raise UserError(
            f"version {version} cannot store {name} = {getattr(args, name)}: use {instead}"
        )


def tensors(model, with_rope_tables=False):
    """
    Yield (name, parts) for each tensor of a model file, in the order of NAMES, which is the same in
    every version. A tensor has one part, or one for each layer or table that has it. Rows past
    vocab_size and a tied head are left out.
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


def quantized(matrix, codes, importance=None):
    """
    Quantize a matrix. Returns integers (rows, cols), uint8, and scales (rows, groups), bfloat16;
    the matrix is about (integers - codes.zero) * scales. In int8 the largest value of a group
    becomes about -127 or 127. int4 tries several scales around the one that maps it to -8, and
    keeps the one with the least squared error. importance (cols,): weights of these squares.
    """
    rows, cols = matrix.shape
    w = F.pad(matrix.float(), (0, -cols % codes.group)).view(rows, -1, codes.group)
    largest = w.gather(2, w.abs().argmax(2, keepdim=True))  # with its sign
    if codes.bits == 8:  # slightly larger, since bfloat16 may round the scale down
        candidates, low, high = [largest.abs() / 127 * (1 + 2**-8)], -127, 127
    else:
        candidates, low, high = [largest / -8 * (0.8 + 0.02 * i) for i in range(16)], -8, 7
    importance = torch.ones(cols) if importance is None else importance
    importance = F.pad(importance, (0, -cols % codes.group)).view(-1, codes.group)
    best = torch.full_like(largest, torch.inf)
    integers, scales = torch.zeros_like(w), torch.zeros_like(largest)
    for scale in candidates:
        scale = scale.bfloat16().float()
        q = (w / torch.where(scale == 0, 1, scale)).round().clamp(low, high)
        error = ((w - q * scale).square() * importance).sum(2, keepdim=True)
        integers = torch.where(error < best, q, integers)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    integers = (integers + codes.zero).to(torch.uint8).view(rows, -1)[:, :cols]
    return integers, scales.squeeze(2).bfloat16()


def values_of(integers, scales, codes):
    """Return the matrix (rows, cols), float32, that a quantized one stands for."""
    wide = scales.float().repeat_interleave(codes.group, 1)[:, : integers.shape[1]]
    return (integers.float() - codes.zero) * wide


def laid_out(integers, scales, codes, lanes):
    """
    Return both in the order of the file (see doc/format.md): in each block of `lanes` rows, the
    first columns of every row, then the next columns, and so on; padded with zeros.
    """
    rows, cols = integers.shape
    fill = (0, -cols % codes.per_code, 0, -rows % lanes)
    integers = F.pad(integers, fill, value=codes.zero)
    n_steps = integers.shape[1] // codes.per_code
    integers = integers.view(-1, lanes, n_steps, codes.per_code // 4, 4)
    integers = integers.transpose(1, 2)  # (blocks, steps, lanes, 1 or 2, 4)
    if codes.bits == 4:
        integers = integers[:, :, :, 0] | integers[:, :, :, 1] << 4
    scales = F.pad(scales, (0, 0, 0, -rows % lanes)).view(-1, lanes, scales.shape[1])
    return integers.contiguous(), scales.transpose(1, 2).contiguous()


def raw(tensor):
    """Return the bytes of a tensor, little-endian."""
    int_type = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]
    array = tensor.detach().cpu().reshape(-1).view(int_type).numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def write_v0(model, f, dtype, fingerprint, rounded):
    args = model.args
    refuse(args, V0_TARGET, 0)
    if dtype != "fp32":
        raise UserError(f"version 0 cannot store dtype = {dtype}: use --version=3")
    header = [getattr(args, name) for name in V0_HEADER]
    if not args.tie_embeddings:
        header[V0_HEADER.index("vocab_size")] *= -1
    f.write(struct.pack("<7i", *header))
    for _, parts in tensors(model, with_rope_tables=True):
        f.writelines(raw(part.float()) for part in parts)


def lanes_of(name, args):
    """Return how many rows of a matrix are interleaved; 1 for a table that is only looked up."""
    is_untied = name == "tok_embeddings" and not args.tie_embeddings
    return 1 if name in TABLES or is_untied else LANES


def is_vector(name, parts):
    """Return whether a tensor is float32 in every dtype, like gains and other vectors."""
    return parts[0].dim() == 1 or name == "smear_gate" or name.endswith("_conv")


def blobs(model, dtype, rounded):
    """Yield what follows the header of a version 3 file: iterables of bytes, each aligned."""
    for name, parts in tensors(model):
        kind = torch.float32 if is_vector(name, parts) else DTYPES[dtype]
        if isinstance(kind, Codes):
            lanes = lanes_of(name, model.args)
            codes = (rounded.get((name, i)) or quantized(x, kind) for i, x in enumerate(parts))
            codes = [laid_out(*pair, kind, lanes) for pair in codes]
            yield (raw(integers) for integers, _ in codes)
            yield (raw(scales) for _, scales in codes)
        else:
            yield (raw(part.to(kind)) for part in parts)


def write_v3(model, f, dtype, fingerprint, rounded):
    args = model.args
    refuse(args, V3_TARGET, 3)
    values = {
        **args.to_dict(),
        "magic": MAGIC,
        "version": 3,
        "file_size": 1,  # set below
        "header_size": struct.calcsize(V3_STRUCT),
        "options": sum(getattr(args, name) << bit for bit, name in enumerate(V3_OPTIONS)),
        "dtype": list(DTYPES).index(dtype),
        "activation": list(ACTIVATIONS).index(args.activation),
        "tokenizer": fingerprint,
    }
    limits = [*V3_HEADER, ("sliding_window", "i", 0, MAX_WINDOW)]
    for name, _, low, high in limits:
        if not low <= values[name] <= high:
            raise UserError(
                f"version 3 cannot store {name} = {values[name]}: expected {low} to {high}"
            )
    f.write(bytes(values["header_size"]))
    f.write(struct.pack(f"<{args.n_layers}i", *windows(args)))
    for parts in blobs(model, dtype, rounded):
        f.write(bytes(-f.tell() % ALIGNMENT))
        f.writelines(parts)
    values["file_size"] = f.tell()
    f.seek(0)
    f.write(struct.pack(V3_STRUCT, *(values[name] for name, *_ in V3_HEADER)))


VERSIONS = {0: write_v0, 3: write_v3}


def export_model(model, path, version=None, dtype="fp32", fingerprint=0, rounded=None):
    """
    Write a Transformer as a model file; on any error, `path` is left unchanged. version None: 0 if
    it can store the model, so that programs made for llama2.c can read it, else 3. fingerprint: of
    the model's Tokenizer, stored by version 3; 0: unknown. rounded: matrices that are already
    quantized, as calibration.calibrate() returns them.
    """
    if version is None:
        version = 3 if dtype != "fp32" or misfit(model.args, V0_TARGET) else 0
    try:
        with atomic_write(path) as f:
            VERSIONS[version](model, f, dtype, fingerprint, rounded or {})
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


# ---- reading


class Bytes:
    """The bytes of a file, read as one array after another. Raises UserError."""

    def __init__(self, path):
        self.path, self.at = path, 0
        try:
            self.size = os.path.getsize(path)
            self.data = np.memmap(path, np.uint8, "r") if self.size else np.empty(0, np.uint8)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None

    def take(self, code, count):
        """Return the next `count` values as an array of NumPy's type `code`."""
        end = self.at + count * np.dtype(code).itemsize
        if end > self.size:
            self.refuse(f"it ends at byte {self.size}, expected at least {end}")
        values = self.data[self.at : end].view(code)
        self.at = end
        return values

    def floats(self, count, code="<f4"):
        return torch.from_numpy(self.take(code, count).astype(np.float32))

    def bfloat16s(self, count):
        """Return the next `count` bfloat16 values, as float32."""
        bits = torch.from_numpy(self.take("<i2", count).astype(np.int16))
        return bits.view(torch.bfloat16).float()

    def align(self):
        self.at += -self.at % ALIGNMENT

    def refuse(self, reason):
        raise UserError(f"{self.path} is damaged or not a model.bin: {reason}")


def is_model_bin(path):
    """Whether a file starts like a model.bin of any version."""
    with open(path, "rb") as f:
        start = f.read(struct.calcsize("<7i"))
    if start[:4] == struct.pack("<I", MAGIC):
        return True
    sizes = map(abs, struct.unpack("<7i", start)) if len(start) == 28 else [0]
    return all(0 < size <= 1 << 24 for size in sizes)


def read_bin(path):
    """
    Return the Transformer of a model file of any version, float32, on the CPU. Raises UserError for
    any other file.
    """
    data = Bytes(path)
    magic, version = data.take("<u4", 2).tolist()
    version = version if magic == MAGIC else 0
    if version not in (0, 1, 2, 3):
        data.refuse(f"its version is {version}, expected 0 to 3")
    data.at = 8 if version in (1, 2) else 0
    try:
        model = read_v3(data) if version == 3 else read_llama2c(data, version)
    except (ValueError, RuntimeError) as e:  # sizes that do not match, or are too large
        data.refuse(str(e).splitlines()[0])
    if data.at != data.size:
        data.refuse(f"it has {data.size} bytes, but its header describes {data.at}")
    return model


def model_for(data, args):
    """Return a Transformer to read into, if the file is large enough for it."""
    if skeleton(args).n_params() > 2 * data.size:  # a value takes at least half a byte
        data.refuse(f"its header describes a model larger than its {data.size} bytes")
    return Transformer(args)


def read_llama2c(data, version):
    """Return the Transformer of a file of version 0, 1 or 2."""
    values = dict(zip(V0_HEADER, data.take("<i4", 7).tolist(), strict=True))
    tied, group = values["vocab_size"] > 0, 0
    values["vocab_size"] = abs(values["vocab_size"])
    if version:
        tied = bool(data.take("u1", 1)[0])
        group = int(data.take("<i4", 1)[0])  # only used by version 2
    for name, code, low, high in V3_HEADER:
        if code == "i" and name in values and not low <= values[name] <= high:
            data.refuse(f"{name} = {values[name]}, expected {low} to {high}")
    args = ModelArgs(**values, tie_embeddings=tied)
    if version == 2 and (group < 1 or args.dim % group or args.hidden_dim % group):
        data.refuse(f"its rows are not multiples of its group size, {group}")
    model = model_for(data, args)
    order = list(tensors(model, with_rope_tables=version == 0))
    if version:  # vectors come first
        data.at = 256
        order.sort(key=lambda item: not is_vector(*item))
    for name, parts in order:
        if name.startswith("rope"):
            angles = data.floats(parts[0].numel()).view(parts[0].shape)
            if not torch.allclose(angles, parts[0], rtol=0, atol=1e-3):
                data.refuse("its rotary angles do not match rope_theta = 10000")
            continue
        for part in parts:
            if version == 2 and not is_vector(name, parts):
                values = data.floats(part.numel(), "i1").view(-1, group)
                values *= data.floats(len(values))[:, None]
            else:
                values = data.floats(part.numel())
            part.copy_(values.view(part.shape))
    return model


def read_fingerprint(path):
    """Return the Tokenizer's fingerprint from a file that read_bin() reads; 0: unknown."""
    data = Bytes(path)
    is_v3 = data.size >= 8 and data.take("<u4", 2).tolist() == [MAGIC, 3]
    data.at = 0
    return read_v3_header(data)["tokenizer"] if is_v3 else 0


def read_v3_header(data):
    """Return {field: value} of a version 3 file, and leave `data` at the end of the header."""
    header = data.take("u1", V3_SIZES[0]).tobytes()
    (size,) = struct.unpack_from("<I", header, 16)
    if size not in V3_SIZES:
        data.refuse(f"header_size = {size}, expected one of {', '.join(map(str, V3_SIZES))}")
    header += data.take("u1", size - len(header)).tobytes()
    header = struct.unpack(V3_STRUCT, header.ljust(V3_SIZES[-1], b"\0"))
    values = {}
    for (name, code, low, high), value in zip(V3_HEADER, header, strict=True):
        if not low <= value <= high:
            data.refuse(f"{name} = {value}, expected {low} to {high}")
        values[name] = shortest(value) if code == "f" else value
    return values


def read_v3(data):
    values = read_v3_header(data)
    if values["file_size"] != data.size:
        data.refuse(f"it has {data.size} bytes, but its header says {values['file_size']}")
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
    """Read what blobs() wrote into a model; dtype: a value of DTYPES."""
    for name, parts in tensors(model):
        data.align()
        kind = torch.float32 if is_vector(name, parts) else dtype
        if isinstance(kind, Codes):
            lanes = lanes_of(name, model.args)
            integers = [read_integers(data, *part.shape, kind, lanes) for part in parts]
            data.align()
            scales = [read_scales(data, *part.shape, kind, lanes) for part in parts]
            values = [n * s for n, s in zip(integers, scales, strict=True)]
        else:
            take = data.floats if kind is torch.float32 else data.bfloat16s
            values = [take(part.numel()) for part in parts]
        for part, value in zip(parts, values, strict=True):
            part.copy_(value.view(part.shape))


def read_integers(data, rows, cols, codes, lanes):
    """Return the integers of a quantized matrix minus codes.zero, (rows, cols), float32."""
    blocks, steps = math.ceil(rows / lanes), math.ceil(cols / codes.per_code)
    q = torch.from_numpy(data.take("u1", blocks * steps * lanes * 4).copy())
    q = q.view(blocks, steps, lanes, 1, 4)
    if codes.bits == 4:
        q = torch.cat((q & 15, q >> 4), dim=3)
    q = q.transpose(1, 2).reshape(blocks * lanes, -1)[:rows, :cols]
    return q.float() - codes.zero


def read_scales(data, rows, cols, codes, lanes):
    """Return the scale of each element of a quantized matrix, (rows, cols), float32."""
    blocks, groups = math.ceil(rows / lanes), math.ceil(cols / codes.group)
    scales = data.bfloat16s(blocks * groups * lanes).view(blocks, groups, lanes)
    scales = scales.transpose(1, 2).reshape(blocks * lanes, groups)[:rows]
    return scales.repeat_interleave(codes.group, dim=1)[:, :cols]
