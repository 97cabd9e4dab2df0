"""
A model from any format into any other: checkpoint, model.bin, Hugging Face, GGUF, safetensors.

    python export.py out/model.bin --dtype=int8                     # for ./run
    python export.py out/hf --format=hf --push-to-hub=user/name     # for transformers, and the hub
    python export.py out/story.gguf --dtype=q8_0                    # for llama.cpp and Ollama
    python export.py imported/ckpt.pt --from-hf=PATH                # to sample, and to train on

The model comes from --checkpoint, which may be in any of these formats too, or from one --from-...
What a format cannot carry is refused by name, and nothing is written. The formats are in
formats/table.py.
"""

import argparse
import os
import re
import sys
from functools import partial

from configurator import UserError, in_home, one_sentence_errors
from formats.huggingface import FastTokenizer
from formats.modelbin import VERSIONS
from formats.table import FORMATS, SOURCES, format_of, load, recognize
from system.remote import check_push, push, reason

one_sentence_errors()
table = "\n".join(
    f"  {name:<12} {f.purpose}; --dtype={'|'.join(f.dtypes)}" for name, f in FORMATS.items()
)
parser = argparse.ArgumentParser(
    description="Write a model in another format.",
    epilog=f"formats:\n{table}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
parser.add_argument("path", help="the file or folder to write, such as out/model.bin")
group = parser.add_mutually_exclusive_group()
group.add_argument(
    "--checkpoint",
    metavar="PATH",
    default=os.path.join("out", "ckpt.pt"),
    help="the model to write; a checkpoint, or anything that --from-... takes (default: "
    "out/ckpt.pt)",
)
for name in SOURCES:
    if name != "checkpoint":
        what = "a folder, or hf:user/name" if name == "hf" else "a model in this format"
        group.add_argument(f"--from-{name}", f"--from_{name}", metavar="PATH", help=what)
parser.add_argument(
    "--format",
    choices=FORMATS,
    metavar="FORMAT",
    help="see below (default: by the ending of the path, else bin)",
)
parser.add_argument("--dtype", default="fp32", help="number format of the weights (default: fp32)")
parser.add_argument(
    "--version",
    choices=("auto", *map(str, VERSIONS)),
    default="auto",
    help="of model.bin: 0, llama2.c's first, for plain Llama 2 only; 3, which carries every "
    "option; auto (default), 0 if it carries the model and else 3",
)
parser.add_argument(
    "--tokenizer",
    default="",
    metavar="PATH",
    help="a tokenizer's .model (default: the one beside the model); none: leave it out",
)
parser.add_argument(
    "--title",
    default="",
    help="name of the model in its card or GGUF file (default: that of the hub, or of the path)",
)
parser.add_argument("--language", default="en", help="code of its language, there (default: en)")
parser.add_argument(
    "--license", default="unknown", help="its licence, there, such as mit (default: unknown)"
)
parser.add_argument(
    "--push-to-hub",
    "--push_to_hub",
    metavar="USER/NAME",
    help="upload the folder (--format=hf) to the Hugging Face hub, with the token of HF_TOKEN or "
    ".env",
)
parser.add_argument("--private", action="store_true", help="make a new model of the hub private")
parser.add_argument(
    "--dry-run", "--dry_run", action="store_true", help="say what would be uploaded, and stop"
)
flags = parser.parse_args(list(map(in_home, sys.argv[1:])))

sources = {name: getattr(flags, f"from_{name}", None) for name in SOURCES}
kind = next((name for name, path in sources.items() if path is not None), None)
source = sources[kind] if kind else flags.checkpoint
to = flags.format or format_of(flags.path)
dtype = flags.dtype.lower()
if dtype not in FORMATS[to].dtypes:
    known = ", ".join(FORMATS[to].dtypes)
    raise UserError(f"dtype = {flags.dtype}: expected one of {known} for --format={to}")
if flags.version != "auto" and to != "bin":
    raise UserError(f"version = {flags.version}: only --format=bin has versions")
if flags.push_to_hub and to != "hf":
    raise UserError("push-to-hub uploads a folder: give --format=hf")
if (flags.dry_run or flags.private) and not flags.push_to_hub:
    raise UserError("dry-run and private are about an upload: give --push-to-hub=USER/NAME")
about = {name: getattr(flags, name) for name in ("title", "language", "license")}
for name, value in about.items():
    if value != parser.get_default(name) and to not in ("hf", "gguf"):
        raise UserError(f"{name} is for --format=hf and --format=gguf: {to} does not carry it")
    if name != "title" and not re.fullmatch(r"[\w.+-]{2,40}", value):
        raise UserError(f"{name} = {value!r}: expected a short code, such as en or mit")
if flags.push_to_hub:
    check_push(flags.push_to_hub, flags.dry_run)
if not flags.path:
    raise UserError("the path to write is empty: name a file or a folder")
is_tokenizer = re.fullmatch(r"(tokenizer|tok\d+|bpe\d+)\.bin", os.path.basename(flags.path))
if os.path.isfile(flags.path) and to != "hf" and (is_tokenizer or recognize(flags.path) != to):
    was = "a checkpoint" if recognize(flags.path) == "checkpoint" else "no model of this format"
    raise UserError(
        f"{flags.path} exists and is {was}, and would be lost: name another file for the model"
    )
target, read = os.path.realpath(flags.path), os.path.realpath(source)
if os.path.exists(target) and (
    target == read
    or (os.path.isdir(read) and target.startswith(read + os.sep))
    or (os.path.isdir(target) and read.startswith(target + os.sep))
):
    raise UserError(f"{flags.path}, which belongs to what is read, would be lost: name another")

model, tokenizer, facts = load(source, kind, flags.tokenizer)
if isinstance(tokenizer, FastTokenizer):
    print(f"note: only a tokenizer.model is exported; {tokenizer.model_path} is not")
    tokenizer = None
if to == "hf" and tokenizer is None and flags.tokenizer != "none":
    raise UserError(
        f"there is no tokenizer.model beside {source}: give --tokenizer=PATH, or --tokenizer=none "
        f"for the weights alone"
    )
if tokenizer is None and flags.tokenizer != "none":
    print(f"note: there is no tokenizer.model beside {source}: the model is written without")
name = os.path.basename(flags.push_to_hub or os.path.abspath(flags.path)).removesuffix(".gguf")
if name in ("hf", "gguf", "model", "out", "export"):
    name = f"Story teller of {model.n_params():,} parameters"
facts = {**about, "repository": flags.push_to_hub or ".", **facts}
facts["title"] = " ".join(flags.title.split()) or name
if to == "hf" and flags.license == "unknown":
    print("note: the model card says license: unknown; give another with --license=mit or the like")
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
