"""
Text of the web, by the billion tokens, as token shards for training.

    python webtext.py prepare --source=fineweb-6b     # 6 billion tokens of FineWeb, ready-made

    python webtext.py train_vocab --source=fineweb    # or from text: byte-level BPE of 49,152 ...
    python webtext.py prepare --source=fineweb        # ... and the shards, file after file

Everything lies below data_dir, data/NAME unless it is given: the tokenizer, bpe49152.model, and
bpe49152/ with the shards. A source is one of SOURCES; a dataset of the hub, hf:user/name; or a file
or folder here: .txt with <|endoftext|> between documents, .json, .jsonl or .csv, all four also as
.gz, or .parquet.

While one file of the hub is read, the next is downloaded; a file in shards is deleted.
Text is read as a stream, so memory depends only on num_workers. A hash of each document's text
decides whether it is for validation, so no copy of it can be in training, whichever machine reads
it. After an interruption the same command continues at the shard where it stopped.

Many machines share the work with --shard=0/8, --shard=1/8 ...; once their files are in one folder,
`merge --shards=8` makes them one set. One machine alone needs no merge.

To add a dataset of the hub: a line in SOURCES. To add another site: a function like files_of_hub()
that returns its Files, and its branch in all_files(); get() must not send it the hub's token.
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
    read_sidecar,
    training_documents,
    write_shards,
    write_sidecar,
)
from tokenizer import export_beside, open_tokenizer, tokenizer_to_encode, train_byte_level

# -----------------------------------------------------------------------------
stage = ""  # train_vocab, prepare or merge
source = ""  # fineweb-6b, fineweb, fineweb-edu, openwebtext, hf:user/name, or a file or folder
folder = ""  # of the files in a dataset of the hub, such as sample/100BT; "": the source's own
n_files = 0  # how many of the files, from the first; 0: all
valid_source = ""  # a file or folder for validation; without one a part of the documents is taken
valid_frac = 0.0  # that part; 0: 0.1 below 2.5 MB, 0.05 below 200 MB, else 0.005
data_dir = ""  # everything is written below this folder; "": data/NAME of the source
vocab_size = 49152  # of byte-level BPE
num_workers = 0  # processes; 0: one a core
revision = "main"  # branch, tag or commit of a dataset of the hub
endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")  # Hugging Face or a mirror
# train_vocab
vocab_mb = 500  # megabytes of text, at most, that the vocabulary is trained on
pattern_name = "gpt2"  # where text is cut before byte-level BPE: as for gpt2, or as for gpt4
overwrite = False  # replace a vocabulary that shards were made with
# prepare
encoder = "auto"  # auto: the fastest that is installed; gigatoken, tiktoken, own
keep_raw = False  # keep downloaded files once they are in shards
shard = "0/1"  # the part of the work that this machine does: i/n, i from 0 to n - 1
# merge
shards = 1  # how many machines there were
# -----------------------------------------------------------------------------

HUB = "hf:"  # before the name of a dataset of the hub
# name: (dataset, folder or files in it, for validation)
SOURCES = {
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT", ""),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT", ""),
    "openwebtext": ("stanford-cs336/owt-sample", "owt_train.txt.gz", "owt_valid.txt.gz"),
}
# name: (dataset, files of ids for training and validation, preset); the tokenizer lies beside them
# or above
TOKENIZED = {
    "fineweb-6b": (
        "weights-and-wires/fineweb-6b",
        "tokenized/train.bin",
        "tokenized/val.bin",
        "config/smol_llama_360m.py",
    )
}


# ---- which files there are


def name_of_source():
    """A name for the source's folder below data."""
    is_named = source in SOURCES or source in TOKENIZED or source.startswith(HUB)
    base = os.path.basename(source.rstrip("/") if is_named else os.path.abspath(source))
    return re.sub(r"(?i)\.(txt|jsonl?|csv|parquet|gz)\b", "", base) or "text"


def data_paths():
    folder = data_dir or os.path.join("data", name_of_source())
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"data_dir = {folder} is a file: name a folder")
    return DataPaths(folder, "bpe", vocab_size)


def full_source():
    """The source; if it is a path, the absolute path."""
    return os.path.abspath(source) if os.path.exists(source) and source not in SOURCES else source


def check_folder():
    """Raise UserError where the shards of another source would be lost."""
    paths = data_paths()
    there = (read_sidecar(paths.shards) or {}).get("valid_source", [full_source()])
    if there != [full_source()]:
        of = there[0] if len(there) == 1 else "another text"
        raise UserError(
            f"{paths.shards} has the shards of {of}: give another --data_dir, or delete that folder"
        )


def all_files():
    """The Files of the source, those for validation first; the others in the order of names."""
    if source in SOURCES or source.startswith(HUB):
        found = files_of_hub()
    else:
        found = files_here(source, False)
    valid = [file for file in found if file.is_valid]
    if valid_source:
        valid = files_here(valid_source, True)
    same = {os.path.realpath(file.path) for file in valid}
    train = [f for f in found if not f.is_valid and os.path.realpath(f.path) not in same]
    if not train:
        raise UserError(f"{source} has no file to train on beside those for validation")
    if n_files < 0:
        raise UserError(f"n_files = {n_files}: expected 0 (all) or more")
    return valid + train[: n_files or None]


def files_here(path, is_valid):
    if not os.path.exists(path):
        names = ", ".join([*TOKENIZED, *SOURCES])
        raise UserError(f"{path!r} does not exist: expected {names}, hf:user/name, or a path")
    paths = text_files(path)
    books = books_among(paths)
    return [file_here(one, is_valid, one in books) for one in paths]


def files_of_hub():
    """The Files of a dataset of the hub. Raises UserError where the hub does not answer."""
    repo, inside, valid = SOURCES.get(source) or (source.removeprefix(HUB), "", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"source = {source}: expected hf:user/name")
    inside = folder.strip("/") or inside
    hub = need("huggingface_hub", "web")
    api = hub.HfApi(endpoint=endpoint, token=secret("HF_TOKEN") or False)
    words = {"repo_type": "dataset", "revision": revision}
    is_file = inside.lower().endswith(READABLE)
    try:
        tree = list(
            api.list_repo_tree(repo, None if is_file else inside or None, recursive=True, **words)
        )
    except Exception as e:  # of the hub, of the network, of the name
        raise UserError(f"cannot list {repo} at {endpoint}: {reason(e)}") from None
    files = {entry.path: entry for entry in tree if hasattr(entry, "size")}
    found = []
    for name in filter(None, (inside, valid)) if is_file else data_files(files, repo):
        if name not in files:
            raise UserError(f"{repo} at {endpoint} has no file {name}")
        size, version = files[name].size, files[name].blob_id
        # by its content, so that no other version is taken for it
        local = os.path.join(downloads(), f"{version[:16]}_{os.path.basename(name)}")
        found.append(File(name, size, version, local, address(repo, name), name == valid))
    if not found:
        where = f"{repo}/{inside}" if inside else repo
        raise UserError(f"{where} at {endpoint} has no file ending in {', '.join(READABLE)}")
    return found


def address(repo, name):
    """Where a file of a dataset of the hub is."""
    base = f"{endpoint.rstrip('/')}/datasets/{repo}/resolve/{quote(revision, safe='')}"
    return f"{base}/{quote(name)}"


def downloads():
    """The folder, of this machine, of files of the hub while they are needed."""
    i, n = this_machine()
    name = f"downloads_{i}_of_{n}" if n > 1 else "downloads"
    return os.path.join(data_paths().data_dir, name)


# ---- downloads


def get(url, path):
    """Download a file of the hub."""
    hint = "check --source, --revision and --endpoint, or HF_TOKEN if it is not public"
    download(url, path, token=secret("HF_TOKEN"), hint=hint)


def fetch(file):
    """Download a File unless it is at its path already."""
    if file.url and not os.path.exists(file.path):
        get(file.url, file.path)


def fetched(files):
    """Yield Files that are here, the next one being downloaded meanwhile."""
    begun = ((file, in_background(fetch, file)) for file in files)
    for (file, done), _ in itertools.pairwise(itertools.chain(begun, [None])):
        done.result()
        yield file


def in_background(function, *words):
    """Run a function in a daemon thread: Ctrl-C need not wait for gigabytes. Returns its Future."""
    future = Future()

    def work():
        try:
            future.set_result(function(*words))
        except BaseException as e:  # raised where it is waited for
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


def tidy():
    """Remove the folder downloads once nothing is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(downloads())


def how_to_split(files):
    """The Split of the files; those for validation are then here."""
    for file in files:
        if file.is_valid:
            fetch(file)
    return choose_split(files, valid_frac)


def this_machine():
    """(i, n) of --shard=i/n."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not i < n:
        raise UserError(f"shard = {shard!r}: expected i/n with i from 0 to n - 1, like 0/8")
    return i, n


def prepare_stage():
    if source in TOKENIZED:
        return prepare_tokenized()
    machine = this_machine()
    workers = worker_count(num_workers)
    check_folder()
    paths = data_paths()
    train_it = f"train it with: python webtext.py train_vocab {same_flags()}"
    hint = f"{train_it}; or bring one with bpe.py import"
    tokenizer = tokenizer_to_encode(paths, encoder, hint)
    files = all_files()
    split = how_to_split(files)
    meta = write_shards(
        paths.shards, tokenizer, files, split, workers, about(), encoder, machine, fetched, drop
    )
    for file in files:
        if file.url and file.is_valid and not keep_raw:
            remove(file.path)
    tidy()
    if meta:
        return say_next()
    print(
        f"part {shard} is done; once all {machine[1]} are, in one folder: "
        f"python webtext.py merge {same_flags()} --shards={machine[1]}"
    )


def drop(file, part):
    """Delete a downloaded training file that is in shards."""
    if file.url and not keep_raw and not file.is_valid:
        part.save()
        remove(file.path)


def merge_stage():
    if source in TOKENIZED:
        raise UserError(f"{source} is ready-made: there is nothing to merge")
    if shards < 1:
        raise UserError(f"shards = {shards}: expected how many machines there were")
    finish(data_paths().shards, shards, about())
    say_next()


def about():
    """What the sidecar says of where the shards come from."""
    made_by = f"python webtext.py prepare {same_flags()}"
    return {"valid_source": [full_source()], "made_by": made_by}


def say_next(preset=""):
    where = f"--data_dir={shlex.quote(data_dir)}" if data_dir else ""
    print(f"next: python train.py {f'{preset} {where}' if preset else data_paths().make_hint()}")


# ---- sources that are tokens already


def prepare_tokenized():
    """
    Ids as other projects write them, uint16 one after another with <|endoftext|> behind each
    document, become shards as they are: but for the beginning of the validation ids, which is the
    end of a document that training ids begin.
    """
    if shard != "0/1" or n_files or folder or valid_source:
        raise UserError(f"{source} is ready-made: --shard, --n_files and the like are for text")
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
        raise UserError(f"{source} has {tokenizer.vocab_size} tokens: give that as --vocab_size")
    listed, old = [], read_sidecar(paths.shards) or {"shards": []}
    kept = {one["name"]: one for one in old["shards"]}
    for name, there in (("data00.bin", valid_name), ("data01.bin", train_name)):
        path, source_key = os.path.join(paths.shards, name), f"{repo}@{revision}/{there}"
        one = kept.get(name, {"source": []})
        is_same = one["source"] == [source_key] and os.path.exists(path)
        if is_same and checksum(path) == [2 * one["tokens"], one["crc32"]]:
            print(f"{path} is there already")
        else:
            raw = os.path.join(downloads(), f"{quote(revision, safe='')}_{os.path.basename(there)}")
            if not os.path.exists(raw):
                get(address(repo, there), raw)
            if name == "data00.bin":
                drop_first_document(raw, tokenizer.bos_id)
            one = counted(raw, name, source_key, tokenizer)
            os.makedirs(paths.shards, exist_ok=True)
            os.replace(raw, path)
        listed.append(one)
    tidy()
    shared = {"vocab_size": vocab_size, "dtype": "uint16", "tokenizer_hash": tokenizer.hash}
    write_sidecar(paths.shards, {**shared, **about(), "held_out": 0}, listed)
    say_next(preset)


def get_tokenizer(repo, folder, path):
    """Download tokenizer.json from the folder of the ids, or from the top of the dataset."""
    try:
        get(address(repo, f"{folder}/tokenizer.json"), path)
    except UserError as e:
        if "404" not in str(e):
            raise
        get(address(repo, "tokenizer.json"), path)


def drop_first_document(path, bos):
    """Let a file of uint16 ids begin with its first `bos`. Raises UserError where it has none."""
    ids = np.fromfile(path, "<u2")
    places = np.flatnonzero(ids == bos)
    if not len(places):
        raise UserError(f"{path} has no document that ends: delete it and prepare again")
    with atomic_write(path) as f:
        f.write(ids[places[0] :])


def counted(path, name, source_key, tokenizer):
    """What a sidecar says of a file of uint16 ids. UserError for those of another tokenizer."""
    size = os.path.getsize(path)
    if size % 2 or not size:
        raise UserError(f"{path} has {size} bytes, which are no uint16 ids: delete it")
    shard = dict.fromkeys(COUNTS, 0) | {"crc32": 0}
    bar = progress(total=size, unit="B", unit_scale=True, desc=f"count {name}")
    with bar, open(path, "rb") as f:
        while len(ids := np.fromfile(f, "<u2", CHUNK)):
            if (top := int(ids.max())) >= tokenizer.vocab_size:
                raise UserError(
                    f"{path} has a token {top}, and the tokenizer {tokenizer.vocab_size}: it "
                    f"belongs to another one; delete it"
                )
            shard["documents"] += int((ids == tokenizer.bos_id).sum())
            shard["tokens"] += len(ids)
            shard["bytes"] += tokenizer.bytes_in(ids)
            shard["crc32"] = zlib.crc32(ids, shard["crc32"])
            bar.update(ids.nbytes)
    return {"name": name, "source": [source_key], **shard}


def same_flags():
    """The flags that name the same source and vocabulary in the next command."""
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
        what = f"unknown stage {stage!r}" if stage else "no stage is given"
        raise UserError(f"{what}; expected one of: {', '.join(STAGES)}")
    if not source:
        names = ", ".join([*TOKENIZED, *SOURCES])
        raise UserError(f"--source=NAME is missing: {names}, hf:user/name, or a path")
    for name, only in (("shard", "prepare"), ("shards", "merge")):
        if name in given and stage != only:
            raise UserError(f"--{name} is for {only}, not for {stage}")
    STAGES[stage]()
