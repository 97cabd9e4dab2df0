"""
Token shards as training reads them: checked, memory-mapped, in batches.

text/shards.py writes them and says what they are. Shards made by llama2.c have no shards.json and
are read as well. The first shard, by name, is for validation.

Training reads windows of seq_len tokens. The order of an epoch is a permutation that is computed,
not stored: where any window of any epoch lies is known at once, so that a run can continue
anywhere, and any number of processes can share it.
"""

import collections
import concurrent.futures
import contextlib
import filecmp
import functools
import glob
import hashlib
import itertools
import math
import os
import re
import shlex
import tempfile
import zlib

import numpy as np

from configurator import UserError
from system.files import checksum
from system.progress import progress
from text.corpus import SIDECAR
from text.pieces import PARTS, shard_size_fits
from text.shards import read_sidecar

TINYSTORIES = "TinyStories_all_data"
LLAMA2_VOCAB_SIZE = 32000
# custom: SentencePiece, trained by tinystories.py; bpe: byte-level BPE, likewise; llama2: Meta's
VOCAB_SOURCES = ("custom", "bpe", "llama2")
CHUNK = 1 << 22  # ids that are looked at together when a shard is checked
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
        """What to say where a folder in data_dir has these shards, or it has others; or ""."""
        name, inside = os.path.basename(self.shards), glob.escape(self.data_dir)
        if found := sorted(glob.glob(os.path.join(inside, "*", name, SIDECAR))):
            folder = os.path.dirname(os.path.dirname(found[0]))
            return f"; or give --data_dir={shlex.quote(folder)}, which has some"
        found = glob.glob(os.path.join(inside, "*", SIDECAR))
        names = sorted(os.path.basename(os.path.dirname(path)) for path in found)
        matches = [re.fullmatch(r"(bpe|tok)(\d+)", name) for name in names]
        flags = [
            f"--vocab_source={'bpe' if m[1] == 'bpe' else 'custom'} --vocab_size={m[2]}"
            for m in matches
            if m
        ]
        return f"; {self.data_dir} has others: give {' or '.join(flags)}" if flags else ""

    @contextlib.contextmanager
    def new_tokenizer(self, overwrite):
        """
        For a block that trains a vocabulary: the path to write it to. After the block, what was
        written there and beside it replaces tokenizer_model and its .vocab. Raises UserError where
        the shards were made with another vocabulary, unless `overwrite` is true.
        """
        path = self.tokenizer_model
        in_use = is_model_of(self.shards, path)
        if in_use:
            fate = "will be replaced" if overwrite else "is replaced only with --overwrite"
            print(f"note: {path}, which the shards in {self.shards} were made with, {fate}")
        os.makedirs(self.data_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.data_dir) as folder:
            new = os.path.join(folder, os.path.basename(path))
            yield new
            if in_use and not overwrite and not filecmp.cmp(new, path, shallow=False):
                raise UserError(
                    f"the new vocabulary differs from {path}, and the shards in {self.shards} were "
                    f"made with that: nothing is changed; give --overwrite, and pretokenize again, "
                    f"or another --data_dir"
                )
            for name in sorted(os.listdir(folder), reverse=True):  # a .vocab before the .model
                os.replace(os.path.join(folder, name), os.path.join(self.data_dir, name))

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


def is_model_of(shards, tokenizer_model):
    """Whether the shards in a folder were made with the tokenizer in a file."""
    if not os.path.isfile(tokenizer_model):
        return False
    with open(tokenizer_model, "rb") as f:
        expected = hashlib.sha256(f.read()).hexdigest()
    return (read_sidecar(shards) or {}).get("tokenizer_hash") == expected


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
        meta = read_sidecar(folder)
        if meta is None:
            listed, dtype = [{"name": n} for n in names_without_sidecar(paths, again)], "uint16"
        else:
            again = meta.get("made_by", again)
            listed, dtype = meta["shards"], meta["dtype"]
            check_sidecar(meta, folder, vocab_size, tokenizer, again)
        if tokenizer and tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"vocab_size = {vocab_size}, but {tokenizer.model_path} has {tokenizer.vocab_size}"
            )
        width = np.dtype(dtype).itemsize
        shards, crcs = [], []
        longest = max((entry.get("tokens", 0) for entry in listed[1:]), default=0)
        for i, entry in enumerate(listed):
            path = os.path.join(folder, entry["name"])
            n_tokens = (os.path.getsize(path) if os.path.exists(path) else 0) // width
            if not shard_size_fits(path, entry.get("tokens", n_tokens), width):
                raise UserError(f"shard {path} is missing or damaged; run: {again}")
            if n_tokens < seq_len + 1 and i and longest > seq_len:
                continue  # no window of it, but of others: the rest of a file, or a small one
            if n_tokens < seq_len + 1:
                raise UserError(
                    f"shard {path} has {n_tokens} tokens, and max_seq_len = {seq_len} needs "
                    f"{seq_len + 1}: give more text or a smaller --max_seq_len"
                )
            shards.append(np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r"))
            crcs.append(entry.get("crc32"))
        self.shards, self.crcs, self.vocab_size, self.again = shards, crcs, vocab_size, again
        self.stamps = [stamp(shard.filename) for shard in shards]
        if check:
            self.check_contents(shards, crcs, vocab_size, again)
        self.valid, self.train = shards[:1], shards[1:]
        self.valid_bytes = 0
        if meta:
            self.valid_bytes = meta["shards"][0]["bytes"]
        elif tokenizer:
            parts = np.split(self.valid[0], range(CHUNK, len(self.valid[0]), CHUNK))
            self.valid_bytes = sum(map(tokenizer.bytes_in, parts))

    @staticmethod
    def check_contents(shards, crcs, vocab_size, again):
        """Read every shard through: raise UserError for changed bytes or an id >= vocab_size."""
        n_bytes = sum(shard.nbytes for shard in shards)
        bar = progress(
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
                        f"shard {shard.filename} has changed; make it again with: {again}"
                    )

    def check_unchanged(self, train=None):
        """
        Raise UserError if the file of a shard has another size or time than when it was opened, and
        not the same contents. train: numbers of the training shards to look at; None: all shards.

        This cannot see a change that keeps size and time, nor one between the check and the
        reading that follows. A shard that is cut short in that moment still ends the process with
        SIGBUS, since it is mapped into memory.
        """
        numbers = range(len(self.shards)) if train is None else {1 + int(i) for i in train}
        for i in numbers:
            path, now = self.shards[i].filename, stamp(self.shards[i].filename)
            if now == self.stamps[i]:
                continue
            known = self.stamps[i][0], self.crcs[i]  # size and CRC-32
            if now is None or now[0] != known[0] or checksum(path) != list(known):
                raise UserError(
                    f"shard {path} was changed or removed while it was in use; make it again with: "
                    f"{self.again}"
                )
            self.stamps[i] = now  # copied or touched

    def check_ids(self, batch):
        """Raise UserError for an id in a batch that the vocabulary lacks."""
        if (top := int(batch.max())) >= self.vocab_size:
            raise UserError(
                f"vocab_size = {self.vocab_size}, but a shard now has a token {top}: it was "
                f"changed while it was in use; make it again with: {self.again}"
            )

    def tokens_per_byte(self):
        """Validation tokens a byte of text, BOS counted; None where the bytes are unknown."""
        n_tokens = sum(map(len, self.valid))
        return n_tokens / self.valid_bytes if self.valid_bytes else None


def stamp(path):
    """(size in bytes, time of the last change in ns) of a file; None if it is not there."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


def names_without_sidecar(paths, again):
    """The shards of a folder that llama2.c made. Raises UserError if there are none."""
    again = f"make them with: {again}"
    if paths.vocab_source == "bpe":
        name = os.path.basename(os.path.abspath(paths.data_dir))
        again = again.replace(": ", f": python webtext.py prepare --source={name}, or ", 1)
    if os.path.exists(os.path.join(paths.shards, PARTS)):
        raise UserError(f"{paths.shards} is not finished yet; {again}")
    names = sorted(glob.glob("*.bin", root_dir=paths.shards))
    if len(names) < 2:
        raise UserError(f"{paths.shards} has no token shards; {again}{paths.others()}")
    return names


def check_sidecar(meta, folder, vocab_size, tokenizer, again):
    """Raise UserError unless the shards are finished, and of this vocabulary and tokenizer."""
    if meta["vocab_size"] != vocab_size:
        raise UserError(
            f"vocab_size = {vocab_size}, but the shards in {folder} "
            f"have a vocabulary of {meta['vocab_size']}"
        )
    if not meta["complete"]:
        raise UserError(f"{folder} is not finished yet; run: {again}")
    if len(meta["shards"]) < 2:
        raise UserError(
            f"{folder} has {len(meta['shards'])} shard with a document in it, and needs one for "
            f"validation and one to train on: give more text"
        )
    if tokenizer and tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(
            f"{folder} was made with another tokenizer than "
            f"{tokenizer.model_path} is now; run: {again}"
        )


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
    data: the TokenData that the shards are from, which checks them at each use.
    """

    def __init__(self, shards, seq_len, seed, data=None):
        self.shards = [np.asarray(shard) for shard in shards]  # slices of a memmap are slow to make
        self.seq_len, self.seed, self.data = seq_len, seed, data
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
        shard, start = self.places(position, n, stride)
        if self.data:
            self.data.check_unchanged(shard)
        x, y = gather(self.shards, zip(shard, start, strict=True), n, self.seq_len)
        if self.data:
            self.data.check_ids(y)
        return x, y


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


class ValidBatches:
    """
    The fixed validation batches: all windows of the text in order where max_batches hold them, else
    as many of them, evenly spaced. Yields inputs and targets (up to batch_size, seq_len) of every
    world_size-th batch from `rank` on; one without targets where a rank has one less than others.
    """

    def __init__(self, shards, seq_len, batch_size, max_batches, rank=0, world_size=1):
        self.shards, self.seq_len, self.size = shards, seq_len, batch_size
        places = valid_windows(shards, seq_len)
        if len(places) > max_batches * batch_size:
            places = places[np.linspace(0, len(places) - 1, max_batches * batch_size).astype(int)]
        self.places = places
        n_batches = -(-len(places) // batch_size)
        self.wanted = [first + rank for first in range(0, n_batches, world_size)]
        self.last = n_batches - 1

    def __len__(self):
        return len(self.wanted)

    def __iter__(self):
        for i in self.wanted:
            rows = self.places[min(i, self.last) * self.size :][: self.size]
            x, y = gather(self.shards, rows, len(rows), self.seq_len)
            if i > self.last:
                y[:] = -1
            yield x, y
