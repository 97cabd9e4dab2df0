"""
Hugging Face folders: config.json, model.safetensors, tokenizer files and a model card, written and
read; and pytorch_model.bin, read.

Plain Llama is written as LlamaForCausalLM, with a window in every layer as MistralForCausalLM, and
with the options of `portable` as Qwen3ForCausalLM: transformers loads these without further code.
Other models are written as ModdedLlamaForCausalLM together with the file modeling_modded_llama.py,
for trust_remote_code=True.

To add an option: its field in EXTRAS and its tensor in NAMES of tensors.py, both used in
modeling_modded_llama.py. To add an activation: its use there. To read another architecture of
transformers: its row in DEFAULTS.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import re
from functools import partial
from pathlib import Path

import torch

from configurator import UserError
from formats.hftokenizer import tokenizer_config, tokenizer_json
from formats.tensors import (
    Target,
    check_numbers,
    check_range,
    expect,
    expect_neutral,
    exported,
    filled,
    hf_name,
    misfit,
    window_settings,
    windows,
)
from model import ModelArgs
from system.fields import each, is_bool, is_count, is_text, list_of, optional
from system.files import atomic_write, flush_files, flush_folder, read_json, remove, replace
from system.remote import need, reason
from training import torchfile

# Number formats of the tensors, by --dtype
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SHARD = "5GB"
MODELING = "modeling_modded_llama.py"
MARK = "A small language model, exported by modded-llama2.c."  # of the model cards written here

# Fields of ModelArgs and theirs
FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# Fields that only ModdedLlamaConfig has, under our names; windows are those of the layers
EXTRAS = (
    "qk_norm norm_gains activation logit_softcap embedding_norm residual_scalars value_embeddings "
    "bigram_rows smear"
).split()

# Classes of transformers; the first that fits a model is taken
PLAIN = {*FIELDS, "rope_theta"}
WINDOWS = {*PLAIN, "sliding_window"}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", Target(PLAIN)),
    "mistral": ("MistralForCausalLM", Target(WINDOWS, must=["sliding_window"])),
    "qwen3": ("Qwen3ForCausalLM", Target({*WINDOWS, "qk_norm"}, must=["qk_norm"])),
    "modded_llama": ("ModdedLlamaForCausalLM", Target({*WINDOWS, *EXTRAS})),
}
# What a config.json leaves out, by model_type; None: see args_of()
COMMON = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "rope_theta": 10000.0,
}
DEFAULTS = {
    "llama": COMMON,
    "mistral": {**COMMON, "num_key_value_heads": 8, "max_position_embeddings": 1 << 17},
    "qwen3": {**COMMON, "max_position_embeddings": 1 << 15, "head_dim": 128},
    "modded_llama": COMMON,
}
# What the fields of a config.json that ModelArgs does not check may be, and the same in words
CHECKS = {
    "head_dim": (optional(is_count), "a whole number"),
    "max_window_layers": (optional(is_count), "a whole number"),
    "sliding_window": (optional(is_count), "a whole number"),
    "use_sliding_window": (optional(is_bool), "true or false"),
    "layer_types": (optional(list_of(is_text)), "a list of words"),
    "layer_windows": (optional(list_of(is_count)), "a list of whole numbers"),
}
# The same for the ids that begin and end texts, in config.json and generation_config.json
STOPS = {
    "bos_token_id": (optional(is_count), "the id of a token"),
    "eos_token_id": (
        lambda value: optional(is_count)(value) or list_of(is_count)(value),
        "ids of tokens",
    ),
}
# Fields of a config.json that ModelArgs lacks, with the values that change nothing, besides null
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}
# The same for rope_parameters, or rope_scaling
NEUTRAL_ROPE = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1.0,),
    "factor": (1.0,),
}


# ---- config.json


def check_fields(config, checks, path):
    """Raise UserError, which names the field, unless parsed JSON is as `checks` describes it."""
    for name, (check, expected) in checks.items():
        value = config.get(name)
        expect(check(value), path, name, value, expected)


def config_of(args, dtype, special_ids):
    """config.json of ModelArgs, as a dict, for the first architecture that carries them."""
    kind = next(k for k, (_, target) in ARCHITECTURES.items() if not misfit(args, target))
    sizes = windows(args)
    config = {
        "architectures": [ARCHITECTURES[kind][0]],
        "model_type": kind,
        **{theirs: getattr(args, ours) for ours, theirs in FIELDS.items()},
        "head_dim": args.head_dim,
        "rope_theta": args.rope_theta,  # of older transformers
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        **special_ids,
        "dtype": str(TORCH_DTYPES[dtype]).removeprefix("torch."),
    }
    if kind == "qwen3":
        config |= {"use_sliding_window": any(sizes), "sliding_window": max(sizes) or None}
        config |= {"max_window_layers": 0, "layer_types": layer_types(sizes)}
    if kind == "mistral":
        config["sliding_window"] = max(sizes)
    if kind == "modded_llama":
        config |= {name: getattr(args, name) for name in EXTRAS} | {"layer_windows": sizes}
        module = MODELING.removesuffix(".py")
        classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
        config["auto_map"] = {k: f"{module}.ModdedLlama{v}" for k, v in classes.items()}
    return config


def args_of(config, path):
    """
    ModelArgs of a config.json of a Llama, Mistral or Qwen3, or of ours. Raises UserError, which
    names the field, for anything that this model does not compute.
    """
    kind = config.get("model_type")
    expect(kind in DEFAULTS, path, "model_type", kind, " or ".join(DEFAULTS))
    config |= {k: value for k, value in DEFAULTS[kind].items() if config.get(k) is None}
    check_fields(config, CHECKS, path)
    for name, values in NEUTRAL.items():
        expect_neutral(path, name, config.get(name), values)
    rope = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name) or {}
        is_plain = isinstance(value, dict) and all(
            key == "rope_theta" or one is None or one in NEUTRAL_ROPE.get(key, ())
            for key, one in value.items()
            if not (one == "linear" and value.get("factor") == 1)
        )
        expect(is_plain, path, name, value, "rotary angles without scaling")
        rope |= value
    for name in FIELDS.values():
        expect(name in config, path, name, "missing", "a number")
    values = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
    values["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
    values["qk_norm"] = kind == "qwen3"
    if kind == "modded_llama":
        values |= {name: config[name] for name in EXTRAS if name in config}
    args = ModelArgs(**values)  # checks the number of layers before windows of each are made
    args = dataclasses.replace(args, **window_settings(windows_of(config, kind, path)))
    size = config["head_dim"] or args.head_dim
    expected = f"hidden_size / num_attention_heads, {args.head_dim}"
    expect(size == args.head_dim, path, "head_dim", size, expected)
    return args


def layer_types(sizes):
    """transformers' words for the window of each layer."""
    return ["sliding_attention" if size else "full_attention" for size in sizes]


def windows_of(config, kind, path):
    """The window of each layer, 0 where it sees everything, of a config.json."""
    n = config["num_hidden_layers"]
    if kind == "modded_llama":
        sizes = config.get("layer_windows") or []
    elif kind == "mistral":
        sizes = [config.get("sliding_window", 4096) or 0] * n
    elif kind == "qwen3" and config.get("use_sliding_window"):
        first = config.get("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(n)]
        kinds = config.get("layer_types") or kinds
        size = config.get("sliding_window", 4096)
        sizes = [size if k == "sliding_attention" else 0 for k in kinds]
    else:
        sizes = []
    is_right = len(sizes) in (0, n) and len(set(sizes) - {0}) < 2
    expect(is_right, path, "windows", sizes, f"those of {n} layers, all of one size or 0")
    if (words := config.get("layer_types")) is not None:
        expected = layer_types(sizes or [0] * n)
        expect(words == expected, path, "layer_types", words, expected)
    return sizes


# ---- reading a folder


def weight_files(folder):
    """
    Paths of the weights of a folder, one file or those that an index names: safetensors, or the
    pytorch_model.bin of older programs.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        single = os.path.join(folder, name)
        index, paths = f"{single}.index.json", [single]
        if os.path.isfile(index) and not os.path.isfile(single):
            names = read_json(index).get("weight_map")
            if not names or not each(is_text)(names):
                raise UserError(f"{index} cannot be read: it has no weight_map of files")
            files = sorted({*names.values()})
            if outside := [name for name in files if os.path.basename(name) != name]:
                raise UserError(f"{index} cannot be read: it names {outside[0]}, a file elsewhere")
            paths = [os.path.join(folder, name) for name in files]
            for path in paths:
                if not os.path.isfile(path):
                    raise UserError(f"{path} does not exist, but {index} names it")
        if os.path.isfile(paths[0]):
            return paths
    raise UserError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def open_tensors(paths):
    """{name: (shape, function that reads it)} of the tensors of weight_files()."""
    safetensors = need("safetensors")
    found = {}
    for path in paths:
        if os.path.basename(path).startswith("pytorch_model"):
            try:
                state = torchfile.load(path, mmap=True, legacy=True)
            except pickle.UnpicklingError:
                raise UserError(f"{path} is damaged, or holds more than tensors") from None
            if not torchfile.is_state(state):
                raise UserError(f"{path} is damaged, or holds more than tensors")
            part = {name: (tuple(tensor.shape), tensor.clone) for name, tensor in state.items()}
        else:
            try:
                f = safetensors.safe_open(path, "pt")
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f"{path} is damaged or no safetensors file: {e}") from None
            shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
            part = {name: (shape, partial(f.get_tensor, name)) for name, shape in shapes.items()}
        if both := found.keys() & part.keys():
            raise UserError(f"{path} cannot be read: {min(both)} is in another file as well")
        found |= part
    check_numbers([shape for shape, _ in found.values()], paths)
    return found


def read_folder(folder):
    """The Transformer of a Hugging Face folder, float32, on the CPU. Raises UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; expected one with config.json")
    args = args_of(read_json(os.path.join(folder, "config.json")), folder)
    source = open_tensors(weight_files(folder))
    return filled(args, source, folder, hf_name, in_halves=True)


# ---- tokenizer


class FastTokenizer:
    """A tokenizer.json, run by Hugging Face's tokenizers, with the methods that sample.py needs."""

    def __init__(self, folder):
        self.model_path = os.path.join(folder, "tokenizer.json")
        with self.calling():
            self.backend = need("tokenizers").Tokenizer.from_file(self.model_path)
            self.backend.no_padding()  # as transformers, which takes neither from this file
            self.backend.no_truncation()
            self.vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        if not self.vocab_size:
            raise UserError(f"{self.model_path} cannot be read: it has no tokens")
        config, stop = {}, []
        for path in (os.path.join(folder, n) for n in ("config.json", "generation_config.json")):
            config |= read_json(path) if os.path.isfile(path) else {}
            check_fields(config, STOPS, path)
        for ids in (config.get("bos_token_id"), config.get("eos_token_id")):
            stop += ids if isinstance(ids, list) else [ids]
        self.stop = tuple(i for i in stop if i is not None and i < self.vocab_size)

    @contextlib.contextmanager
    def calling(self):
        """Have what the library raises end in one sentence."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as e:  # a panic of Rust is not an Exception
            raise UserError(f"{self.model_path} cannot be read: {reason(e)}") from None

    def encode(self, text, bos=True):
        """Ids of a text, str or bytes; with `bos`, of an empty one BOS or EOS, if there is one."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        with self.calling():
            ids = self.backend.encode(text, add_special_tokens=bos).ids
            ids = ids or list(self.stop[: int(bos)])
        if max(ids, default=0) >= self.vocab_size:  # put there by the post_processor
            raise UserError(f"{self.model_path} cannot be read: it has no token {max(ids)}")
        return ids

    def decode(self, ids):
        with self.calling():
            return self.backend.decode(list(ids))


# ---- writing a folder


def card(model, facts):
    """The model card, README.md; facts: see training_facts() of table.py, and export.py."""
    args, kind = model.args, config_of(model.args, "fp32", {})["model_type"]
    trust = ", trust_remote_code=True" if kind == "modded_llama" else ""
    options = {k: v for k, v in args.to_dict().items() if v != getattr(ModelArgs(), k)}
    rows = {**facts, "parameters": f"{model.n_params():,}", "max_seq_len": args.max_seq_len}
    rows |= options
    title, path = rows.pop("title", "a story teller"), rows.pop("repository", ".")
    language, licence = rows.pop("language", "en"), rows.pop("license", "unknown")
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    code = f"the file {MODELING} beside it" if trust else "transformers' own code, nothing else"
    return f"""---
language: {language}
license: {licence}
library_name: transformers
pipeline_tag: text-generation
tags:
- modded-llama2.c
- {kind}
---

# {title}

{MARK} transformers runs it with {code}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{path}"
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = AutoModelForCausalLM.from_pretrained(path{trust})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids)[0], skip_special_tokens=True))
```

A text ends with the token before the next one, BOS, which generation_config.json stops at.

| | |
|---|---|
{table}
"""


def write_folder(model, folder, dtype, tokenizer, facts):
    """
    Write a Transformer as a Hugging Face folder, whole or not at all; it replaces one that was
    written before and nothing else. tokenizer: a Tokenizer, or None for the weights alone.
    """
    save = need("huggingface_hub").save_torch_state_dict
    files = folder_files(model, dtype, tokenizer, facts)
    tensors = {hf_name(n): converted(n, t, dtype) for n, t in exported(model, in_halves=True)}
    target = os.path.realpath(folder)
    check_replaceable(folder)
    part = f"{target}.{os.getpid()}.part"
    remove(part)
    try:
        os.makedirs(part)
        for name, value in files.items():
            if isinstance(value, dict):
                value = json.dumps(value, indent=1) + "\n"
            with open(os.path.join(part, name), "wb") as f:
                f.write(value.encode() if isinstance(value, str) else value)
        save(tensors, part, max_shard_size=MAX_SHARD, metadata={"format": "pt"})
        paths = [os.path.join(part, name) for name in os.listdir(part)]
        for path in paths:  # safetensors files are readable to their owner alone
            os.chmod(path, os.stat(os.path.join(part, "config.json")).st_mode)
        flush_files(paths)
        replace(part, target)
        flush_folder(os.path.dirname(target))
    except (OSError, need("safetensors").SafetensorError) as e:
        raise UserError(f"cannot write {folder}: {reason(e)}") from None
    finally:
        remove(part)


def folder_files(model, dtype, tokenizer, facts):
    """{name: dict for JSON, text or bytes} of all files of a folder but the weights."""
    special_ids, stop, files = {}, {}, {}
    if tokenizer:
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        special_ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
        ends = [eos, bos] if eos != bos else eos  # or where the next text begins
        stop = {**special_ids, "eos_token_id": ends}
        files["tokenizer.json"] = tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = tokenizer_config(tokenizer, model.args.max_seq_len)
        files["tokenizer.model"] = tokenizer.proto
    length = max(1, min(256, model.args.max_seq_len * 3 // 4))
    sampling = {"do_sample": True, "top_p": 0.9, "max_new_tokens": length}
    config = config_of(model.args, dtype, special_ids)
    if "auto_map" in config:
        with open(os.path.join(os.path.dirname(__file__), MODELING), "rb") as f:
            files[MODELING] = f.read()
    files["generation_config.json"] = {**stop, **sampling}
    return {**files, "config.json": config, "README.md": card(model, facts)}


def converted(name, tensor, dtype):
    """A tensor in a number format of TORCH_DTYPES; UserError where a number becomes infinite."""
    number_format = TORCH_DTYPES[dtype]
    check_range(name, tensor, torch.finfo(number_format).max, dtype)
    return tensor.to(number_format).contiguous()


# what write_folder() makes
OURS = re.compile(
    r"config.json|generation_config.json|README.md|tokenizer(_config)?.json|tokenizer.model|"
    r"model.safetensors(.index.json)?|model-\d{5}-of-\d{5}.safetensors|" + MODELING
)


def check_replaceable(folder):
    """Raise UserError unless a folder is absent, empty, or one that write_folder() made."""
    if not os.path.lexists(folder):
        return
    if not os.path.isdir(folder):
        raise UserError(f"cannot write {folder}: it is a file; name a folder")
    paths = {name: os.path.join(folder, name) for name in os.listdir(folder)}
    others = [n for n, path in paths.items() if not (OURS.fullmatch(n) and os.path.isfile(path))]
    if others:
        why = f"it holds {others[0]}, which does not belong to an export"
        raise UserError(f"cannot write {folder}: {why}; name another")
    card_path = Path(folder, "README.md")
    if paths and not (card_path.is_file() and MARK in card_path.read_text("utf-8", "replace")):
        raise UserError(f"cannot write {folder}: its README.md was not written by export.py")


# ---- one safetensors file, with our names


def write_file(model, path, dtype):
    """Write a Transformer as one safetensors file, its ModelArgs as JSON in the metadata."""
    save = need("safetensors.torch").save
    tensors = {n: converted(n, t, dtype) for n, t in exported(model, in_halves=False)}
    args = {**model.args.to_dict(), "vocab_multiple": 1}
    metadata = {"format": "pt", "model_args": json.dumps(args)}
    with atomic_write(path) as f:
        f.write(save(tensors, metadata))


def read_file(path):
    """The Transformer of such a file, float32, on the CPU. Raises UserError."""
    source = open_tensors([path])
    metadata = need("safetensors").safe_open(path, "pt").metadata() or {}
    if "model_args" not in metadata:
        raise UserError(
            f"{path} cannot be read: its metadata has no model_args; the folder of a Hugging Face "
            f"model is read with --from-hf=FOLDER"
        )
    args = ModelArgs.from_dict(dict(json.loads(metadata["model_args"])))
    return filled(args, source, path, str, in_halves=False)
