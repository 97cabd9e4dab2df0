"""
Token shards: how they are written, checked, and read in batches.

A shard is a bare array of ids, little-endian uint16 (uint32 where the vocabulary needs it), each
document behind a BOS. Beside the shards of a folder lies shards.json, which says what they hold;
shards made by llama2.c have none and are read as well. The first shard, by name, is validation;
no document of it is in the others.

Training reads windows of seq_len tokens. The order of an epoch is a permutation that is computed,
not stored: where any window of any epoch lies is known at once, so that a run can go on anywhere,
and any number of processes can share it.
"""

import collections
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import time
import zlib

import numpy as np
from tqdm import tqdm

from bpe import all_pieces, is_plain, texts_of
from configurator import UserError
from system.files import atomic_write, checksum, write_json
from system.workers import leave_ctrl_c, over_spans
from text.corpus import SIDECAR, Span, read_documents
from tokenizer import open_tokenizer

SIDECAR_FORMAT = 2
TINYSTORIES = "TinyStories_all_data"
LLAMA2_VOCAB_SIZE = 32000
# custom: SentencePiece, trained by tinystories.py; bpe: byte-level BPE, likewise; llama2: Meta's
VOCAB_SOURCES = ("custom", "bpe", "llama2")
FIRST_WORDS = 20  # by which a document is compared first
WHITE_SPACE = b" \t\n\v\f\r"
CHUNK = 1 << 22  # ids that are looked at together when a shard is checked
SAVE_INTERVAL = 1.0  # seconds between two writes of the sidecar
SLOW_CHECK = 1 << 30  # bytes of shards from which on checking them shows a progress bar


class DataPaths:
    """Where everything about one vocabulary lies below data_dir, as in llama2.c."""

    def __init__(self, data_dir, vocab_source, vocab_size):
        """
        vocab_source "llama2", or vocab_size 0, stands for Llama 2's own vocabulary of 32,000; "bpe"
        for byte-level BPE.
        """
        if vocab_source not in VOCAB_SOURCES:
            raise UserError(f"vocab_source = {vocab_source!r}: expected {', '.join(VOCAB_SOURCES)}")
        if vocab_size < 0:
            raise UserError(
                f"vocab_size = {vocab_size}: expected 0 (Llama 2's) or the size of a vocabulary"
            )
        if vocab_source == "bpe" and vocab_size == 0:
            raise UserError("vocab_size = 0 stands for Llama 2's vocabulary: give bpe a size")
        self.data_dir = data_dir
        self.vocab_source = "llama2" if vocab_size == 0 else vocab_source
        self.is_llama2 = self.vocab_source == "llama2"
        self.vocab_size = LLAMA2_VOCAB_SIZE if self.is_llama2 else vocab_size
        self.stories = os.path.join(data_dir, TINYSTORIES)
        name = {"llama2": "tokenizer", "bpe": f"bpe{vocab_size}"}.get(
            self.vocab_source, f"tok{vocab_size}"
        )
        self.tokenizer_model = os.path.join(data_dir, f"{name}.model")
        self.tokenizer_bin = os.path.join(data_dir, f"{name}.bin")
        self.shards = self.stories if self.is_llama2 else os.path.join(data_dir, name)

    def others(self):
        """What to say where data_dir has shards of other vocabularies; or ""."""
        found = glob.glob(os.path.join(glob.escape(self.data_dir), "*", SIDECAR))
        names = sorted(os.path.basename(os.path.dirname(path)) for path in found)
        matches = [re.fullmatch(r"(bpe|tok)(\d+)", name) for name in names]
        flags = [
            f"--vocab_source={'bpe' if m[1] == 'bpe' else 'custom'} --vocab_size={m[2]}"
            for m in matches
            if m
        ]
        return f"; {self.data_dir} has others: give {' or '.join(flags)}" if flags else ""

    def make_hint(self):
        """The flags that name this vocabulary and its folder on tinystories.py's command line."""
        flags = []
        if self.vocab_source != "custom":
            flags.append(f"--vocab_source={self.vocab_source}")
        if not self.is_llama2:
            flags.append(f"--vocab_size={self.vocab_size}")
        if self.data_dir != "data":
            flags.append(f"--data_dir={shlex.quote(str(self.data_dir))}")
        return " ".join(flags)


# ---- writing


def document_key(text):
    """16 bytes, the same for two documents that differ in the white space of ASCII alone."""
    return hashlib.blake2b(text.encode().translate(None, WHITE_SPACE), digest_size=16).digest()


class Documents:
    """A set of documents, compared without their white space."""

    def __init__(self, texts):
        self.keys, self.beginnings = set(), set()
        for text in texts:
            self.keys.add(document_key(text))
            self.beginnings.add(" ".join(text.split(None, FIRST_WORDS)[:FIRST_WORDS]))

    def __contains__(self, text):
        beginning = " ".join(text.split(None, FIRST_WORDS)[:FIRST_WORDS])
        return beginning in self.beginnings and document_key(text) in self.keys


@functools.cache
def documents_of(spans):
    return Documents(read_documents(spans))


@functools.cache
def cached_tokenizer(model_path):
    return open_tokenizer(model_path)


def id_type(tokenizer):
    """The smallest number format for the ids of a Tokenizer."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def write_shard(model_path, encoder, spans, path, dtype, held_out=()):
    """
    Encode the documents of some Spans into one shard, without those that are in the Spans of
    `held_out` too; returns what there is to say of it.
    """
    tokenizer = cached_tokenizer(model_path)
    encode = tokenizer.encoder(encoder)[1]
    parts, n_documents, n_bytes, n_held_out = [], 0, 0, 0
    documents, known = read_documents(spans), documents_of(tuple(held_out))
    while batch := list(itertools.islice(documents, 1024)):
        n_read = len(batch)
        batch = [text for text in batch if text not in known]
        n_held_out += n_read - len(batch)
        n_documents += len(batch)
        n_bytes += sum(len(text.encode()) for text in batch)
        parts.append(tokenizer.encode_flat(batch, encode).astype(dtype))
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
    if n_documents:
        with atomic_write(path) as f:
            tokens.tofile(f)
    n_unk = int((tokens == tokenizer.unk_id).sum()) if tokenizer.unk_id >= 0 else 0
    return {
        "documents": n_documents,
        "tokens": len(tokens),
        "bytes": n_bytes,
        "unk": n_unk,
        "held_out": n_held_out,
        "crc32": zlib.crc32(tokens),
    }


def write_shards(folder, tokenizer, plan, num_workers, encoder="auto"):
    """
    Encode a corpus, as plan_shards cut it, into the shards of a folder, with num_workers processes
    and an encoder of the tokenizer's.
    Training documents that are in the validation text as well are left out. A shard that the
    sidecar lists from the same text and tokenizer is kept. The sidecar is renewed every second, so
    that an interrupted run goes on where it was. Returns the finished sidecar.
    """
    dtype, encoder = id_type(tokenizer), tokenizer.encoder(encoder)[0]
    cached_tokenizer(tokenizer.model_path).encoder(encoder)  # which forked workers then have
    meta = {
        "format": SIDECAR_FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "tokenizer_hash": tokenizer.hash,
        "valid_source": [span.key() for span in plan[0]],
        "complete": False,
        "shards": [],
    }
    old = read_sidecar(folder) or {"shards": []}
    same = all(old.get(k) == meta[k] for k in ("format", "tokenizer_hash", "dtype", "valid_source"))
    kept = {tuple(s["source"]): s for s in old["shards"]} if same else {}
    width = max(2, len(str(len(plan) - 1)))
    done, todo = {}, []
    for i, spans in enumerate(plan):
        name, source = f"data{i:0{width}}.bin", [span.key() for span in spans]
        shard = kept.get(tuple(source))
        path = os.path.join(folder, name)
        if shard and shard["name"] == name and shard_is_whole(path, shard, dtype):
            done[i] = shard
        else:
            todo.append((i, name, source, spans))
    if done:
        print(f"{len(done)} of {len(plan)} shards are there already")

    check_documents(plan)  # before what is there is given up

    saved = -math.inf

    def save(interval=0.0):
        nonlocal saved
        meta["shards"] = [done[i] for i in sorted(done) if done[i]["documents"]]
        if time.monotonic() >= saved + interval:
            write_json(os.path.join(folder, SIDECAR), meta)
            saved = time.monotonic()

    os.makedirs(folder, exist_ok=True)
    save()
    n_bytes = sum(span.end - span.start for *_, spans in todo for span in spans)
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="pretokenize", disable=not todo)
    num_workers = min(num_workers, len(todo)) or 1
    with bar, concurrent.futures.ProcessPoolExecutor(num_workers, initializer=leave_ctrl_c) as pool:
        futures = {}
        for i, name, source, spans in todo:
            path, held_out = os.path.join(folder, name), tuple(plan[0]) if i else ()
            future = pool.submit(
                write_shard, tokenizer.model_path, encoder, spans, path, dtype, held_out
            )
            futures[future] = i, name, source, spans
        try:
            for future in concurrent.futures.as_completed(futures):
                i, name, source, spans = futures[future]
                done[i] = {"name": name, "source": source, **future.result()}
                save(SAVE_INTERVAL)
                bar.update(sum(span.end - span.start for span in spans))
        except Exception as e:
            pool.shutdown(wait=False, cancel_futures=True)
            save()
            raise UserError(
                f"shard {name} (from {spans[0].path}) failed: {str(e) or type(e).__name__}"
            ) from None
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            save()
            raise
    meta["held_out"] = sum(shard["held_out"] for shard in done.values())
    listed = {shard["name"] for shard in meta["shards"]}
    for shard in old["shards"]:  # left from a corpus with more shards
        if shard["name"] not in listed:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, shard["name"]))
    meta["complete"] = True
    save()
    return meta


def check_documents(plan):
    """Raise UserError where a corpus has no document to train on, or none for validation."""
    known = documents_of(tuple(plan[0]))
    if not known.keys:
        raise UserError(f"{plan[0][0].path} has no text for validation: only white space")
    texts = itertools.chain.from_iterable(map(read_documents, plan[1:]))
    first = next(texts, None)
    if first is None:
        raise UserError(f"{plan[1][0].path} has no text to train on: only white space")
    if first in known and all(text in known for text in texts):
        raise UserError(
            "every training document is in the validation text too: give another --valid_source"
        )


def report(meta, folder):
    """Print what write_shards() made."""
    counts = ("documents", "tokens", "bytes", "unk")
    total = {k: sum(s[k] for s in meta["shards"]) for k in counts}
    print(
        f"{total['documents']:,} documents, {total['tokens']:,} tokens, "
        f"{total['bytes'] / max(total['tokens'], 1):.2f} bytes a token, "
        f"in {len(meta['shards'])} shards in {folder}"
    )
    if meta["held_out"]:
        print(f"{meta['held_out']:,} training documents are in the validation text too: left out")
    if total["unk"]:
        print(f"{total['unk']:,} tokens are <unk>: characters that the vocabulary lacks")


def encode_span(span, model_path, encoder, dtype):
    """The ids of a Span: of a .txt file those of the text as it stands, else as in a shard."""
    tokenizer = cached_tokenizer(model_path)
    encode = tokenizer.encoder(encoder)[1]
    texts = list(texts_of(span))
    ids = encode(texts)[0] if is_plain(span.path) else tokenizer.encode_flat(texts, encode)
    return ids.astype(dtype)


def write_npy(path, tokenizer, files, num_workers, encoder="auto"):
    """
    Encode text files with a ByteLevel into one NumPy array of ids, piece by piece: .txt as they
    stand, with the special tokens in them, and the documents of others behind a BOS each. Returns
    how many ids there are, and their number format.
    """
    dtype, n = id_type(tokenizer), 0
    spans = [Span(file, 0, os.path.getsize(file)) for file in files]
    spans = all_pieces(spans, list(tokenizer.bpe.special))
    words = tokenizer.model_path, tokenizer.encoder(encoder)[0], dtype
    cached_tokenizer(tokenizer.model_path).encoder(words[1])  # which forked workers then have
    header = {"descr": np.dtype(dtype).str, "fortran_order": False}
    with atomic_write(path) as f:
        np.lib.format.write_array_header_1_0(f, header | {"shape": (0,)})
        begin = f.tell()
        for ids in over_spans(encode_span, spans, words, num_workers, "encode"):
            ids.tofile(f)
            n += len(ids)
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, header | {"shape": (n,)})
        assert f.tell() == begin  # numpy leaves room for any number
        f.seek(0, os.SEEK_END)
    return n, dtype


def shard_is_whole(path, shard, dtype):
    size = shard["tokens"] * np.dtype(dtype).itemsize
    return os.path.exists(path) and checksum(path) == [size, shard["crc32"]]


def shard_size_fits(path, n_tokens, dtype):
    return os.path.exists(path) and os.path.getsize(path) == n_tokens * np.dtype(dtype).itemsize


# ---- reading


def read_sidecar(folder):
    """What shards.json of a folder says, or None where there is none."""
    path = os.path.join(folder, SIDECAR)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        if meta["format"] > SIDECAR_FORMAT:
            raise UserError(f"{path} was written by a newer version of this program")
        fields = [meta[k] for k in ("vocab_size", "tokenizer_hash", "complete")]
        fields += [s[k] for s in meta["shards"] for k in ("name", "source", "documents", "bytes")]
        names = [s["name"] for s in meta["shards"]]
        if meta["dtype"] not in ("uint16", "uint32") or names != list(map(os.path.basename, names)):
            raise ValueError
        return meta
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it and pretokenize again") from None


class TokenData:
    """
    The shards of a folder, checked and memory-mapped: `train` and `valid` are lists of arrays, and
    `valid_bytes` is the bytes of text behind the validation tokens (0 where that is unknown).

    Raises UserError, before anything is trained, where the shards are absent, incomplete, of
    another vocabulary than `vocab_size`, of another tokenizer than `tokenizer` (a Tokenizer or
    None), damaged, or shorter than the seq_len + 1 tokens that one window needs. The contents are
    read once to be sure of that, unless `check` is False because another process does it.
    """

    def __init__(self, paths, seq_len, tokenizer=None, check=True):
        folder, vocab_size = paths.shards, paths.vocab_size
        again = f"python tinystories.py pretokenize {paths.make_hint()}"
        again_or_web = f"make them with: {again}"
        if paths.vocab_source == "bpe":
            name = os.path.basename(os.path.abspath(paths.data_dir))
            again_or_web = f"make them with: python webtext.py prepare --source={name}, or {again}"
        meta = read_sidecar(folder)
        if meta is None:
            names = sorted(map(os.path.basename, glob.glob(os.path.join(folder, "*.bin"))))
            if len(names) < 2:
                raise UserError(f"{folder} has no token shards; {again_or_web}{paths.others()}")
            dtype = "uint16"
        else:
            names, dtype = [s["name"] for s in meta["shards"]], meta["dtype"]
            again = meta.get("made_by", again)
            if meta["vocab_size"] != vocab_size:
                raise UserError(
                    f"vocab_size = {vocab_size}, but the shards in {folder} "
                    f"have a vocabulary of {meta['vocab_size']}"
                )
            if not meta["complete"]:
                raise UserError(f"{folder} is not finished yet; run: {again}")
            if len(names) < 2:
                raise UserError(
                    f"{folder} has {len(names)} shard with a document in it, and needs one for "
                    f"validation and one to train on: give more text"
                )
            if tokenizer and tokenizer.hash != meta["tokenizer_hash"]:
                raise UserError(
                    f"{folder} was made with another tokenizer than "
                    f"{tokenizer.model_path} is now; run: {again}"
                )
        if tokenizer and tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"vocab_size = {vocab_size}, but {tokenizer.model_path} has {tokenizer.vocab_size}"
            )
        shards, crcs = [], []
        longest = max((s["tokens"] for s in meta["shards"][1:]), default=0) if meta else 0
        for i, name in enumerate(names):
            path = os.path.join(folder, name)
            size = os.path.getsize(path) if os.path.exists(path) else 0
            n_tokens = size // np.dtype(dtype).itemsize
            expected = meta["shards"][i]["tokens"] if meta else n_tokens
            if not shard_size_fits(path, expected, dtype):
                raise UserError(f"shard {path} is missing or damaged; run: {again}")
            if n_tokens < seq_len + 1 and i and longest > seq_len:
                continue  # no window of it, but of others: the rest of a file, or a small one
            if n_tokens < seq_len + 1:
                raise UserError(
                    f"shard {path} has {n_tokens} tokens, and max_seq_len = {seq_len} needs "
                    f"{seq_len + 1}: give more text or a smaller --max_seq_len"
                )
            shards.append(np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r"))
            crcs.append(meta["shards"][i].get("crc32") if meta else None)
        if check:
            self.check_contents(shards, crcs, vocab_size, again)
        self.valid, self.train = shards[:1], shards[1:]
        self.valid_bytes = 0
        if meta:
            self.valid_bytes = meta["shards"][0]["bytes"]
        elif tokenizer:
            self.valid_bytes = sum(map(tokenizer.bytes_in, chunks(self.valid[0])))

    @staticmethod
    def check_contents(shards, crcs, vocab_size, again):
        """Read every shard through: raise UserError for changed bytes or an id >= vocab_size."""
        n_bytes = sum(shard.nbytes for shard in shards)
        bar = tqdm(
            total=n_bytes, unit="B", unit_scale=True, desc="check", disable=n_bytes < SLOW_CHECK
        )
        with bar:
            for shard, expected in zip(shards, crcs, strict=True):
                crc = 0
                # read as a file: touched pages of a memory map count as this process's memory
                with open(shard.filename, "rb") as f:
                    while len(part := np.fromfile(f, shard.dtype, CHUNK)):
                        crc = zlib.crc32(part, crc)
                        bar.update(part.nbytes)
                        if (top := part.max()) >= vocab_size:
                            raise UserError(
                                f"vocab_size = {vocab_size}, but {shard.filename} has a token {top}"
                            )
                if expected not in (None, crc):
                    raise UserError(
                        f"shard {shard.filename} has changed; make it anew with: {again}"
                    )

    def tokens_per_byte(self):
        """Validation tokens a byte of text, BOS counted; None where the bytes are unknown."""
        n_tokens = sum(map(len, self.valid))
        return n_tokens / self.valid_bytes if self.valid_bytes else None


def chunks(shard):
    return (shard[i : i + CHUNK] for i in range(0, len(shard), CHUNK))


def mixed(x):
    """Every bit of uint64 numbers spread over all of them (SplitMix64's last steps)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(index, n, keys):
    """
    Where a permutation of 0 .. n - 1 sends the numbers of `index`, an int array, computed for each
    alone in constant time: a Feistel network whose round keys are `keys`, an even number of uint64,
    on a rectangle of n or a few more cells; what falls on one of those is sent on until it does not
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    rows = math.isqrt(n - 1) + 1
    rows, columns = np.uint64(rows), np.uint64(-(-n // rows))
    x = np.asarray(index).astype(np.uint64)
    out = np.ones(x.shape, dtype=bool)
    while out.any():
        row, column = np.divmod(x[out], columns)
        for key, next_key in zip(keys[::2], keys[1::2], strict=True):
            row = (row + mixed(column + key)) % rows
            column = (column + mixed(row + next_key)) % columns
        x[out] = row * columns + column
        out = x >= n
    return x.astype(np.int64)


@functools.lru_cache(maxsize=2)
def round_keys(seed, epoch):
    """Six keys for permuted(): with four, neighbours of short epochs can still be told."""
    return np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)


class TrainBatches:
    """
    An endless stream of training sequences. Each epoch has every window of every shard once, in an
    order that (seed, epoch) decides. What a position of the stream holds depends on nothing else,
    so that processes share it by taking different positions, and a resumed run sees the same data.
    """

    def __init__(self, shards, seq_len, seed):
        self.shards = [np.asarray(shard) for shard in shards]  # slices of a memmap are slow to make
        self.seq_len, self.seed = seq_len, seed
        counts = [(len(shard) - 1) // seq_len for shard in shards]
        self.ends = np.cumsum(counts)  # (n_shards,) number of windows up to the end of each shard
        self.n_windows = sum(counts)  # of an epoch
        # What is left over at the end of a shard makes no window
        self.coverage = self.n_windows * seq_len / sum(len(shard) - 1 for shard in shards)

    def places(self, position, n, stride=1):
        """
        Shard numbers and first tokens, two int64 arrays (n,), of the windows at position,
        position + stride, ... of the stream.
        """
        epochs, index = np.divmod(position + stride * np.arange(n), self.n_windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = permuted(index[here], self.n_windows, round_keys(self.seed, int(epoch)))
        shard = np.searchsorted(self.ends, index, side="right")
        before = np.concatenate([[0], self.ends])[shard]
        return shard, (index - before) * self.seq_len

    def at(self, position, n, stride=1):
        """Inputs and targets (n, seq_len) int64 of the windows that places() tells."""
        return gather(
            self.shards, zip(*self.places(position, n, stride), strict=True), n, self.seq_len
        )


def ahead(make, depth=4):
    """Yield make(0), make(1), ... for ever, the next `depth` of them being made in a thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        made = collections.deque(thread.submit(make, k) for k in range(depth))
        for k in itertools.count(depth):
            yield made.popleft().result()
            made.append(thread.submit(make, k))


def valid_windows(shards, seq_len):
    """
    Shard number and first token, an int64 array (n, 2), of all windows of the validation text in
    order; the last of a shard may be partial.
    """
    return np.array(
        [
            (i, start)
            for i, shard in enumerate(shards)
            for start in range(0, len(shard) - 1, seq_len)
        ]
    )


def gather(shards, places, n, seq_len):
    """Inputs and targets, tensors (n, seq_len) int64, of n windows; -1 where a target lacks."""
    import torch  # here, so that tinystories.py starts without it

    batch = np.full((n, seq_len + 1), -1, dtype=np.int64)
    for out, (i, start) in zip(batch, places, strict=True):
        tokens = shards[i][start : start + seq_len + 1]
        out[: len(tokens)] = tokens
    batch = torch.from_numpy(batch)
    return batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()


def valid_batches(shards, seq_len, batch_size, max_batches, rank=0, world_size=1):
    """
    The fixed validation batches: all windows of the text in order where max_batches hold them, else
    as many of them, evenly spaced. Yields inputs and targets (up to batch_size, seq_len) of every
    world_size-th batch from `rank` on; one without targets where a rank has one less than others.
    """
    places = valid_windows(shards, seq_len)
    if len(places) > max_batches * batch_size:
        places = places[np.linspace(0, len(places) - 1, max_batches * batch_size).astype(int)]
    n_batches = -(-len(places) // batch_size)
    for first in range(0, n_batches, world_size):
        mine = min(first + rank, n_batches - 1)
        rows = places[mine * batch_size : (mine + 1) * batch_size]
        x, y = gather(shards, rows, len(rows), seq_len)
        if mine < first + rank:
            y[:] = -1
        yield x, y
