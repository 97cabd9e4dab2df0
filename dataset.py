"""
Token shards for training: checked, memory-mapped and read in batches.

text/shards.py writes shards and describes their format. Shards made by llama2.c have no shards.json
and can be read too. The first shard by name is for validation.

Training reads windows of seq_len tokens. The order of the windows in an epoch is a permutation that
is computed, not stored, so the location of any window of any epoch is known at once. A run can
therefore continue anywhere, and any number of processes can share it.
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
from text.shards import mark_of_orders, read_sidecar, without_marks

TINYSTORIES = "TinyStories_all_data"
LLAMA2_VOCAB_SIZE = 32000
# custom: SentencePiece trained by tinystories.py; bpe: byte-level BPE trained by it; llama2: Meta's
VOCAB_SOURCES = ("custom", "bpe", "llama2")
CHUNK = 1 << 22  # ids that are read at a time to check a shard
STRESSED = 1 << 30  # the bit of targets that count more than once in the loss
SLOW_CHECK = 1 << 30  # bytes of shards; checking more than this shows a progress bar


class DataPaths:
    """The paths of a vocabulary and its shards in data_dir, as in llama2.c."""

    def __init__(self, data_dir, vocab_source, vocab_size):
        """
        vocab_source: one of VOCAB_SOURCES; "llama2", or a vocab_size of 0, means Llama 2's own
        vocabulary of 32,000 tokens.
        """
        if vocab_source not in VOCAB_SOURCES:
            choices = ", ".join(VOCAB_SOURCES)
            raise UserError(f"vocab_source = {vocab_source!r}: expected one of {choices}")
        if vocab_size < 0:
            raise UserError(
                f"vocab_size = {vocab_size}: expected 0 (Llama 2's) or the size of a vocabulary"
            )
        if vocab_source == "bpe" and vocab_size == 0:
            raise UserError(
                "vocab_size = 0 means Llama 2's vocabulary and cannot be used with vocab_source = "
                "'bpe': use another --vocab_size"
            )
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
        self.draft = os.path.join(data_dir, f"{name}.draft")  # see text/draft.py
        self.shards = self.stories if self.is_llama2 else os.path.join(data_dir, name)

    def other_shards_hint(self):
        """Return a hint for an error message: the flags of existing shards, or ""."""
        name, inside = os.path.basename(self.shards), glob.escape(self.data_dir)
        if sidecars := sorted(glob.glob(os.path.join(inside, "*", name, SIDECAR))):
            folder = os.path.dirname(os.path.dirname(sidecars[0]))
            return f"; or use existing shards with --data_dir={shlex.quote(folder)}"
        sidecars = glob.glob(os.path.join(inside, "*", SIDECAR))
        names = sorted(os.path.basename(os.path.dirname(path)) for path in sidecars)
        matches = [re.fullmatch(r"(bpe|tok)(\d+)", name) for name in names]
        flags = [
            f"--vocab_source={'bpe' if m[1] == 'bpe' else 'custom'} --vocab_size={m[2]}"
            for m in matches
            if m
        ]
        return f"; or use existing shards with {' or '.join(flags)}" if flags else ""

    @contextlib.contextmanager
    def new_tokenizer(self, overwrite):
        """
        Context manager for training a vocabulary; yields the path to write it to. At the end of the
        block, the new files replace tokenizer_model and its .vocab. Raises UserError if they differ
        from the vocabulary that the shards were made with, unless `overwrite` is true.
        """
        path = self.tokenizer_model
        in_use = is_model_of(self.shards, path)
        if in_use:
            fate = "will be replaced" if overwrite else "is replaced only with --overwrite"
            print(f"note: the shards in {self.shards} were made with {path}, which {fate}")
        os.makedirs(self.data_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.data_dir) as folder:
            new = os.path.join(folder, os.path.basename(path))
            yield new
            if in_use and not overwrite and not filecmp.cmp(new, path, shallow=False):
                raise UserError(
                    f"{path} already exists, differs from the new vocabulary, and is needed by the "
                    f"shards in {self.shards}; choose another --data_dir, or use --overwrite and "
                    f"pretokenize again"
                )
            for name in sorted(os.listdir(folder), reverse=True):  # .vocab before .model
                os.replace(os.path.join(folder, name), os.path.join(self.data_dir, name))

    def flags(self):
        """Return the flags that select this vocabulary and its folder, for a command line."""
        flags = []
        if self.vocab_source != "custom":
            flags.append(f"--vocab_source={self.vocab_source}")
        if not self.is_llama2:
            flags.append(f"--vocab_size={self.vocab_size}")
        if self.data_dir != "data":
            flags.append(f"--data_dir={shlex.quote(str(self.data_dir))}")
        return " ".join(flags)


def is_model_of(shards, tokenizer_model):
    """Return whether the shards in a folder were made with the tokenizer in a file."""
    if not os.path.isfile(tokenizer_model):
        return False
    with open(tokenizer_model, "rb") as f:
        expected = hashlib.sha256(f.read()).hexdigest()
    return (read_sidecar(shards) or {}).get("tokenizer_hash") == expected


class TokenData:
    """
    The shards of a folder, checked and memory-mapped: `train` and `valid` are lists of arrays, and
    `valid_bytes` is the size of the validation text in bytes (0 if unknown), without orders. `mark`
    is the bit of ids that belong to orders (0 if there are none).

    Raises UserError if the shards are missing, unfinished, damaged, made with another vocab_size or
    tokenizer, or shorter than a window of seq_len + 1 tokens. tokenizer: a Tokenizer; None: do not
    compare it. To check them, all shards are read once, unless `check` is False because another
    process does it.
    """

    def __init__(self, paths, seq_len, tokenizer=None, check=True):
        folder, vocab_size = paths.shards, paths.vocab_size
        command = f"python tinystories.py pretokenize {paths.flags()}"
        meta = read_sidecar(folder)
        if meta is None:
            entries, dtype = [{"name": n} for n in names_without_sidecar(paths, command)], "uint16"
        else:
            command = meta.get("made_by", command)
            entries, dtype = meta["shards"], meta["dtype"]
            check_sidecar(meta, folder, vocab_size, tokenizer, command)
        if tokenizer and tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"vocab_size = {vocab_size}: expected {tokenizer.vocab_size}, the size of "
                f"{tokenizer.model_path}"
            )
        width = np.dtype(dtype).itemsize
        self.mark = int(mark_of_orders(dtype)) if meta and meta.get("orders") else 0
        shards, crcs = [], []
        longest = max((entry.get("tokens", 0) for entry in entries[1:]), default=0)
        for i, entry in enumerate(entries):
            path = os.path.join(folder, entry["name"])
            if not os.path.exists(path):
                raise UserError(f"{path} does not exist; run: {command}")
            n_tokens = os.path.getsize(path) // width
            if not shard_size_fits(path, entry.get("tokens", n_tokens), width):
                raise UserError(f"{path} is damaged: its size is wrong; run: {command}")
            if n_tokens < seq_len + 1 and i and longest > seq_len:
                continue  # too short for a window, but another training shard is long enough
            if n_tokens < seq_len + 1:
                raise UserError(
                    f"max_seq_len = {seq_len} needs {seq_len + 1} tokens, but {path} has "
                    f"{n_tokens}: use a smaller --max_seq_len or more text"
                )
            shards.append(np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r"))
            crcs.append(entry.get("crc32"))
        self.shards, self.crcs, self.vocab_size, self.command = shards, crcs, vocab_size, command
        self.stamps = [stamp(shard.filename) for shard in shards]
        if check:
            self.check_contents(shards, crcs, vocab_size, command, self.mark)
        self.valid, self.train = shards[:1], shards[1:]
        self.valid_bytes = 0
        if meta:
            self.valid_bytes = meta["shards"][0]["bytes"]
        elif tokenizer:
            parts = np.split(self.valid[0], range(CHUNK, len(self.valid[0]), CHUNK))
            self.valid_bytes = sum(map(tokenizer.bytes_in, parts))

    @staticmethod
    def check_contents(shards, crcs, vocab_size, command, mark=0):
        """
        Read every shard; raise UserError for a wrong checksum or an id >= vocab_size. crcs: those
        that are not known, None, are filled in.
        """
        n_bytes = sum(shard.nbytes for shard in shards)
        bar = progress(
            total=n_bytes, unit="B", unit_scale=True, desc="check", disable=n_bytes < SLOW_CHECK
        )
        with bar:
            for i, (shard, expected) in enumerate(zip(shards, crcs, strict=True)):
                crc = 0
                # read as a file, because pages of a memory map count as this process's memory
                with open(shard.filename, "rb") as f:
                    while len(part := np.fromfile(f, shard.dtype, CHUNK)):
                        crc = zlib.crc32(part, crc)
                        bar.update(part.nbytes)
                        if (top := without_marks(part, mark).max()) >= vocab_size:
                            raise UserError(
                                f"{shard.filename} has token {top}: expected ids below "
                                f"vocab_size = {vocab_size}"
                            )
                if expected not in (None, crc):
                    raise UserError(
                        f"{shard.filename} is damaged: its checksum is wrong; run: {command}"
                    )
                crcs[i] = crc

    def check_unchanged(self, train=None):
        """
        Raise UserError if a shard has changed since it was opened: if the size or time of its file
        differs, and its contents do too. train: indices of the training shards to check; None: all.

        This misses a change that keeps size and time, and a change between the check and the next
        read. A file that is truncated at that moment still ends the process with SIGBUS, because it
        is mapped into memory.
        """
        numbers = range(len(self.shards)) if train is None else {1 + int(i) for i in train}
        for i in numbers:
            path, now = self.shards[i].filename, stamp(self.shards[i].filename)
            if now == self.stamps[i]:
                continue
            size, crc = self.stamps[i][0], self.crcs[i]  # crc: None if only another rank knows it
            is_same = now is not None and now[0] == size
            if not is_same or (crc is not None and checksum(path) != [size, crc]):
                raise UserError(f"{path} was changed or removed while in use; run: {self.command}")
            self.stamps[i] = now  # copied or touched

    def check_ids(self, batch):
        """Raise UserError for an id in a batch of targets that is not in the vocabulary."""
        if (top := int((batch & ~STRESSED).max())) >= self.vocab_size:
            raise UserError(
                f"a shard was changed while in use: it now has token {top}, expected ids below "
                f"vocab_size = {self.vocab_size}; run: {self.command}"
            )

    def tokens_per_byte(self):
        """Return validation tokens that are predicted, including BOS, per byte of text, or None."""
        return self.n_predicted / self.valid_bytes if self.valid_bytes else None

    @functools.cached_property
    def n_predicted(self):
        """The number of validation tokens that do not belong to orders."""
        if not self.mark:
            return sum(map(len, self.valid))
        return sum(int((shard < self.mark).sum()) for shard in self.valid)


def stamp(path):
    """Return (bytes, time of the last change in ns) of a file; None if it does not exist."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


def names_without_sidecar(paths, command):
    """Return the names of shards made by llama2.c; raise UserError if there are none."""
    if paths.vocab_source == "bpe":
        name = os.path.basename(os.path.abspath(paths.data_dir))
        command = f"python webtext.py prepare --source={name}, or {command}"
    if os.path.exists(os.path.join(paths.shards, PARTS)):
        raise UserError(f"{paths.shards} is not finished yet; run: {command}")
    names = sorted(glob.glob("*.bin", root_dir=paths.shards))
    if len(names) < 2:
        hint = paths.other_shards_hint()
        raise UserError(f"{paths.shards} has no token shards; run: {command}{hint}")
    return names


def check_sidecar(meta, folder, vocab_size, tokenizer, command):
    """Raise UserError unless the shards are finished and have this vocab_size and tokenizer."""
    if meta["vocab_size"] != vocab_size:
        raise UserError(
            f"vocab_size = {vocab_size}: expected {meta['vocab_size']}, as in the shards of "
            f"{folder}"
        )
    if not meta["complete"]:
        raise UserError(f"{folder} is not finished yet; run: {command}")
    if len(meta["shards"]) < 2:
        raise UserError(
            f"{folder} has only one shard: expected at least two, one of them for validation; use "
            f"more text"
        )
    if tokenizer and tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(
            f"{folder} was made with a tokenizer other than {tokenizer.model_path}; run: {command}"
        )


def mixed(x):
    """Hash uint64 numbers: spread each bit over all bits (the final steps of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(index, n, keys):
    """
    Apply a permutation of 0 .. n - 1 to the values of `index`, an int array, each in constant time.

    It is a Feistel network on a grid with n cells or a few more; a value that lands on an extra
    cell is sent through again (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    keys: an even number of uint64 round keys.
    """
    rows = math.isqrt(n - 1) + 1
    rows, columns = np.uint64(rows), np.uint64(-(-n // rows))
    x = np.asarray(index).astype(np.uint64)
    out = np.ones(x.shape, dtype=bool)
    while out.any():
        row, column = np.divmod(x[out], columns)
        for key, next_key in zip(keys[::2], keys[1::2], strict=True):
            row = (row + mixed(column + key) % rows) % rows
            column = (column + mixed(row + next_key) % columns) % columns
        x[out] = row * columns + column
        out = x >= n
    return x.astype(np.int64)


@functools.lru_cache(maxsize=2)
def round_keys(*seeds):
    """Return six keys for permuted(); with four, short epochs are not random enough."""
    return np.random.SeedSequence(seeds).generate_state(6, np.uint64)


class TrainBatches:
    """
    An endless stream of training sequences. Each epoch has every window of every shard once, in an
    order that depends only on (seed, epoch). So processes can share the stream by reading different
    positions, and a resumed run sees the same data. data: the TokenData of the shards, which checks
    them at each use. learns_orders: the tokens of orders are targets too. bos_id: the token that
    starts a document; in every epoch after the first, the documents of a shard are in another
    order, so that windows are cut at other places and a model cannot learn which document comes
    next. None: every epoch has the same windows.
    """

    def __init__(self, shards, seq_len, seed, data=None, learns_orders=False, bos_id=None):
        self.shards = [np.asarray(shard) for shard in shards]  # slicing a memmap is slow
        self.seq_len, self.seed, self.bos_id, self.data = seq_len, seed, bos_id, data
        self.mark, self.learns_orders = data.mark if data else 0, learns_orders
        counts = [(len(shard) - 1) // seq_len for shard in shards]
        self.ends = np.cumsum(counts)  # (n_shards,) number of windows up to the end of each shard
        self.n_windows = sum(counts)  # per epoch
        # below 1, because the end of a shard may be too short for a window
        self.coverage = self.n_windows * seq_len / sum(len(shard) - 1 for shard in shards)
        self.begins = {}  # of the documents of a shard: see documents()
        self.orders = {}

    def places(self, position, n, stride=1):
        """
        Return the start of each window at positions `position`, position + stride, ... of the
        stream: its epoch, its shard and its offset there, three int64 arrays (n,).
        """
        epochs, index = np.divmod(position + stride * np.arange(n), self.n_windows)
        for epoch in map(int, np.unique(epochs)):
            here = epochs == epoch
            index[here] = permuted(index[here], self.n_windows, round_keys(self.seed, epoch))
        shard = np.searchsorted(self.ends, index, side="right")
        before = np.concatenate([[0], self.ends])[shard]
        return epochs, shard, (index - before) * self.seq_len

    def documents(self, epoch, shard):
        """
        Return the documents of a shard in the order of an epoch: where each begins in the shard,
        where it ends there, and where it begins in the epoch, three int64 arrays (n,).
        """
        if shard not in self.begins:
            ids = without_marks(self.shards[shard], self.mark)
            begins = np.flatnonzero(ids == self.bos_id)
            self.begins[shard] = np.unique(np.append(begins, 0))
        if (epoch, shard) not in self.orders:
            # of the epoch before, the last windows may still be needed
            self.orders = {key: v for key, v in self.orders.items() if key[0] >= epoch - 1}
            begins, n = self.begins[shard], len(self.begins[shard])
            ends = np.append(begins[1:], len(self.shards[shard]))
            keys = round_keys(self.seed, epoch, shard + 1)
            order = permuted(np.arange(n), n, keys)
            begins, ends = begins[order], ends[order]
            # the beginning of the first one comes last, so that a long one is cut at other places
            cut = begins[0] + int(keys[0]) % min(self.seq_len, int(ends[0] - begins[0]))
            begins, ends = np.append(begins, begins[0]), np.append(ends, cut)
            begins[0] = cut
            starts = np.cumsum(ends - begins) - (ends - begins)
            self.orders[epoch, shard] = begins, ends, starts
        return self.orders[epoch, shard]

    def window(self, epoch, shard, start):
        """Return the seq_len + 1 tokens of a window, see places()."""
        stop = start + self.seq_len + 1
        if not epoch or self.bos_id is None:
            return self.shards[shard][start:stop]
        parts = []
        begins, ends, starts = self.documents(epoch, shard)
        first = np.searchsorted(starts, start, side="right") - 1
        for begin, end, place in zip(begins[first:], ends[first:], starts[first:], strict=True):
            if place >= stop:
                break
            part = slice(begin + max(0, start - place), min(end, begin + stop - place))
            parts.append(self.shards[shard][part])
        return np.concatenate(parts)

    def at(self, position, n, stride=1):
        """Return inputs and targets (n, seq_len) int64 of n windows, see places()."""
        places = self.places(position, n, stride)
        if self.data:
            self.data.check_unchanged(places[1])
        windows = [self.window(*map(int, place)) for place in zip(*places, strict=True)]
        how = {"mark": self.mark, "learns_orders": self.learns_orders, "stresses": True}
        x, y = gather(windows, n, self.seq_len, **how)
        if self.data:
            self.data.check_ids(y)
        return x, y


def prefetch(make, depth=4):
    """Yield make(0), make(1), ... without end; a thread prepares the next `depth` results."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        made = collections.deque(thread.submit(make, k) for k in range(depth))
        for k in itertools.count(depth):
            yield made.popleft().result()
            made.append(thread.submit(make, k))


def valid_windows(shards, seq_len):
    """
    Return the shard and the offset in it at which each validation window starts, in order: an int64
    array (n, 2). The last window of a shard may be shorter than seq_len.
    """
    return np.array(
        [
            (i, start)
            for i, shard in enumerate(shards)
            for start in range(0, len(shard) - 1, seq_len)
        ]
    )


def gather(windows, n, seq_len, mark=0, learns_orders=False, stresses=False):
    """
    Return inputs and targets (n, seq_len) int64 of n windows, each an array of up to seq_len + 1
    tokens; a missing target is -1. So are the tokens with the bit `mark`, which belong to orders,
    unless learns_orders. stresses: add the bit STRESSED to what is ordered, where the story first
    has it.
    """
    import torch  # here, because tinystories.py does not need it

    batch = np.full((n, seq_len + 1), -1, dtype=np.int64)
    for out, tokens in zip(batch, windows, strict=True):
        out[: len(tokens)] = tokens
    batch = torch.from_numpy(batch)
    x, y = batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()
    if mark:
        is_order, is_ordered = ((y >= 0) & (y & bit != 0) for bit in (mark, mark >> 1))
        x, y = without_marks(x, mark), torch.where(y < 0, y, without_marks(y, mark))
        if stresses:
            y[is_ordered] |= STRESSED
        if not learns_orders:
            y[is_order] = -1
    return x, y


class ValidBatches:
    """
    The fixed validation batches: all windows of the text in order, or evenly spaced ones if
    max_batches is too small for all. Yields inputs and targets (up to batch_size, seq_len) of every
    world_size-th batch, starting at `rank`. A rank with one batch fewer than the others also yields
    a batch without targets. mark: the bit of ids that belong to orders, which are no targets.
    """

    def __init__(self, shards, seq_len, batch_size, max_batches, rank=0, world_size=1, mark=0):
        self.shards, self.seq_len, self.size, self.mark = shards, seq_len, batch_size, mark
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
            windows = [self.shards[j][start : start + self.seq_len + 1] for j, start in rows]
            x, y = gather(windows, len(rows), self.seq_len, self.mark)
            if i > self.last:
                y[:] = -1
            yield x, y
