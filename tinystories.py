"""
Training data: from stories, on disk or online, to token shards.

    python tinystories.py download                       # TinyStories from Hugging Face
    python tinystories.py synth                          # or a practice corpus, offline
    python tinystories.py train_vocab --vocab_size=4096  # a SentencePiece vocabulary
    python tinystories.py pretokenize --vocab_size=4096  # all stories as token shards
    python tinystories.py draft --vocab_size=4096        # guesses for ./run --draft, if you like

--vocab_source=bpe (or --tokenizer=bpe) uses byte-level BPE instead of SentencePiece.

To train on any other text, pass --source=PATH: a file or a folder of .txt (documents separated by
<|endoftext|>), .json, .jsonl, .csv or .parquet. A hash of its text decides whether a document is
for validation, unless --valid_source gives a validation text.
"""

import json
import os
import shlex
import shutil

import numpy as np

from configurator import UserError, configure
from dataset import DataPaths, TokenData
from system.files import atomic_write, download, unpack
from system.progress import progress
from system.workers import worker_count
from text.corpus import plan_shards, text_files
from text.draft import MAX_TOKENS, write_draft
from text.shards import (
    choose_split,
    orders_of,
    training_documents,
    without_marks,
    write_shards,
)
from text.synth import make_stories
from tokenizer import (
    export_beside,
    open_tokenizer,
    tokenizer_to_encode,
    train_byte_level,
    train_sentencepiece,
)

# -----------------------------------------------------------------------------
stage = ""  # download, synth, train_vocab, pretokenize or draft
data_dir = "data"  # folder of the stories, vocabularies and shards
vocab_size = 4096  # tokens in the vocabulary; 0: Llama 2's own vocabulary
vocab_source = "custom"  # custom: SentencePiece; bpe: byte-level BPE; llama2: Meta's
tokenizer = ""  # sentencepiece or bpe: same as --vocab_source=custom or bpe
source = ""  # text file, or folder of them, to use instead of the stories
valid_source = ""  # text for validation; empty: part of the documents
valid_frac = 0.0  # that part; 0: 0.1 below 2.5 MB, 0.05 below 200 MB, else 0.005
num_workers = 0  # processes; 0: one per core
# download
dataset = "all_data"  # all_data: stories as JSON; v2: TinyStoriesV2-GPT4 as text
pretokenized = 0  # 128 or 105: BabyLlama's vocabulary and shards instead
url = ""  # another address or path of the file or of its folder
endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")  # Hugging Face or a mirror
# synth
n_stories = 20000  # stories in the practice corpus
seed = 1337  # the same seed gives the same stories
# train_vocab
vocab_mb = 500  # megabytes of text to train the vocabulary on, at most
pattern_name = "gpt2"  # how byte-level BPE cuts text into pre-tokens: gpt2 or gpt4
overwrite = False  # replace a vocabulary even if shards need it
# pretokenize
encoder = "auto"  # auto (the fastest), gigatoken, sentencepiece, tiktoken or own
orders = False  # put an order (words, features, a sentence) before most stories
# -----------------------------------------------------------------------------

V2_TRAIN, V2_VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
ARCHIVE = "TinyStories_all_data.tar.gz"
N_JSON = 20  # JSON files in the practice corpus


def fetch(repo, name, path):
    """Download file `name` of a Hugging Face dataset, or from --url, unless `path` exists."""
    if os.path.exists(path):
        print(f"{path} already exists")
        return
    base = os.path.basename(name)
    address = f"{endpoint.rstrip('/')}/datasets/{repo}/resolve/main/{name}"
    if url:
        address = url if url.endswith(base) else f"{url.rstrip('/')}/{base}"
    print(f"downloading {address}")
    download(address, path)


def fetch_folder(repo, name, folder):
    """Download an archive as fetch() does and unpack it to `folder`, unless that has files."""
    if os.path.isdir(folder) and os.listdir(folder):
        print(f"{folder} already exists; delete it to unpack it again")
        return
    archive = os.path.join(data_dir, os.path.basename(name))
    fetch(repo, name, archive)
    unpack(archive, folder)


def download_stage():
    paths = DataPaths(data_dir, vocab_source, vocab_size)
    if pretokenized:
        download_pretokenized()
    elif dataset == "v2":
        for name in (V2_TRAIN, V2_VALID):
            fetch("roneneldan/TinyStories", name, os.path.join(data_dir, name))
        next_steps()
    elif dataset == "all_data":
        if is_practice_corpus(paths.stories):
            raise UserError(
                f"{paths.stories} already exists and holds the practice corpus; choose another "
                f"--data_dir, or delete the folder"
            )
        fetch_folder("roneneldan/TinyStories", ARCHIVE, paths.stories)
        print(f"{len(text_files(paths.stories))} files of stories are in {paths.stories}")
        next_steps()
    else:
        raise UserError(f"dataset = {dataset!r}: expected all_data or v2")


def download_pretokenized():
    name = f"tok{pretokenized}"
    if pretokenized not in (128, 105):
        raise UserError(f"pretokenized = {pretokenized}: expected 128 or 105")
    paths = DataPaths(data_dir, "custom", pretokenized)
    fetch("enio/TinyStories", f"{name}/{name}.model", paths.tokenizer_model)
    fetch("enio/TinyStories", f"{name}/{name}.vocab", os.path.join(data_dir, f"{name}.vocab"))
    export_beside(paths.tokenizer_model)
    fetch_folder("enio/TinyStories", f"{name}/{name}.tar.gz", paths.shards)
    preset = "config/baby128.py" if pretokenized == 128 else "config/tok105.py"
    print(f"next: python train.py {preset} {paths.flags()}")


def synth_stage():
    stories = DataPaths(data_dir, "custom", vocab_size).stories
    if n_stories < N_JSON:
        raise UserError(f"n_stories = {n_stories}: expected at least {N_JSON}, one per file")
    if os.path.isdir(stories) and os.listdir(stories) and not is_practice_corpus(stories):
        raise UserError(
            f"{stories} already exists and holds other stories; choose another --data_dir, or "
            f"delete the folder"
        )
    part = stories + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        write_stories(part)
        shutil.rmtree(stories, ignore_errors=True)
        os.rename(part, stories)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{n_stories:,} stories are in {stories}")
    next_steps()


def write_stories(folder):
    all_stories = iter(progress(make_stories(n_stories, seed), total=n_stories, desc="stories"))
    for i in range(N_JSON):
        n = n_stories * (i + 1) // N_JSON - n_stories * i // N_JSON
        with atomic_write(os.path.join(folder, f"data{i:02}.json"), "w", durable=False) as f:
            json.dump([next(all_stories) for _ in range(n)], f, ensure_ascii=False)
    list(all_stories)  # closes the progress bar


def is_practice_corpus(folder):
    """Return whether the first file of a folder was written by synth_stage()."""
    first = os.path.join(folder, "data00.json")
    if not os.path.exists(first):
        return False
    with open(first, "rb") as f:
        return b'"source": "synth"' in f.read(1 << 14)


def corpus():
    """Return the path of the text, and the path of the validation text or ""."""
    stories = DataPaths(data_dir, "custom", vocab_size).stories
    v2_train, v2_valid = (os.path.join(data_dir, name) for name in (V2_TRAIN, V2_VALID))
    if source or os.path.isdir(stories):
        return source or stories, valid_source
    if os.path.exists(v2_train):
        return v2_train, valid_source or v2_valid
    raise UserError(
        f"{data_dir} has no stories: pass a text as --source=PATH, or run: python tinystories.py "
        f"download {same_flags()} (synth instead of download makes a practice corpus)"
    )


def train_vocab_stage():
    paths = DataPaths(data_dir, vocab_source, vocab_size)
    if paths.is_llama2:
        raise UserError(
            "Llama 2's vocabulary cannot be trained: use --vocab_source=custom or bpe, and a "
            "--vocab_size of at least 64"
        )
    if not 64 <= vocab_size <= 1_000_000:
        raise UserError(f"vocab_size = {vocab_size}: expected 64 to 1,000,000")
    files, workers = plan_shards(*corpus()), worker_count(num_workers)
    texts = training_documents(files, choose_split(files, valid_frac), vocab_mb)
    with paths.new_tokenizer(overwrite) as path:
        if vocab_source == "bpe":
            train_byte_level(texts, vocab_size, path, workers, pattern_name)
        else:
            train_sentencepiece_vocab(path, list(texts), workers)
    export_beside(paths.tokenizer_model)
    print(f"next: python tinystories.py pretokenize {same_flags()}")


def train_sentencepiece_vocab(path, texts, workers):
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"training {vocab_size} pieces on {n_bytes:,} bytes of text")
    model, about = train_sentencepiece(texts, vocab_size, workers)
    with atomic_write(path) as f:
        f.write(model)
    if not about["byte_fallback"]:
        print(
            f"note: {vocab_size} pieces have no room for the alphabet and 256 bytes, so characters "
            f"without a piece become <unk>"
        )
    if about["dropped"]:
        print(
            f"note: {about['n_dropped']:,} characters get no piece, because they are rare or "
            f"reserved: {about['dropped'][:100]!r}"
        )


def pretokenize_stage():
    paths = DataPaths(data_dir, vocab_source, vocab_size)
    hint = f"run: python tinystories.py train_vocab {same_flags()}"
    if paths.is_llama2:
        hint = (
            "copy Llama 2's tokenizer.model there (it comes with Meta's weights), or run: python "
            "tinystories.py train_vocab --vocab_size=4096"
        )
    tokenizer = tokenizer_to_encode(paths, encoder, hint)
    tokenizer.export(paths.tokenizer_bin)
    workers, files = worker_count(num_workers), plan_shards(*corpus())
    if orders:
        files = [file.labeled() for file in files]
    split = choose_split(files, valid_frac)
    about = {
        "valid_source": [os.path.abspath(corpus()[0])],
        "made_by": f"python tinystories.py pretokenize {same_flags()}{' --orders' * orders}",
    }
    made = orders_of(files, split) if orders else None
    write_shards(paths.shards, tokenizer, files, split, workers, about, encoder, orders=made)
    print(f"next: python train.py --minutes=10 {paths.flags()}")


def draft_stage():
    paths = DataPaths(data_dir, vocab_source, vocab_size)
    TokenData(paths, 1, check=False)  # says what to run if there are no shards
    tokenizer = open_tokenizer(paths.tokenizer_model)
    data, ids = TokenData(paths, 1, tokenizer), np.zeros(0, int)
    for shard in data.train:
        ids = np.append(ids, without_marks(shard[: MAX_TOKENS - len(ids)], data.mark))
    print(f"counting what follows in {len(ids):,} tokens", flush=True)
    n = write_draft(paths.draft, ids, tokenizer)
    print(f"{paths.draft} has guesses for {n:,} contexts")
    print(f"next: ./run out/model.bin --draft {shlex.quote(paths.draft)}")


def same_flags():
    """Return the flags that select the same corpus and vocabulary in the next command."""
    flags = [DataPaths(data_dir, vocab_source, vocab_size).flags()]
    for name in ("source", "valid_source", "valid_frac"):
        if value := globals()[name]:
            flags.append(f"--{name}={shlex.quote(str(value))}")
    return " ".join(flags)


def next_steps():
    print(f"next: python tinystories.py train_vocab {same_flags()}")


STAGES = {
    "download": download_stage,
    "synth": synth_stage,
    "train_vocab": train_vocab_stage,
    "pretokenize": pretokenize_stage,
    "draft": draft_stage,
}

if __name__ == "__main__":  # worker processes import this file again
    given = configure(globals(), positional="stage")
    if tokenizer not in ("", "sentencepiece", "bpe"):
        raise UserError(f"tokenizer = {tokenizer!r}: expected sentencepiece or bpe")
    if tokenizer:
        source_of = "bpe" if tokenizer == "bpe" else "custom"
        if "vocab_source" in given and vocab_source != source_of:
            raise UserError(
                f"tokenizer = {tokenizer} cannot be used with vocab_source = {vocab_source}: use "
                f"one of the two"
            )
        vocab_source = source_of
    if stage not in STAGES:
        problem = f"stage = {stage!r}" if stage else "the stage is missing"
        raise UserError(f"{problem}: expected one of {', '.join(STAGES)}")
    STAGES[stage]()
