"""
Every format that a model is read from and written to, in two tables: SOURCES and FORMATS.

To add a source: a function in SOURCES that returns a Loaded, and how recognize() knows it. To add a
format: a function in FORMATS that refuses what it cannot carry before it writes anything.
"""

import glob
import json
import os
import pickle
from collections.abc import Callable
from typing import NamedTuple

import torch

import gguffile
import huggingface
import modelbin
from checkpoint import load_checkpoint, load_model, save_file
from configurator import UserError
from files import atomic_write
from huggingface import FastTokenizer, fill, read_json
from model import ModelArgs, Transformer
from modelbin import export_model, skeleton
from tokenizer import Tokenizer

HUB = "hf:"  # before the name of a model of the hub


class Loaded(NamedTuple):
    """A model, its tokenizer or None, and what is known of its training, for model cards."""

    model: Transformer
    tokenizer: Tokenizer | FastTokenizer | None
    facts: dict


# ---- reading


def tokenizer_in(folder):
    """The Tokenizer of a folder with tokenizer.model or only tokenizer.json, or None."""
    path = os.path.join(folder, "tokenizer.model")
    if os.path.isfile(path):
        return Tokenizer(path)
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return FastTokenizer(folder)
    return None


def from_checkpoint(path):
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint, path)
    folder = os.path.dirname(path)
    return Loaded(model, tokenizer_in(folder), training_facts(checkpoint, folder))


def training_facts(checkpoint, folder):
    """What a checkpoint and the log beside it say of the training, by name."""
    config, step = checkpoint.get("config", {}), checkpoint.get("iter_num")
    if not config:
        return {}
    tokens = checkpoint.get("n_sequences", 0) * config.get("max_seq_len", 0)
    facts = {
        "steps": f"{step:,}",
        "tokens seen": f"{tokens:,}",
        "optimizer": config.get("optimizer"),
        "training": f"{checkpoint.get('train_s', 0) / 60:,.1f} minutes",
    }
    log = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(log):
        return facts
    with open(log, encoding="utf-8") as f:
        for line in f:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that is going on
                continue
            if entry.get("kind") == "start":
                facts["training text"] = f"{entry.get('train_tokens', 0):,} tokens"
                facts["device"] = entry.get("device_name")
            elif entry.get("kind") == "eval" and entry.get("step") == step:
                facts["validation loss"] = f"{entry['val_loss']:.4f} nats a token"
                if entry.get("val_bpb"):
                    facts["validation"] = f"{entry['val_bpb']:.4f} bits per byte"
    return facts


def from_hf(path):
    if path.startswith(HUB):
        path = huggingface.download(path.removeprefix(HUB))
    return Loaded(huggingface.read_folder(path), tokenizer_in(path), {})


def from_safetensors(path):
    return Loaded(huggingface.read_file(path), tokenizer_in(os.path.dirname(path)), {})


def from_bin(path):
    return Loaded(modelbin.read_bin(path), tokenizer_in(os.path.dirname(path)), {})


def from_gguf(path):
    model, proto = gguffile.read_gguf(path)
    return Loaded(model, proto and Tokenizer(path, proto), {})


META_PARAMS = set(
    "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta "
    "use_scaled_rope max_seq_len max_batch_size".split()
)


def from_meta(folder):
    """
    A model as Meta releases them: params.json, consolidated.00.pth and more, each with a part of
    every matrix, and tokenizer.model there or one folder up. The context, which params.json may
    leave out, is 4096 then.
    """
    params = read_json(os.path.join(folder, "params.json"))
    for name in params:
        if name not in META_PARAMS or (name == "use_scaled_rope" and params[name]):
            raise UserError(f"{folder} cannot be read: {name} = {params[name]} is unknown here")
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "consolidated.*.pth")))
    if not paths:
        raise UserError(f"{folder} has no consolidated.00.pth; expected the weights there")
    try:
        parts = [torch.load(path, "cpu", weights_only=True, mmap=True) for path in paths]
        rows = {name: sum(len(part[f"{name}.weight"]) for part in parts) for name in WHOLE_ROWS}
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, KeyError) as e:
        raise UserError(f"{folder} cannot be read: {str(e).splitlines()[0]}") from None
    names = set("dim n_layers n_heads n_kv_heads norm_eps rope_theta".split()) & params.keys()
    try:
        args = ModelArgs(
            **{name: params[name] for name in names if params[name] is not None},
            vocab_size=rows["output"],
            hidden_dim=rows["layers.0.feed_forward.w1"],
            max_seq_len=params.get("max_seq_len", 4096),
            tie_embeddings=False,
        )
    except (ValueError, TypeError) as e:
        raise UserError(f"{folder} cannot be read: {e}") from None
    shapes = {name: tensor.shape for name, tensor in skeleton(args).state_dict().items()}

    def whole(name):
        tensors = [part[name] for part in parts]
        if tensors[0].shape == shapes.get(name):  # the same in all
            return tensors[0]
        by_columns = tensors[0].shape[0] == shapes[name][0]
        return torch.cat(tensors, dim=1 if by_columns else 0)

    source = {
        name: lambda name=name: whole(name) for name in parts[0] if not name.endswith("rope.freqs")
    }
    model = Transformer(args)
    fill(model, source, [(name, name) for name in shapes], folder)
    folder = folder.rstrip("/\\")
    return Loaded(model, tokenizer_in(folder) or tokenizer_in(os.path.dirname(folder)), {})


WHOLE_ROWS = ("output", "layers.0.feed_forward.w1")  # whose rows are spread over the files

SOURCES = {
    "checkpoint": from_checkpoint,
    "hf": from_hf,
    "meta": from_meta,
    "bin": from_bin,
    "gguf": from_gguf,
    "safetensors": from_safetensors,
}


def recognize(path):
    """Which of SOURCES a path, or hf:user/name, is: by what is in it. None: none of them."""
    if path.startswith(HUB) or huggingface.is_folder(path):
        return "hf"
    if os.path.isdir(path):
        return "meta" if os.path.isfile(os.path.join(path, "params.json")) else "checkpoint"
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        start = f.read(4)
    if start in (b"PK\3\4", b"GGUF"):
        return "gguf" if start == b"GGUF" else "checkpoint"
    endings = {".safetensors": "safetensors", ".bin": "bin"}
    return endings.get(os.path.splitext(path)[1])


def load(path, kind=None, tokenizer=""):
    """
    The Loaded of a path in any of SOURCES, or of hf:user/name. tokenizer: the path of another
    SentencePiece model, or none. Raises UserError.
    """
    loaded = SOURCES[kind or recognize(path) or "checkpoint"](path)
    if tokenizer:
        found = None if tokenizer == "none" else Tokenizer(tokenizer)
        loaded = loaded._replace(tokenizer=found)
    found, n = loaded.tokenizer, loaded.model.args.vocab_size
    if isinstance(found, Tokenizer) and found.vocab_size != n:
        raise UserError(
            f"{found.model_path} has {found.vocab_size} pieces, but the model's vocabulary {n}: "
            f"give the tokenizer it was trained with (--tokenizer=PATH)"
        )
    return loaded


# ---- writing


def beside(path, name, tokenizer, data):
    """Put a file of the tokenizer beside a model, unless another one is there."""
    path = os.path.join(os.path.dirname(path), name)
    if os.path.exists(path):
        with open(path, "rb") as f:
            if f.read() != data:
                print(f"note: {path} is of another tokenizer than {tokenizer.model_path}; left")
        return
    with atomic_write(path) as f:
        f.write(data)


def write_bin(model, path, dtype, tokenizer, facts, version=None):
    export_model(model, path, version, dtype)
    if tokenizer:
        beside(path, "tokenizer.bin", tokenizer, tokenizer.c_file())


def write_checkpoint(model, path, dtype, tokenizer, facts):
    """A checkpoint to train on from, or to sample: --init_from=PATH of train.py."""
    if os.path.exists(path):
        raise UserError(f"{path} exists, and would be lost: name another file")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    value = {"model": model.state_dict(), "model_args": model.args.to_dict()}
    if tokenizer:
        value["tokenizer_hash"] = tokenizer.hash
        beside(path, "tokenizer.model", tokenizer, tokenizer.proto)
    save_file(path, value)


def write_safetensors(model, path, dtype, tokenizer, facts):
    huggingface.write_file(model, path, dtype)
    if tokenizer:
        beside(path, "tokenizer.model", tokenizer, tokenizer.proto)


class Format(NamedTuple):
    """A format to write: what a file of it ends in, its number formats, and what it is for."""

    ending: str
    dtypes: tuple
    write: Callable  # of model, path, dtype, tokenizer, facts
    purpose: str


FORMATS = {
    "bin": Format(".bin", (*modelbin.DTYPES,), write_bin, "model.bin, for ./run"),
    "hf": Format("", (*huggingface.DTYPES,), huggingface.write_folder, "a folder for transformers"),
    "gguf": Format(".gguf", (*gguffile.DTYPES,), gguffile.write_gguf, "for llama.cpp and Ollama"),
    "safetensors": Format(
        ".safetensors",
        (*huggingface.DTYPES,),
        write_safetensors,
        "one file with a checkpoint's names",
    ),
    "checkpoint": Format(".pt", ("fp32",), write_checkpoint, "to train on from, or to sample"),
}


def format_of(path):
    """The format that a path's ending stands for; bin where it has none of them."""
    return next((n for n, f in FORMATS.items() if f.ending and path.endswith(f.ending)), "bin")
