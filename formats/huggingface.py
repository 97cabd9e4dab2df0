"""
Read and write Hugging Face folders: config.json, model.safetensors, tokenizer files and a model
card. pytorch_model.bin can be read.

Plain Llama is written as LlamaForCausalLM, Llama with a window in every layer as
MistralForCausalLM, and `--arch=portable` as Qwen3ForCausalLM, all of which transformers loads
without extra code. Other models are written as ModdedLlamaForCausalLM together with the file
modeling_modded_llama.py, and need trust_remote_code=True.

To add an option, add its field to EXTRAS and its tensor to NAMES in tensors.py, and use both in
modeling_modded_llama.py. To add an activation, implement it there. To read another architecture of
transformers, add its row to DEFAULTS.
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
    build_model,
    check_dtype_range,
    check_tensor_sizes,
    expect,
    expect_neutral,
    exported,
    hf_name,
    misfit,
    window_settings,
    windows,
)
from formats.webpage import page_of
from model import ModelArgs
from system.fields import each, is_bool, is_count, is_text, list_of, optional
from system.files import atomic_write, flush_files, flush_folder, read_json, remove, replace
from system.remote import need, reason
from training import torchfile

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SHARD = "5GB"
MODELING = "modeling_modded_llama.py"
MARK = "A small language model, exported by modded-llama2.c."  # in every model card we write
PAGE = "story.html"

# Fields of ModelArgs and of config.json
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
# Fields that only ModdedLlamaConfig has, under our names; it stores windows as layer_windows
EXTRAS = (
    "qk_norm norm_gains activation logit_softcap embedding_norm residual_scalars value_embeddings "
    "bigram_rows smear embedding_conv key_conv"
).split()

# Classes of transformers; a model is written as the first that can store it
TRAINED_ON = "orders", "separate_documents"  # what Hugging Face's fields do not say
PLAIN = {*FIELDS, "rope_theta", *TRAINED_ON}
WINDOWS = {*PLAIN, "sliding_window"}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", Target(PLAIN)),
    "mistral": ("MistralForCausalLM", Target(WINDOWS, required=["sliding_window"])),
    "qwen3": ("Qwen3ForCausalLM", Target({*WINDOWS, "qk_norm"}, required=["qk_norm"])),
    "modded_llama": ("ModdedLlamaForCausalLM", Target({*WINDOWS, *EXTRAS})),
}
# Defaults of fields that a config.json may leave out, by model_type; None: see args_of()
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
# Checks of the fields of a config.json that ModelArgs does not check, and what they expect
CHECKS = {
    "head_dim": (optional(is_count), "a whole number"),
    "max_window_layers": (optional(is_count), "a whole number"),
    "sliding_window": (optional(is_count), "a whole number"),
    "use_sliding_window": (optional(is_bool), "true or false"),
    "layer_types": (optional(list_of(is_text)), "a list of strings"),
    "layer_windows": (optional(list_of(is_count)), "a list of whole numbers"),
}
# The same for the ids that start and end texts, in config.json and generation_config.json
STOPS = {
    "bos_token_id": (optional(is_count), "a token id"),
    "eos_token_id": (
        lambda value: optional(is_count)(value) or list_of(is_count)(value),
        "token ids",
    ),
}
# Fields of a config.json that ModelArgs lacks, with the values (besides null) that change nothing
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
    """Raise UserError with the field's name unless parsed JSON passes `checks`."""
    for name, (check, expected) in checks.items():
        value = config.get(name)
        expect(check(value), path, name, value, expected)


def config_of(args, dtype, special_ids):
    """Return config.json as a dict, for the first architecture that can store ModelArgs."""
    kind = next(k for k, (_, target) in ARCHITECTURES.items() if not misfit(args, target))
    sizes = windows(args)
    config = {
        "architectures": [ARCHITECTURES[kind][0]],
        "model_type": kind,
        **{theirs: getattr(args, ours) for ours, theirs in FIELDS.items()},
        "head_dim": args.head_dim,
        "rope_theta": args.rope_theta,  # for older transformers
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
    return config | {name: True for name in TRAINED_ON if getattr(args, name)}


def args_of(config, path):
    """
    Return the ModelArgs of a config.json of a Llama, Mistral or Qwen3, or one of ours. Raises
    UserError with the field's name for anything that our model cannot compute.
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
            key == "rope_theta" or item is None or item in NEUTRAL_ROPE.get(key, ())
            for key, item in value.items()
            if not (item == "linear" and value.get("factor") == 1)
        )
        expect(is_plain, path, name, value, "rotary angles without scaling")
        rope |= value
    for name in FIELDS.values():
        expect(name in config, path, name, "missing", "a number")
    values = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
    values["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
    values["qk_norm"] = kind == "qwen3"
    values |= {name: config.get(name) is True for name in TRAINED_ON}
    if kind == "modded_llama":
        values |= {name: config[name] for name in EXTRAS if name in config}
    args = ModelArgs(**values)  # checks n_layers before windows_of() makes a list that long
    args = dataclasses.replace(args, **window_settings(windows_of(config, kind, path)))
    size = config["head_dim"] or args.head_dim
    expected = f"hidden_size / num_attention_heads, {args.head_dim}"
    expect(size == args.head_dim, path, "head_dim", size, expected)
    return args


def layer_types(sizes):
    """Return transformers' layer type for the window of each layer."""
    return ["sliding_attention" if size else "full_attention" for size in sizes]


def windows_of(config, kind, path):
    """Return the window of each layer in a config.json; 0 means all positions."""
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
    is_valid = len(sizes) in (0, n) and len(set(sizes) - {0}) < 2
    expect(is_valid, path, "windows", sizes, f"{n} sizes, all equal or 0")
    if (kinds := config.get("layer_types")) is not None:
        expected = layer_types(sizes or [0] * n)
        expect(kinds == expected, path, "layer_types", kinds, expected)
    return sizes


# ---- reading a folder


def weight_files(folder):
    """
    Return the paths of a folder's weights, one file or all files in its index: safetensors, or the
    pytorch_model.bin of older programs.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        single = os.path.join(folder, name)
        index, paths = f"{single}.index.json", [single]
        if os.path.isfile(index) and not os.path.isfile(single):
            names = read_json(index).get("weight_map")
            if not names or not each(is_text)(names):
                raise UserError(f"cannot read {index}: it has no weight_map of files")
            files = sorted({*names.values()})
            if outside := [name for name in files if os.path.basename(name) != name]:
                raise UserError(f"cannot read {index}: {outside[0]} is outside its folder")
            paths = [os.path.join(folder, name) for name in files]
            for path in paths:
                if not os.path.isfile(path):
                    raise UserError(f"{path} does not exist, but {index} lists it")
        if os.path.isfile(paths[0]):
            return paths
    raise UserError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin")


def open_tensors(paths):
    """Return {name: (shape, function that reads it)} of the tensors in files of weights."""
    safetensors = need("safetensors")
    tensors = {}
    for path in paths:
        if os.path.basename(path).startswith("pytorch_model"):
            try:
                state = torchfile.load(path, mmap=True, legacy=True)
            except pickle.UnpicklingError:
                raise UserError(f"{path} is damaged or contains more than tensors") from None
            if not torchfile.is_state(state):
                raise UserError(f"{path} is damaged or contains more than tensors")
            part = {name: (tuple(tensor.shape), tensor.clone) for name, tensor in state.items()}
        else:
            try:
                f = safetensors.safe_open(path, "pt")
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f"{path} is damaged or not a safetensors file: {e}") from None
            shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
            part = {name: (shape, partial(f.get_tensor, name)) for name, shape in shapes.items()}
        if duplicates := tensors.keys() & part.keys():
            raise UserError(f"cannot read {path}: {min(duplicates)} is also in another file")
        tensors |= part
    check_tensor_sizes([shape for shape, _ in tensors.values()], paths)
    return tensors


def read_folder(folder):
    """Return the Transformer of a Hugging Face folder, float32, on the CPU. Raises UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: expected one with config.json")
    args = args_of(read_json(os.path.join(folder, "config.json")), folder)
    source = open_tensors(weight_files(folder))
    return build_model(args, source, folder, hf_name, in_halves=True)


# ---- tokenizer


class FastTokenizer:
    """A tokenizer.json run by Hugging Face's tokenizers, with the methods that sample.py needs."""

    def __init__(self, folder):
        self.model_path = os.path.join(folder, "tokenizer.json")
        with self.errors_in_one_sentence():
            self.backend = need("tokenizers").Tokenizer.from_file(self.model_path)
            self.backend.no_padding()  # transformers ignores both settings in this file too
            self.backend.no_truncation()
            self.vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        if not self.vocab_size:
            raise UserError(f"cannot read {self.model_path}: it has no tokens")
        config, stop = {}, []
        for path in (os.path.join(folder, n) for n in ("config.json", "generation_config.json")):
            config |= read_json(path) if os.path.isfile(path) else {}
            check_fields(config, STOPS, path)
        bos = config.get("bos_token_id")
        self.bos_id = bos if isinstance(bos, int) else -1
        for ids in (bos, config.get("eos_token_id")):
            stop += ids if isinstance(ids, list) else [ids]
        self.stop = tuple(i for i in stop if i is not None and i < self.vocab_size)

    @contextlib.contextmanager
    def errors_in_one_sentence(self):
        """Turn any error of the library into a UserError."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as e:  # a panic of Rust is not an Exception
            raise UserError(f"cannot read {self.model_path}: {reason(e)}") from None

    def encode(self, text, bos=True):
        """Encode a str or bytes; with `bos`, an empty text becomes BOS or EOS, if there is one."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        with self.errors_in_one_sentence():
            ids = self.backend.encode(text, add_special_tokens=bos).ids
            ids = ids or list(self.stop[: int(bos)])
        if max(ids, default=0) >= self.vocab_size:  # added by the post_processor
            raise UserError(f"cannot read {self.model_path}: it has no token {max(ids)}")
        return ids

    def decode(self, ids):
        with self.errors_in_one_sentence():
            return self.backend.decode(list(ids))


# ---- writing a folder


def card(model, facts):
    """Return the model card, README.md; for `facts` see training_facts() in table.py."""
    args, kind = model.args, config_of(model.args, "fp32", {})["model_type"]
    trust = ", trust_remote_code=True" if kind == "modded_llama" else ""
    options = {k: v for k, v in args.to_dict().items() if v != getattr(ModelArgs(), k)}
    rows = {**facts, "parameters": f"{model.n_params():,}", "max_seq_len": args.max_seq_len}
    rows |= options
    title, path = rows.pop("title", "Storyteller"), rows.pop("repository", ".")
    language, licence = rows.pop("language", "en"), rows.pop("license", "unknown")
    page = ""
    if rows.pop("page", False):
        page = f"[{PAGE}]({PAGE}) is the model in one web page, which tells stories without a "
        page += "server: download it and open it.\n\n"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    code = f"the file {MODELING} in this folder" if trust else "its own code"
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

{page}A text ends at EOS or at BOS, which starts the next text;
generation_config.json stops at both.

| | |
|---|---|
{table}
"""


def write_folder(model, folder, dtype, tokenizer, facts):
    """
    Write a Transformer as a Hugging Face folder; an error leaves no partial folder. Only a folder
    from an earlier export is replaced. tokenizer: a Tokenizer, or None for the weights alone.
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
        for path in paths:  # safetensors makes its files readable only by their owner
            os.chmod(path, os.stat(os.path.join(part, "config.json")).st_mode)
        flush_files(paths)
        replace(part, target)
        flush_folder(os.path.dirname(target))
    except (OSError, need("safetensors").SafetensorError) as e:
        raise UserError(f"cannot write {folder}: {reason(e)}") from None
    finally:
        remove(part)


def folder_files(model, dtype, tokenizer, facts):
    """Return {name: dict for JSON, text or bytes} for all files of a folder except the weights."""
    special_ids, stop, files = {}, {}, {}
    if tokenizer:
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        special_ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
        ends = [eos, bos] if eos != bos else eos  # BOS starts the next text
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
    if facts.get("page"):
        files[PAGE] = page_of(model, "int8", tokenizer, facts)
    return {**files, "config.json": config, "README.md": card(model, facts)}


def converted(name, tensor, dtype):
    """Convert a tensor to a dtype of TORCH_DTYPES; raise UserError if a value would be infinite."""
    torch_dtype = TORCH_DTYPES[dtype]
    check_dtype_range(name, tensor, torch.finfo(torch_dtype).max, dtype)
    return tensor.to(torch_dtype).contiguous()


# The files that write_folder() makes
OURS = re.compile(
    r"config.json|generation_config.json|README.md|tokenizer(_config)?.json|tokenizer.model|"
    r"model.safetensors(.index.json)?|model-\d{5}-of-\d{5}.safetensors|" + PAGE + "|" + MODELING
)


def check_replaceable(folder):
    """Raise UserError unless a folder is missing, empty, or one that write_folder() made."""
    if not os.path.lexists(folder):
        return
    if not os.path.isdir(folder):
        raise UserError(f"cannot write {folder}: it is a file; choose a folder")
    paths = {name: os.path.join(folder, name) for name in os.listdir(folder)}
    others = [n for n, path in paths.items() if not (OURS.fullmatch(n) and os.path.isfile(path))]
    if others:
        raise UserError(
            f"{folder} already exists and contains {others[0]}, which no export writes; choose "
            f"another folder"
        )
    card_path = Path(folder, "README.md")
    if paths and not (card_path.is_file() and MARK in card_path.read_text("utf-8", "replace")):
        raise UserError(
            f"{folder} already exists and its README.md was not written by export.py; choose "
            f"another folder"
        )


# ---- a single safetensors file, with our names


def is_safetensors(path):
    """Whether a file starts like a safetensors file: the length of its JSON, then the JSON."""
    with open(path, "rb") as f:
        start = f.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path)


def write_file(model, path, dtype):
    """Write a Transformer as a safetensors file with its ModelArgs as JSON in the metadata."""
    save = need("safetensors.torch").save
    tensors = {n: converted(n, t, dtype) for n, t in exported(model, in_halves=False)}
    args = {**model.args.to_dict(), "vocab_multiple": 1}
    metadata = {"format": "pt", "model_args": json.dumps(args)}
    with atomic_write(path) as f:
        f.write(save(tensors, metadata))


def read_file(path):
    """Return the Transformer of a file of write_file(), float32, on the CPU. Raises UserError."""
    source = open_tensors([path])
    metadata = need("safetensors").safe_open(path, "pt").metadata() or {}
    if "model_args" not in metadata:
        raise UserError(
            f"cannot read {path}: its metadata has no model_args; for a Hugging Face model, use "
            f"--from-hf=FOLDER"
        )
    args = ModelArgs.from_dict(dict(json.loads(metadata["model_args"])))
    return build_model(args, source, path, str, in_halves=False)
