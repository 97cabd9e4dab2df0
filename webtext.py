"""
Turn web text, billions of tokens, into token shards for training.

    python webtext.py prepare --source=fineweb-6b     # 6 billion tokens of FineWeb, as tokens

    python webtext.py train_vocab --source=fineweb    # or from text: byte-level BPE of 49,152 ...
    python webtext.py prepare --source=fineweb        # ... and the shards, file by file

Everything is written to data_dir, by default data/NAME: the tokenizer, bpe49152.model, and the
shards in bpe49152/. A source is one of SOURCES, a Hugging Face dataset (hf:user/name), or a local
file or folder: .txt with <|endoftext|> between documents, .json, .jsonl or .csv, also compressed as
.gz, or .parquet.

While one file is read, the next is downloaded; downloads are deleted once they are in shards. Text
is streamed, so memory depends only on num_workers. A hash of its text decides whether a document is
for validation, so all copies of a document are on the same side of the split, on any machine. After
an interruption, the same command continues at the shard where it stopped.

Several machines can share the work with --shard=0/8, --shard=1/8 ... When their files are in one
folder, `merge --source=NAME --shards=8` makes them one set. A single machine needs no merge.

To add a Hugging Face dataset, add a line to SOURCES. To add another site, write a function like
files_of_hub() that returns its Files, and call it in all_files(); get() must not send the Hugging
Face token to that site.
"""

import contextlib
import itertools
import os
import re
import shlex
import threading
import zlib
from concurrent.futures import Future
from urllib.parse import quote

import numpy as np

from configurator import UserError, configure
from dataset import CHUNK, DataPaths
from formats.hftokenizer import byte_level_from_json
from system.files import atomic_write, checksum, download, remove
from system.progress import progress
from system.remote import need, reason, secret
from system.workers import worker_count
from text.corpus import File, books_among, data_files, file_here, text_files
from text.documents import READABLE
from text.pieces import COUNTS
from text.shards import (
    choose_split,
    finish,
    orders_of,
    read_sidecar,
    training_documents,
    write_shards,
    write_sidecar,
)
from tokenizer import export_beside, open_tokenizer, tokenizer_to_encode, train_byte_level

# -----------------------------------------------------------------------------
stage = ""  # train_vocab, prepare or merge
source = ""  # fineweb-6b, fineweb[-edu], openwebtext, hf:user/name, or a path
folder = ""  # folder in the dataset, such as sample/100BT; empty: the source's
n_files = 0  # use only the first files; 0: all
valid_source = ""  # file or folder for validation; empty: part of the documents
valid_frac = 0.0  # that part; 0: 0.1 below 2.5 MB, 0.05 below 200 MB, else 0.005
data_dir = ""  # folder to write to; empty: data/NAME, by the name of the source
vocab_size = 49152  # tokens in the vocabulary, a byte-level BPE
num_workers = 0  # processes; 0: one per core
revision = "main"  # branch, tag or commit of a Hugging Face dataset
endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")  # Hugging Face or a mirror
# train_vocab
vocab_mb = 500  # megabytes of text to train the vocabulary on, at most
pattern_name = "gpt2"  # how byte-level BPE cuts text into pre-tokens: gpt2 or gpt4
overwrite = False  # replace a vocabulary even if shards need it
# prepare
encoder = "auto"  # auto (the fastest), gigatoken, tiktoken or own
orders = False  # put an order (words, features, a sentence) before most documents
keep_raw = False  # keep downloaded files after they are in shards
shard = "0/1"  # this machine's share of the work: i/n, i from 0 to n - 1
# merge
shards = 1  # number of machines that shared the work
# -----------------------------------------------------------------------------

HUB = "hf:"  # prefix of the name of a Hugging Face dataset
# name: (dataset, folder or file of training text, file of validation text)
SOURCES = {
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT", ""),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT", ""),
    "openwebtext": ("stanford-cs336/owt-sample", "owt_train.txt.gz", "owt_valid.txt.gz"),
}
# name: (dataset, files of ids for training and validation, preset); tokenizer.json is in the same
# folder or at the top of the dataset
TOKENIZED = {
    "fineweb-6b": (
        "weights-and-wires/fineweb-6b",
        "tokenized/train.bin",
        "tokenized/val.bin",
        "config/smol_llama_360m.py",
    )
}


# ---- the files of the source


def name_of_source():
    """Return a name for the source's folder in data."""
    is_named = source in SOURCES or source in TOKENIZED or source.startswith(HUB)
    base = os.path.basename(source.rstrip("/") if is_named else os.path.abspath(source))
    return re.sub(r"(?i)\.(txt|jsonl?|csv|parquet|gz)\b", "", base) or "text"


def data_paths():
    folder = data_dir or os.path.join("data", name_of_source())
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"data_dir = {folder}: expected a folder, not a file")
    return DataPaths(folder, "bpe", vocab_size)


def full_source():
    """Return the source; if it is a path, as an absolute path."""
    return os.path.abspath(source) if os.path.exists(source) and source not in SOURCES else source


def check_folder():
    """Raise UserError if the shards of another source would be overwritten."""
    paths = data_paths()
    sources = (read_sidecar(paths.shards) or {}).get("valid_source", [full_source()])
    if sources != [full_source()]:
        other = sources[0] if len(sources) == 1 else "another text"
        raise UserError(
            f"{paths.shards} already exists and has the shards of {other}; choose another "
            f"--data_dir, or delete that folder"
        )


def all_files():
    """Return the Files of the source: validation files, then training files by name."""
    if source in SOURCES or source.startswith(HUB):
        files = files_of_hub()
    else:
        files = files_here(source, False)
    valid = [file for file in files if file.is_valid]
    if valid_source:
        valid = files_here(valid_source, True)
    same = {os.path.realpath(file.path) for file in valid}
    train = [f for f in files if not f.is_valid and os.path.realpath(f.path) not in same]
    if not train:
        raise UserError(f"{source} has only validation files: expected a file to train on")
    if n_files < 0:
        raise UserError(f"n_files = {n_files}: expected 0 (all) or more")
    return valid + train[: n_files or None]


def files_here(path, is_valid):
    if not os.path.exists(path):
        names = ", ".join([*TOKENIZED, *SOURCES])
        raise UserError(f"{path} does not exist; pass {names}, hf:user/name, or a path")
    paths = text_files(path)
    books = books_among(paths)
    return [file_here(path, is_valid, path in books) for path in paths]


def files_of_hub():
    """Return the Files of a Hugging Face dataset; raise UserError if the hub does not answer."""
    repo, inside, valid = SOURCES.get(source) or (source.removeprefix(HUB), "", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"source = {source}: expected hf:user/name")
    inside = folder.strip("/") or inside
    hub = need("huggingface_hub", "web")
    api = hub.HfApi(endpoint=endpoint, token=secret("HF_TOKEN") or False)
    options = {"repo_type": "dataset", "revision": revision, "recursive": True}
    is_file = inside.lower().endswith(READABLE)
    try:
        tree = list(api.list_repo_tree(repo, None if is_file else inside or None, **options))
    except Exception as e:  # huggingface_hub raises many kinds
        raise UserError(f"cannot list {repo} at {endpoint}: {reason(e)}") from None
    entries = {entry.path: entry for entry in tree if hasattr(entry, "size")}
    files = []
    for name in filter(None, (inside, valid)) if is_file else data_files(entries, repo):
        if name not in entries:
            raise UserError(f"{repo} at {endpoint} has no file {name}")
        size, version = entries[name].size, entries[name].blob_id
        # named by its content, so that another version is not mistaken for it
        local = os.path.join(downloads(), f"{version[:16]}_{os.path.basename(name)}")
        files.append(File(name, size, version, local, address(repo, name), name == valid))
    if not files:
        where = f"{repo}/{inside}" if inside else repo
        raise UserError(f"{where} at {endpoint} has no file ending in {', '.join(READABLE)}")
    return files


def address(repo, name):
    """Return the URL of a file in a Hugging Face dataset."""
    base = f"{endpoint.rstrip('/')}/datasets/{repo}/resolve/{quote(revision, safe='')}"
    return f"{base}/{quote(name)}"


def downloads():
    """Return this machine's folder for downloaded files, which are deleted after use."""
    i, n = this_machine()
    name = f"downloads_{i}_of_{n}" if n > 1 else "downloads"
    return os.path.join(data_paths().data_dir, name)


# ---- downloads


def get(url, path):
    """Download a file of a Hugging Face dataset."""
    hint = "check --source, --revision and --endpoint, or set HF_TOKEN for a private dataset"
    download(url, path, token=secret("HF_TOKEN"), hint=hint)


def fetch(file):
    """Download a File unless its path exists."""
    if file.url and not os.path.exists(file.path):
        get(file.url, file.path)


def fetched(files):
    """Yield Files once they are downloaded; the next one is downloaded at the same time."""
    started = ((file, in_background(fetch, file)) for file in files)
    for (file, done), _ in itertools.pairwise(itertools.chain(started, [None])):
        done.result()
        yield file


def in_background(function, *args):
    """Run a function in a daemon thread, which Ctrl-C need not wait for; return its Future."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as e:  # result() raises it
            future.set_exception(e)

    threading.Thread(target=work, daemon=True).start()
    return future


# ---- stages


def train_vocab_stage():
    workers = worker_count(num_workers)
    check_folder()
    if not 257 <= vocab_size <= 1_000_000:
        raise UserError(f"vocab_size = {vocab_size}: expected 257 to 1,000,000")
    paths, files = data_paths(), all_files()
    texts = training_documents(files, how_to_split(files), vocab_mb, fetch)
    with paths.new_tokenizer(overwrite) as path:
        train_byte_level(texts, vocab_size, path, workers, pattern_name)
    export_beside(paths.tokenizer_model)
    print(f"next: python webtext.py prepare {same_flags()}")


def remove_empty_downloads():
    """Remove the folder of downloads if it is empty."""
    with contextlib.suppress(OSError):
        os.rmdir(downloads())


def how_to_split(files):
    """Download the validation files and return the Split of the files."""
    for file in files:
        if file.is_valid:
            fetch(file)
    return choose_split(files, valid_frac)


def this_machine():
    """Return (i, n) of --shard=i/n."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not i < n:
        raise UserError(f"shard = {shard!r}: expected i/n with i from 0 to n - 1, like 0/8")
    return i, n


def prepare_stage():
    if source in TOKENIZED and orders:
        raise UserError(f"{source} is already tokenized, and orders are made from text")
    if source in TOKENIZED:
        return prepare_tokenized()
    machine = this_machine()
    workers = worker_count(num_workers)
    check_folder()
    paths = data_paths()
    hint = f"import one with bpe.py, or run: python webtext.py train_vocab {same_flags()}"
    tokenizer = tokenizer_to_encode(paths, encoder, hint)
    files = all_files()
    if orders:
        files = [file.labeled() for file in files]
    split = how_to_split(files)
    made = orders_of(files, split, fetch) if orders else None
    args = workers, about(), encoder, machine, fetched, drop, made
    meta = write_shards(paths.shards, tokenizer, files, split, *args)
    for file in files:  # those for validation, and those in which only words were counted
        if file.url and not keep_raw:
            remove(file.path)
    remove_empty_downloads()
    if meta:
        return print_next()
    print(
        f"part {shard} is done; when all {machine[1]} parts are in one folder, run: "
        f"python webtext.py merge {same_flags()} --shards={machine[1]}"
    )


def drop(file, part):
    """Delete a downloaded training file after all of it is in shards."""
    if file.url and not keep_raw and not file.is_valid:
        part.save()
        remove(file.path)


def merge_stage():
    if source in TOKENIZED:
        raise UserError(f"{source} is already tokenized and cannot be merged: use prepare")
    if shards < 1:
        raise UserError(f"shards = {shards}: expected the number of machines, 1 or more")
    finish(data_paths().shards, shards, about())
    print_next()


def about():
    """Return what the sidecar records about the origin of the shards."""
    made_by = f"python webtext.py prepare {same_flags()}{' --orders' * orders}"
    return {"valid_source": [full_source()], "made_by": made_by}


def print_next(preset=""):
    where = f"--data_dir={shlex.quote(data_dir)}" if data_dir else ""
    flags = f"{preset} {where}" if preset else f"--minutes=10 {data_paths().flags()}"
    print(f"next: python train.py {flags}")


# ---- sources that are tokenized already


def prepare_tokenized():
    """
    Use files of ids as shards: uint16, with <|endoftext|> after each document. Only the start of
    the validation ids is dropped, because it is the end of a document in the training ids.
    """
    if shard != "0/1" or n_files or folder or valid_source:
        raise UserError(
            f"{source} is already tokenized and cannot be used with --shard, --n_files, "
            f"--folder or --valid_source: use it without them"
        )
    repo, train_name, valid_name, preset = TOKENIZED[source]
    check_folder()
    paths = data_paths()
    tokenizer_path = os.path.join(paths.data_dir, "tokenizer.json")
    if not os.path.exists(paths.tokenizer_model):
        get_tokenizer(repo, os.path.dirname(train_name), tokenizer_path)
        byte_level_from_json(tokenizer_path).save(paths.tokenizer_model)
        export_beside(paths.tokenizer_model)
    tokenizer = open_tokenizer(paths.tokenizer_model)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"vocab_size = {vocab_size}: expected {tokenizer.vocab_size}, the size of the "
            f"tokenizer of {source}"
        )
    entries, old = [], read_sidecar(paths.shards) or {"shards": []}
    old_entries = {entry["name"]: entry for entry in old["shards"]}
    for name, remote in (("data00.bin", valid_name), ("data01.bin", train_name)):
        path, source_key = os.path.join(paths.shards, name), f"{repo}@{revision}/{remote}"
        entry = old_entries.get(name, {"source": []})
        is_same = entry["source"] == [source_key] and os.path.exists(path)
        if is_same and checksum(path) == [2 * entry["tokens"], entry["crc32"]]:
            print(f"{path} already exists")
        else:
            base = os.path.basename(remote)
            raw = os.path.join(downloads(), f"{quote(revision, safe='')}_{base}")
            if not os.path.exists(raw):
                get(address(repo, remote), raw)
            if name == "data00.bin":
                drop_first_document(raw, tokenizer.bos_id)
            entry = counted(raw, name, source_key, tokenizer)
            os.makedirs(paths.shards, exist_ok=True)
            os.replace(raw, path)
        entries.append(entry)
    remove_empty_downloads()
    shared = {"vocab_size": vocab_size, "dtype": "uint16", "tokenizer_hash": tokenizer.hash}
    write_sidecar(paths.shards, {**shared, **about(), "held_out": 0}, entries)
    print_next(preset)


def get_tokenizer(repo, folder, path):
    """Download tokenizer.json from the folder of the ids or the top of the dataset."""
    try:
        get(address(repo, f"{folder}/tokenizer.json"), path)
    except UserError as e:
        if "404" not in str(e):
            raise
        get(address(repo, "tokenizer.json"), path)


def drop_first_document(path, bos):
    """Drop the ids before the first `bos` from a file of uint16 ids; UserError without one."""
    ids = np.fromfile(path, "<u2")
    places = np.flatnonzero(ids == bos)
    if not len(places):
        raise UserError(
            f"{path} is damaged: it has no end of a document; delete it and prepare again"
        )
    with atomic_write(path) as f:
        f.write(ids[places[0] :])


def counted(path, name, source_key, tokenizer):
    """Return the sidecar's entry for a file of uint16 ids; UserError for another tokenizer's."""
    size = os.path.getsize(path)
    if size % 2 or not size:
        raise UserError(
            f"{path} is damaged: {size} bytes are not uint16 ids; delete it and prepare again"
        )
    shard = dict.fromkeys(COUNTS, 0) | {"crc32": 0}
    bar = progress(total=size, unit="B", unit_scale=True, desc=f"count {name}")
    with bar, open(path, "rb") as f:
        while len(ids := np.fromfile(f, "<u2", CHUNK)):
            if (top := int(ids.max())) >= tokenizer.vocab_size:
                raise UserError(
                    f"{path} has token {top}, but the tokenizer has only {tokenizer.vocab_size} "
                    f"tokens: delete that file and prepare again"
                )
            shard["documents"] += int((ids == tokenizer.bos_id).sum())
            shard["tokens"] += len(ids)
            shard["bytes"] += tokenizer.bytes_in(ids)
            shard["crc32"] = zlib.crc32(ids, shard["crc32"])
            bar.update(ids.nbytes)
    return {"name": name, "source": [source_key], **shard}


def same_flags():
    """Return the flags that select the same source and vocabulary in the next command."""
    flags = [f"--source={shlex.quote(source)}", f"--vocab_size={vocab_size}"]
    for name in ("folder", "n_files", "valid_source", "valid_frac", "data_dir"):
        if value := globals()[name]:
            flags.append(f"--{name}={shlex.quote(str(value))}")
    if revision != "main":
        flags.append(f"--revision={shlex.quote(revision)}")
    return " ".join(flags)


STAGES = {"train_vocab": train_vocab_stage, "prepare": prepare_stage, "merge": merge_stage}

if __name__ == "__main__":  # worker processes import this file again
    given = configure(globals(), positional="stage")
    if stage not in STAGES:
        problem = f"stage = {stage!r}" if stage else "the stage is missing"
        raise UserError(f"{problem}: expected one of {', '.join(STAGES)}")
    if not source:
        names = ", ".join([*TOKENIZED, *SOURCES])
        raise UserError(f"--source=NAME is missing: pass {names}, hf:user/name, or a path")
    for name, only in (("shard", "prepare"), ("shards", "merge")):
        if name in given and stage != only:
            raise UserError(f"--{name} cannot be used with {stage}: use it with {only}")
    STAGES[stage]()
