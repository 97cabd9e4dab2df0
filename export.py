"""
Convert a model to model.bin, a Hugging Face folder, GGUF, safetensors, a checkpoint or a web page.

    python export.py out/model.bin --dtype=int8                     # for ./run
    python export.py out/hf --format=hf --push-to-hub=user/name     # for transformers and the hub
    python export.py out/story.gguf --dtype=q8_0                    # for llama.cpp and Ollama
    python export.py imported/ckpt.pt --from-hf=PATH                # to sample or train further
    python export.py out/story.html --dtype=int4                    # a page that tells stories

If the format cannot store an option of the model, the error names the option and nothing is
written. See doc/formats.md.
"""

import argparse
import difflib
import os
import re
import sys
from functools import partial

from configurator import UserError, expand_home, one_sentence_errors, print_setting, printable
from system.tuning import tune_process

tune_process()

from formats import huggingface, modelbin
from formats.huggingface import FastTokenizer
from formats.modelbin import VERSIONS
from formats.table import FORMATS, SOURCES, format_of, load, model_in, recognize
from system.remote import check_push, push, reason

SOURCE_HEADING = "the model to read (one of these)"
SOURCE_HELP = {
    "hf": "Hugging Face folder, or hf:user/name for a model on the hub",
    "meta": "folder of a release by Meta",
    "bin": "model.bin, also llama2.c's",
    "gguf": "GGUF file with a llama or qwen3 model",
    "safetensors": "safetensors file written by export.py",
}
# heading: {name: (default, or a placeholder in capitals if there is none; comment)}
SETTINGS = {
    SOURCE_HEADING: {
        "checkpoint": (
            "out/ckpt.pt",
            "folder of a run (its best model), or a file of a format below",
        ),
        **{f"from-{name}": ("PATH", comment) for name, comment in SOURCE_HELP.items()},
    },
    "its tokenizer": {
        "tokenizer": ("PATH", "if it is not beside the model; none: export without a tokenizer"),
    },
    "the format to write": {
        "format": ("FORMAT", "one of those below; if not set: from PATH's extension, else bin"),
        "dtype": ("DTYPE", "dtype of the weights; if not set: the first one in the list below"),
        "calibrate": ("TEXT", "int4: text to calibrate on, or none; empty: stories by the model"),
        "version": ("auto", "of model.bin: 0 (plain Llama only) or 3; auto: 0 if possible"),
    },
    "the web page (html, or in a folder of hf)": {
        "page": (False, "hf: also write story.html, a page that tells stories"),
        "beside": ("PATH", "a second model, to tell the same story beside the first"),
    },
    "the model card (hf), metadata (gguf) and page (html)": {
        "title": ("TEXT", "name of the model; if not set: USER/NAME or PATH"),
        "language": ("en", "code of the language that the model writes"),
        "license": ("unknown", "license of the model, such as mit"),
    },
    "the Hugging Face hub": {
        "push-to-hub": ("USER/NAME", "upload the folder, with the token from HF_TOKEN or .env"),
        "private": (False, "make the repository private, if it is new"),
        "dry-run": (False, "print what would be uploaded, and upload nothing"),
    },
}


class Parser(argparse.ArgumentParser):
    """A parser whose help and errors look like those of the other scripts."""

    def print_help(self, file=None):
        print(__doc__.strip() + "\n")
        print("usage: python export.py PATH [--key=value ...]")
        print("PATH is the file or folder to write. Each setting shows its default, if it has one.")
        flags = {
            name: f"  --{name}={default}" if default else f"  --{name}"
            for group in SETTINGS.values()
            for name, (default, _) in group.items()
        }
        indent = max(map(len, flags.values())) + 2
        for heading, group in SETTINGS.items():
            print(f"\n{heading}:")
            for name, (_, comment) in group.items():
                print_setting(flags[name], comment, indent)
        print("\nformats (and their dtypes):")
        for name, row in FORMATS.items():
            print_setting(f"  {name}", f"{row.purpose} ({', '.join(row.dtypes)})", indent)

    def error(self, message):
        self.exit(2, f"error: {printable(message)}\n")


one_sentence_errors()
parser = Parser()
parser.add_argument("path", metavar="PATH")
source_flags = parser.add_mutually_exclusive_group()
for heading, group in SETTINGS.items():
    for name, (default, _) in group.items():
        spellings = sorted({f"--{name}", f"--{name.replace('-', '_')}"})
        if default is False:
            parser.add_argument(*spellings, action="store_true")
        else:
            target = source_flags if heading == SOURCE_HEADING else parser
            target.add_argument(*spellings, default=None if default.isupper() else default)
flags, unknown = parser.parse_known_args(list(map(expand_home, sys.argv[1:])))
if unknown:
    name = unknown[0].partition("=")[0]
    names = [f"--{name}" for group in SETTINGS.values() for name in group]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else "--help lists all settings"
    parser.error(f"unknown setting {name}: {hint}")

sources = {name: getattr(flags, f"from_{name}", None) for name in SOURCES}
kind = next((name for name, path in sources.items() if path is not None), None)
source = sources[kind] if kind else model_in(flags.checkpoint)
to = format_of(flags.path) if flags.format is None else flags.format
if to not in FORMATS:
    parser.error(f"format = {to}: expected one of {', '.join(FORMATS)}")
if flags.version == "2":
    parser.error("version = 2: llama2.c's int8 is read but not written; use --dtype=int8")
versions = ["auto", *map(str, VERSIONS)]
if flags.version not in versions:
    parser.error(f"version = {flags.version}: expected one of {', '.join(versions)}")
dtype = (flags.dtype or next(iter(FORMATS[to].dtypes))).lower()
if dtype not in FORMATS[to].dtypes:
    choices = ", ".join(FORMATS[to].dtypes)
    raise UserError(f"dtype = {flags.dtype}: expected one of {choices} for --format={to}")
if flags.calibrate and dtype != "int4":
    raise UserError(f"--calibrate cannot be used with --dtype={dtype}: use --dtype=int4")
if flags.version != "auto" and to != "bin":
    raise UserError(f"--version cannot be used with --format={to}: use --format=bin")
if flags.push_to_hub and to != "hf":
    raise UserError(f"--push-to-hub cannot be used with --format={to}: use --format=hf")
if flags.beside and to != "html":
    raise UserError(f"--beside cannot be used with --format={to}: use --format=html")
if flags.page and to != "hf":
    raise UserError(f"--page cannot be used with --format={to}: use --format=hf")
if (flags.dry_run or flags.private) and not flags.push_to_hub:
    raise UserError("--push-to-hub=USER/NAME is missing: --dry-run and --private need a repository")
about = {name: getattr(flags, name) for name in ("title", "language", "license")}
for name, value in about.items():
    carriers = ["hf", "gguf"] if name == "license" else ["hf", "gguf", "html"]
    if value != parser.get_default(name) and to not in carriers:
        raise UserError(f"{to} cannot store the {name}: use --format={' or '.join(carriers)}")
    if name != "title" and not re.fullmatch(r"[\w.+-]{2,40}", value):
        raise UserError(f"{name} = {value!r}: expected a short code, such as en or mit")
if flags.push_to_hub:
    check_push(flags.push_to_hub, flags.dry_run)
if not flags.path:
    raise UserError("PATH is empty: pass the file or folder to write")
is_tokenizer = re.fullmatch(r"(tokenizer|tok\d+|bpe\d+)\.bin", os.path.basename(flags.path))
is_model = {"bin": modelbin.is_model_bin, "safetensors": huggingface.is_safetensors}
if (
    os.path.isfile(flags.path)
    and to != "hf"
    and (
        is_tokenizer
        or recognize(flags.path) != to
        or not is_model.get(to, lambda path: True)(flags.path)
    )
):
    is_checkpoint = recognize(flags.path) == "checkpoint"
    content = "a checkpoint" if is_checkpoint else f"not a model of --format={to}"
    raise UserError(f"{flags.path} already exists and is {content}; choose another file")
target, origin = os.path.realpath(flags.path), os.path.realpath(source)
if os.path.exists(target) and (
    target == origin
    or (os.path.isdir(origin) and target.startswith(origin + os.sep))
    or (os.path.isdir(target) and origin.startswith(target + os.sep))
):
    raise UserError(
        f"{flags.path} already exists and is part of the model to read; choose another path"
    )

model, tokenizer, facts = load(source, kind, flags.tokenizer)
if isinstance(tokenizer, FastTokenizer):
    print(f"note: {tokenizer.model_path} is not exported, because it is not a tokenizer.model")
    tokenizer = None
if to == "hf" and tokenizer is None and flags.tokenizer != "none":
    raise UserError(
        f"no tokenizer.model found for {source}: pass --tokenizer=PATH, or --tokenizer=none to "
        f"export only the weights"
    )
if tokenizer is None and flags.tokenizer != "none":
    print(f"note: no tokenizer.model found for {source}; the model is exported without one")
name = os.path.basename(flags.push_to_hub or os.path.abspath(flags.path))
name = re.sub(r"[.](gguf|html)$", "", name)
if name in ("hf", "gguf", "model", "out", "export"):
    name = f"Storyteller with {model.n_params():,} parameters"
facts = {**about, "repository": flags.push_to_hub or ".", "page": flags.page, **facts}
facts["title"] = " ".join((flags.title or "").split()) or name
if to == "hf" and flags.license == "unknown":
    print("note: the model card says license: unknown; set it with --license=mit or similar")
if flags.calibrate:
    facts["calibrate"] = flags.calibrate
if flags.beside:
    name, other = ("/".join(os.path.abspath(p).split(os.sep)[-2:]) for p in (source, flags.beside))
    facts["name"] = name
    facts["beside"] = other, *load(model_in(flags.beside), tokenizer=flags.tokenizer)[:2]
write = FORMATS[to].write
if to == "bin":
    write = partial(write, version=None if flags.version == "auto" else int(flags.version))
try:
    write(model, flags.path, dtype, tokenizer, facts)
except OSError as e:
    raise UserError(f"cannot write {flags.path}: {reason(e)}") from None
print(f"wrote {flags.path}")
if flags.push_to_hub:
    push(flags.path, flags.push_to_hub, flags.private, flags.dry_run)
