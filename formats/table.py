"""
Every format that a model can be read from (SOURCES) or written to (FORMATS).

To add a source, add a function to SOURCES, a line to SOURCE_HELP in export.py, and let recognize()
detect it. To add a format, add a row to FORMATS; its function must refuse what the format cannot
store before it writes anything.
"""

import contextlib
import glob
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

import torch

from configurator import UserError
from dataset import DataPaths
from formats import gguf, huggingface, modelbin, webpage
from formats.calibration import calibrate
from formats.huggingface import FastTokenizer
from formats.modelbin import export_model
from formats.tensors import PADDED, build_model, check_tensor_sizes, skeleton
from model import ModelArgs, Transformer
from system.files import atomic_write, check_not_pointer, read_json
from system.remote import fetch_model, reason
from text.orders import Order, is_to_order
from text.shards import read_sidecar
from tokenizer import Tokenizer, open_tokenizer
from training import torchfile
from training.checkpoint import BEST, LATEST, RUN_FILE, load_checkpoint, load_model, save_file
from training.runlog import RunLog

HUB = "hf:"  # prefix for models on the Hugging Face hub
MAX_MESSAGE = 1000  # characters of an error message, which may quote a file


class Source(NamedTuple):
    """The contents of a path. fits(tokenizer): whether the model was trained with it."""

    model: Transformer
    find_tokenizer: Callable  # returns its Tokenizer, or None
    facts: dict
    fits: Callable = lambda tokenizer: True


class Loaded(NamedTuple):
    """A model, its tokenizer if any, and facts about its training for the model card."""

    model: Transformer
    tokenizer: Tokenizer | FastTokenizer | None
    facts: dict


# ---- reading

# A function of SOURCES takes a path and returns a Source. It may raise any error; load() turns it
# into one sentence.


def tokenizer_in(*folders):
    """Return the Tokenizer of the first folder with a tokenizer.model, or None."""
    paths = (os.path.join(folder, "tokenizer.model") for folder in folders)
    return next((open_tokenizer(path) for path in paths if os.path.isfile(path)), None)


def folders_of(path):
    """Return the folder of a file, and of the target if the file is a symbolic link."""
    return os.path.dirname(path), os.path.dirname(os.path.realpath(path))


def from_checkpoint(path):
    checkpoint = load_checkpoint(path)
    model, trained_with = load_model(checkpoint, path), checkpoint.get("tokenizer_hash", "")
    return Source(
        model,
        lambda: tokenizer_in(*folders_of(path)),
        training_facts(checkpoint, os.path.dirname(path)),
        lambda tokenizer: trained_with in ("", tokenizer.hash),
    )


def training_facts(checkpoint, folder):
    """Return {name: value} about the training, from a checkpoint and the log beside it."""
    config, step = checkpoint.get("config", {}), checkpoint.get("iter_num")
    facts = {}
    if isinstance(step, int):
        facts["steps"] = f"{step:,}"
    if "n_sequences" in checkpoint and "max_seq_len" in config:
        facts["tokens seen"] = f"{checkpoint['n_sequences'] * config['max_seq_len']:,}"
    if "optimizer" in config:
        facts["optimizer"] = config["optimizer"]
    if "train_s" in checkpoint:
        facts["training"] = f"{checkpoint['train_s'] / 60:,.1f} minutes"
    log = RunLog(folder).read()
    if source := source_of(config):
        facts["trained on"] = source
    if log.start:
        facts["training text"] = f"{log.start.get('train_tokens', 0):,} tokens"
        facts["device"] = log.start.get("device_name")
    for line in log.evals:
        if line["step"] == step and line["val_loss"] is not None:
            facts["validation loss"] = f"{line['val_loss']:.4f} nats per token"
            if line.get("val_bpb"):
                facts["validation"] = f"{line['val_bpb']:.4f} bits per byte"
    return facts


def source_of(config):
    """Return the source of a run's shards, the last two parts of its path, or "" if unknown."""
    try:
        paths = DataPaths(*(config[name] for name in ("data_dir", "vocab_source", "vocab_size")))
        [source] = (read_sidecar(paths.shards) or {}).get("valid_source", [""])
    except (KeyError, ValueError, UserError):
        return ""
    return " ".join("/".join(source.replace("\\", "/").split("/")[-2:]).split())[:100]


def from_hf(path):
    if path.startswith(HUB):
        path = fetch_model(path.removeprefix(HUB))
    has_json = os.path.isfile(os.path.join(path, "tokenizer.json"))
    model = huggingface.read_folder(path)
    return Source(
        model, lambda: tokenizer_in(path) or (FastTokenizer(path) if has_json else None), {}
    )


def from_safetensors(path):
    return Source(huggingface.read_file(path), lambda: tokenizer_in(*folders_of(path)), {})


def from_bin(path):
    model, fingerprint = modelbin.read_bin(path), modelbin.read_fingerprint(path)

    def fits(tokenizer):
        return fingerprint in (0, tokenizer.fingerprint)

    return Source(model, lambda: tokenizer_in(*folders_of(path)), {}, fits)


def from_gguf(path):
    model, fields = gguf.read_gguf(path)

    def find_tokenizer():
        proto = gguf.tokenizer_of(fields, path)
        return proto and open_tokenizer(path, proto)

    return Source(model, find_tokenizer, {})


META_PARAMS = set(
    "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta "
    "use_scaled_rope max_seq_len max_batch_size".split()
)


def from_meta(folder):
    """
    Read a release by Meta: params.json; consolidated.00.pth and so on, each with a part of every
    matrix; and tokenizer.model, there or one folder up. The default of max_seq_len is 4096.
    """
    params = read_json(os.path.join(folder, "params.json"))
    for name in params:
        if name not in META_PARAMS or (name == "use_scaled_rope" and params[name]):
            raise UserError(f"cannot read {folder}: {name} = {params[name]} is not supported")
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "consolidated.*.pth")))
    if not paths:
        raise UserError(f"{folder} has no weights: expected consolidated.00.pth")
    parts = [torchfile.load(path, mmap=True, legacy=True) for path in paths]
    if not all(map(torchfile.is_state, parts)):
        raise UserError(f"cannot read {folder}: its files contain more than tensors")
    check_tensor_sizes([tensor.shape for part in parts for tensor in part.values()], paths)
    rows = {name: sum(len(part[f"{name}.weight"]) for part in parts) for name in WHOLE_ROWS}
    names = "dim n_layers n_heads n_kv_heads norm_eps rope_theta".split()
    args = ModelArgs(
        **{name: params[name] for name in names if params.get(name) is not None},
        vocab_size=rows["output"],
        hidden_dim=rows["layers.0.feed_forward.w1"],
        max_seq_len=params.get("max_seq_len", 4096),
        tie_embeddings=False,
    )
    shapes = {name: tensor.shape for name, tensor in skeleton(args).state_dict().items()}

    def whole(name):
        tensors = [part[name] for part in parts]
        if tensors[0].shape == shapes.get(name) or name not in shapes:  # the same in every file
            return tensors[0]
        by_columns = tensors[0].shape[0] == shapes[name][0]
        return torch.cat(tensors, dim=1 if by_columns else 0)

    tensors = {name: whole(name) for name in parts[0] if not name.endswith("rope.freqs")}
    source = {name: (tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    model = build_model(args, source, folder, str, in_halves=False)
    folder = folder.rstrip("/\\")
    return Source(model, lambda: tokenizer_in(folder, os.path.dirname(folder)), {})


WHOLE_ROWS = ("output", "layers.0.feed_forward.w1")  # matrices split by rows across the files

SOURCES = {
    "checkpoint": from_checkpoint,
    "hf": from_hf,
    "meta": from_meta,
    "bin": from_bin,
    "gguf": from_gguf,
    "safetensors": from_safetensors,
}


def recognize(path):
    """Return the key of SOURCES for the content of a path, or for hf:user/name; None: unknown."""
    if path.startswith(HUB) or os.path.isfile(os.path.join(path, "config.json")):
        return "hf"
    if os.path.isdir(path):
        return "meta" if os.path.isfile(os.path.join(path, "params.json")) else "checkpoint"
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        start = f.read(4)
    if start in (b"PK\3\4", b"GGUF"):
        return "gguf" if start == b"GGUF" else "checkpoint"
    if os.path.splitext(path)[1] == ".html":
        return "html" if webpage.is_page(path) else None
    endings = {".safetensors": "safetensors", ".bin": "bin"}
    return endings.get(os.path.splitext(path)[1])


def model_in(path):
    """
    Return the model file in a run's folder: best.pt, else ckpt.pt, else model.bin. Return any other
    path unchanged. Raises UserError for a folder without a model.
    """
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, RUN_FILE)):
        return path
    files = [os.path.join(path, name) for name in (BEST, LATEST, "model.bin")]
    if not any(map(os.path.exists, files)) and recognize(path) == "checkpoint":
        raise UserError(f"{path} contains no model: expected best.pt, ckpt.pt or model.bin")
    return next(filter(os.path.exists, files), path)


def load(path, kind=None, tokenizer=""):
    """
    Return the Loaded of a path in any of SOURCES, or of hf:user/name. tokenizer: the path of a
    tokenizer model to use instead of the one beside the model, or "none". Raises UserError, also
    for weights that are not finite.
    """
    try:
        for file in [path] if os.path.isfile(path) else glob.glob(f"{glob.escape(path)}/*"):
            if os.path.isfile(file):
                check_not_pointer(file)
        kind = kind or recognize(path) or "checkpoint"
        model, find_tokenizer, facts, fits = SOURCES[kind](path)
        if not all(p.isfinite().all() for p in model.parameters()):
            hint = "use an earlier checkpoint" if kind == "checkpoint" else "the file is damaged"
            raise UserError(f"{path} has weights that are not finite: {hint}")
        if tokenizer:
            its_tokenizer = None if tokenizer == "none" else open_tokenizer(tokenizer)
        else:
            its_tokenizer = find_tokenizer()
        if its_tokenizer and not fits(its_tokenizer):
            raise UserError(
                f"{path} was trained with a tokenizer other than {its_tokenizer.model_path}: pass "
                f"the right one with --tokenizer=PATH"
            )
        if its_tokenizer:
            model = trimmed(model, its_tokenizer, kind)
            model.args.bos_id = its_tokenizer.bos_id
        return Loaded(model, its_tokenizer, facts)
    except UserError as e:
        message = str(e)
    except Exception as e:  # a damaged file can cause any error
        message = f"cannot read {path}: {reason(e)}"
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    raise UserError(message)


def trimmed(model, tokenizer, kind):
    """
    Return a Transformer without the rows of its embedding and head that come after the last piece
    of its tokenizer. They are padding, or tokens added later; they are never encoded and must not
    be sampled. Raises UserError if the tokenizer belongs to another model.
    """
    n, n_pieces = model.args.vocab_size, tokenizer.vocab_size
    if n_pieces == n:
        return model
    is_padded = n_pieces < n and kind != "checkpoint"
    if isinstance(tokenizer, Tokenizer):  # a Hugging Face tokenizer may have gaps
        is_padded = is_padded and n - n_pieces <= n / 8
    if not is_padded:
        raise UserError(
            f"{tokenizer.model_path} has {n_pieces} pieces, but the model's vocabulary has "
            f"{n}: pass the tokenizer it was trained with (--tokenizer=PATH)"
        )
    print(f"note: {n - n_pieces} of {n} tokens have no piece in the tokenizer and are left out")
    short = Transformer(replace(model.args, vocab_size=n_pieces, vocab_multiple=1))
    state = model.state_dict().items()
    short.load_state_dict({k: t[:n_pieces] if k.startswith(PADDED) else t for k, t in state})
    return short


def load_for_sampling(path, start, tokenizer="", order=None):
    """
    Return (Loaded, ids of the prompt `start` after an order); the other arguments are those of
    load(). Raises UserError without a tokenizer, and as encode_prompt() does.
    """
    loaded = load(path, tokenizer=tokenizer)
    if loaded.tokenizer is None:
        raise UserError(f"no tokenizer.model found for {path}: pass --tokenizer=PATH")
    return loaded, encode_prompt(loaded, path, start, order)


def encode_prompt(loaded, path, start, order=None):
    """
    Return the ids of a prompt for the model of `path`, after an Order or None, see is_to_order().
    Raises UserError if there are none, if they do not fit the context, or if the model was trained
    without orders.
    """
    if order and not loaded.model.args.orders:
        raise UserError(
            f"{path} was trained without orders: train with shards of pretokenize --orders"
        )
    is_ordered = is_to_order(order, start, loaded.model.args.orders)
    text = (order or Order()).prompt(start) if is_ordered else start
    prompt = loaded.tokenizer.encode(text.encode(errors="surrogateescape"))
    if not prompt:
        raise UserError(f"the tokenizer of {path} has no BOS token: pass a prompt with --start")
    context = loaded.model.args.max_seq_len
    if len(prompt) > context:
        raise UserError(
            f"the {'order and the prompt have' if order else 'prompt has'} {len(prompt)} tokens, "
            f"but the context of {path} is {context}: shorten the {'order' if order else 'prompt'}"
        )
    return prompt


# ---- writing


@contextlib.contextmanager
def with_tokenizer(path, name, tokenizer):
    """
    Around a block that writes a model to `path`: write its tokenizer as `name` in the same folder,
    unless it exists. Raises UserError before the block if `path` is not a file, or if the existing
    file has another tokenizer.
    """
    if os.path.basename(path) in ("", name) or os.path.isdir(path):
        raise UserError(f"cannot write {path!r}: it is a folder or the tokenizer; choose a file")
    file = os.path.join(os.path.dirname(path), name)
    if tokenizer and os.path.exists(file):
        with open(file, "rb") as f:
            if f.read() not in (tokenizer.c_file(), tokenizer.proto):
                raise UserError(
                    f"{file} already exists and is another tokenizer; choose another folder for "
                    f"{os.path.basename(path)}"
                )
    yield
    if tokenizer and not os.path.exists(file):
        with atomic_write(file) as f:
            f.write(tokenizer.proto if name.endswith(".model") else tokenizer.c_file())
        print(f"wrote {file}")


def write_bin(model, path, dtype, tokenizer, facts, version=None):
    with with_tokenizer(path, "tokenizer.bin", tokenizer):
        fingerprint = tokenizer.fingerprint if tokenizer else 0
        rounded = calibrate(model, tokenizer, facts.get("calibrate", "")) if dtype == "int4" else {}
        export_model(model, path, version, dtype, fingerprint, rounded)


def write_checkpoint(model, path, dtype, tokenizer, facts):
    """Write a checkpoint, for sampling or for train.py's --init_from=PATH."""
    if os.path.exists(path):
        raise UserError(f"{path} already exists and would be overwritten; choose another file")
    value = {"model": model.state_dict(), "model_args": model.args.to_dict()}
    value["tokenizer_hash"] = tokenizer.hash if tokenizer else ""
    with with_tokenizer(path, "tokenizer.model", tokenizer):
        try:
            save_file(path, value)
        except UserError as e:
            raise UserError(f"cannot write {path}: {e}") from None


def write_safetensors(model, path, dtype, tokenizer, facts):
    with with_tokenizer(path, "tokenizer.model", tokenizer):
        huggingface.write_file(model, path, dtype)


class Format(NamedTuple):
    """A format to write."""

    ending: str  # of its files
    dtypes: Collection
    write: Callable  # takes model, path, dtype, tokenizer, facts
    purpose: str


TORCH_DTYPES = huggingface.TORCH_DTYPES
FORMATS = {
    "bin": Format(".bin", modelbin.DTYPES, write_bin, "model.bin, for ./run"),
    "hf": Format("", TORCH_DTYPES, huggingface.write_folder, "a folder for transformers"),
    "gguf": Format(".gguf", gguf.GGUF_DTYPES, gguf.write_gguf, "for llama.cpp and Ollama"),
    "safetensors": Format(
        ".safetensors", TORCH_DTYPES, write_safetensors, "one file with our tensor names"
    ),
    "checkpoint": Format(".pt", ("fp32",), write_checkpoint, "to sample or train further"),
    "html": Format(".html", webpage.DTYPES, webpage.write_page, "a page that tells stories"),
}


def format_of(path):
    """Return the format of a path's ending; bin for any other ending."""
    return next((n for n, f in FORMATS.items() if f.ending and path.endswith(f.ending)), "bin")
