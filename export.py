"""
From a checkpoint to model.bin, which run.c reads.

    python export.py out/model.bin --checkpoint=out/ckpt.pt --version=0

Version 0 is llama2.c's first format, byte for byte: seven little-endian int32 (dim, hidden_dim,
n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len; vocab_size negative where the output head
has its own matrix), then float32 tensors in the order of v0_tensors.

To add a version: a writer in VERSIONS that refuses what it cannot carry.
"""

import argparse
import struct
from dataclasses import fields

import torch

from checkpoint import load_checkpoint, load_model
from configurator import UserError, one_sentence_errors
from files import atomic_write
from model import ModelArgs

V0_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
V0_CARRIED = {*V0_HEADER, "tie_embeddings"}
TRAINING_ONLY = {"multiple_of", "dropout"}  # no reader needs them


def refuse_unless_plain(args):
    """Raise UserError, naming the option, for a model that is more than version 0 can say."""
    for field in fields(ModelArgs):
        value = getattr(args, field.name)
        if field.name not in V0_CARRIED | TRAINING_ONLY and value != field.default:
            raise UserError(
                f"version 0 cannot carry {field.name} = {value}: "
                f"its readers take {field.default} for granted"
            )


def v0_tensors(model):
    """The tensors of a version 0 file, in order."""
    yield model.tok_embeddings.weight
    for name in (
        "attention_norm",
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "attention.wo",
        "ffn_norm",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ):
        for layer in model.layers:
            yield layer.get_submodule(name).weight
    yield model.norm.weight
    yield model.rope_cos
    yield model.rope_sin
    if not model.args.tie_embeddings:
        yield model.output.weight


def write_v0(model, f):
    args = model.args
    refuse_unless_plain(args)
    header = [getattr(args, name) for name in V0_HEADER]
    if not args.tie_embeddings:
        header[V0_HEADER.index("vocab_size")] *= -1
    f.write(struct.pack("<7i", *header))
    for tensor in v0_tensors(model):
        f.write(tensor.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes())


VERSIONS = {0: write_v0}


def export_model(model, path, version=0):
    """Write a Transformer as a model file; on any error `path` stays as it was."""
    if version not in VERSIONS:
        raise UserError(f"version {version}: expected one of {', '.join(map(str, VERSIONS))}")
    try:
        with atomic_write(path) as f:
            VERSIONS[version](model, f)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


if __name__ == "__main__":
    one_sentence_errors()
    parser = argparse.ArgumentParser(description="Make a model.bin for ./run from a checkpoint.")
    parser.add_argument("path", help="the file to write, such as out/model.bin")
    parser.add_argument("--checkpoint", default="out/ckpt.pt", help="default: %(default)s")
    parser.add_argument("--version", type=int, default=0, help="file format, default: %(default)s")
    words = parser.parse_args()
    export_model(
        load_model(load_checkpoint(words.checkpoint), words.checkpoint), words.path, words.version
    )
    print(f"wrote {words.path}")
