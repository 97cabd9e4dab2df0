"""
The work of webtext.py prepare, in parts that machines share: files of text are cut into pieces, the
documents of a piece into batches for workers to encode; each piece becomes an array of ids for
training and one for validation, and all machines' pieces together one set of shards.
"""

import contextlib
import functools
import glob
import math
import os
import time
import zlib
from dataclasses import dataclass

import numpy as np

from configurator import UserError
from dataset import (
    SAVE_INTERVAL,
    SIDECAR_FORMAT,
    Documents,
    cached_tokenizer,
    document_key,
    id_type,
    shard_is_whole,
    shard_size_fits,
)
from system.files import atomic_write, read_json, write_json
from text.corpus import SEPARATOR, stream_documents

MTIME = "changed "  # begins the version of a file here, which copies elsewhere need not share
PIECE = 1 << 27  # characters of text, at least, in a shard, but for the last of a file
BATCH = 1 << 20  # characters that a worker encodes at a time
COUNTS = ("documents", "tokens", "bytes", "unk", "held_out")


@dataclass(frozen=True)
class File:
    """A file of text: here at `path`, or there at `url` until it is downloaded to `path`."""

    name: str
    size: int  # bytes
    version: str  # changes when the content does
    path: str
    url: str = ""
    is_valid: bool = False  # all of it is for validation

    def key(self):
        return [self.name, self.size, self.version]


@dataclass(frozen=True)
class Batch:
    """Some documents of a file, in the shard `piece` of it, with how much of it is read, bytes."""

    file: File
    piece: int
    texts: list
    read: int
    is_last: bool = False  # of its file: without texts, and `piece` is how many there are


def batches_of(file, wanted):
    """Yield the Batches of a file whose number of a piece is `wanted`, and a last one."""
    piece, texts, n_batch, n_piece, at, text = 0, [], 0, 0, 0, ""
    for text, at in stream_documents(file.path):
        if n_piece >= PIECE:
            if texts:
                yield Batch(file, piece, texts, at)
            piece, texts, n_batch, n_piece = piece + 1, [], 0, 0
        n_piece += len(text)
        if wanted(piece):
            texts.append(text)
            n_batch += len(text)
            if n_batch >= BATCH:
                yield Batch(file, piece, texts, at)
                texts, n_batch = [], 0
    if texts:
        yield Batch(file, piece, texts, at)
    yield Batch(file, piece + bool(text), [], file.size, is_last=True)


@functools.cache
def known_documents(paths):
    """The Documents of validation files."""
    return Documents(text for path in paths for text, _ in stream_documents(path))


def is_for_validation(text, frac):
    """By a hash of the text, so that all copies of a document fall on one side."""
    return int.from_bytes(document_key(text)[:8], "little") < frac * 2**64


def encode_batch(batch, model_path, encoder, dtype, frac, valid_paths):
    """
    The ids of a Batch for training and for validation, two arrays, and of each its COUNTS. Where
    there are files for validation, training documents that are in them are left out; else a part
    `frac` of all is for validation.
    """
    tokenizer = cached_tokenizer(model_path)
    encode = tokenizer.encoder(encoder)[1]
    parts, n_held_out = {False: [], True: []}, 0
    for text in batch.texts:
        if not valid_paths:
            parts[is_for_validation(text, frac)].append(text)
        elif batch.file.is_valid or text not in known_documents(valid_paths):
            parts[batch.file.is_valid].append(text)
        else:
            n_held_out += 1
    found = []
    for is_valid, texts in parts.items():
        ids = tokenizer.encode_flat(texts, encode).astype(dtype)
        n_unk = int((ids == tokenizer.unk_id).sum()) if tokenizer.unk_id >= 0 else 0
        n_bytes = sum(len(text.encode()) for text in texts)
        counts = len(texts), len(ids), n_bytes, n_unk, 0 if is_valid else n_held_out
        found.append((ids, dict(zip(COUNTS, counts, strict=True))))
    return found


class Part:
    """
    What one machine has done, in parts/I_of_N.json: the pieces of each file, the arrays of its
    validation documents beside it, and those of training beside shards.json. Parts of another
    tokenizer, split or way to share the work are begun anew. by_file: each machine has files of its
    own, since there are enough; else every n-th piece of each.
    """

    def __init__(self, shards_folder, i, n, tokenizer, files, split, by_file):
        self.folder, self.i, self.n, self.by_file = shards_folder, i, n, by_file
        self.saved = -math.inf
        self.parts = os.path.join(shards_folder, "parts")
        self.path = os.path.join(self.parts, f"{i}_of_{n}.json")
        self.lock()
        self.dtype = id_type(tokenizer)
        about = {
            "format": SIDECAR_FORMAT,
            "vocab_size": tokenizer.vocab_size,
            "dtype": self.dtype,
            "tokenizer_hash": tokenizer.hash,
            "split": split,
            "by_file": by_file,
            "piece": PIECE,
        }
        self.meta = {
            **about,
            "files": {str(k): file.key() for k, file in enumerate(files)},
            "pieces": {},  # {file: [{"piece", "train": {...}, "valid": {...}}]}
            "finished": {},  # {file that this machine has read: how many pieces it has}
            "complete": False,
        }
        # what a damaged file leads to is open-ended: then all of it is done again
        with contextlib.suppress(UserError, FileNotFoundError, KeyError, TypeError, AttributeError):
            self.keep(read_json(self.path), about, files)
        self.save()

    def lock(self):
        """Until the process ends; UserError where another one does the same part."""
        os.makedirs(self.parts, exist_ok=True)
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            self.locked = open(f"{self.path}.lock", "w")  # noqa: SIM115
            try:
                fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another prepare is writing to {self.folder}: wait for it, or give another "
                    f"--data_dir"
                ) from None
            except OSError:  # a file system without locks
                pass

    def keep(self, old, about, files):
        """Take over what an earlier run has done of the same work."""
        if any(old.get(name) != value for name, value in about.items()):
            return
        for k, file in enumerate(files):
            if old["files"].get(str(k)) != file.key():
                continue
            found = {piece["piece"]: piece for piece in old["pieces"].get(str(k), [])}
            whole = [piece for piece in found.values() if self.is_whole(k, piece)]
            n_pieces = old["finished"].get(str(k))
            if whole:
                self.meta["pieces"][str(k)] = whole
            if n_pieces is not None and sum(map(self.is_mine(k), range(n_pieces))) == len(whole):
                self.meta["finished"][str(k)] = n_pieces

    def save(self, interval=0.0):
        if time.monotonic() >= self.saved + interval:
            write_json(self.path, self.meta)
            self.saved = time.monotonic()

    def name(self, k, piece, is_valid):
        name = f"data_{k:05}_{piece:04}.bin"
        return os.path.join(self.parts if is_valid else self.folder, name)

    def is_whole(self, k, piece):
        return all(
            not piece[side]["tokens"]
            or shard_is_whole(
                self.name(k, piece["piece"], side == "valid"), piece[side], self.dtype
            )
            for side in ("train", "valid")
        )

    def is_mine(self, k):
        """A function that says whether piece p of file k is this machine's."""
        return lambda p: (k if self.by_file else k + p) % self.n == self.i

    def todo(self, files):
        """{File: function that says of a piece whether it is to be done} of this machine."""
        found = {}
        for k, file in enumerate(files):
            if str(k) in self.meta["finished"] or (self.by_file and not self.is_mine(k)(0)):
                continue
            found[file] = self.wanted(k)
        return found

    def wanted(self, k):
        """A function that says whether piece p of file k is this machine's and not done."""
        is_mine = self.is_mine(k)
        done = {piece["piece"] for piece in self.meta["pieces"].get(str(k), [])}
        return lambda p: is_mine(p) and p not in done

    def add(self, k, piece, results):
        """Write what the batches of a piece came to."""
        entry = {"piece": piece}
        for is_valid, side in enumerate(("train", "valid")):
            arrays = [result[is_valid][0] for result in results]
            ids = np.concatenate([np.empty(0, self.dtype), *arrays])
            counts = {c: sum(result[is_valid][1][c] for result in results) for c in COUNTS}
            if len(ids):
                with atomic_write(self.name(k, piece, is_valid)) as f:
                    f.write(ids)  # tofile() does not say that a disk is full
            entry[side] = {**counts, "crc32": zlib.crc32(ids)}
        self.meta["pieces"].setdefault(str(k), []).append(entry)
        self.save(SAVE_INTERVAL)

    def finish(self, k, n_pieces):
        self.meta["finished"][str(k)] = n_pieces
        self.save(SAVE_INTERVAL)


@contextlib.contextmanager
def saved_at_end(part):
    """Save a Part whatever ends the block."""
    try:
        yield
    finally:
        part.save()


def merge(shards_folder, n):
    """
    Make data00.bin, for validation, of the parts of n machines. Returns what shards.json is to say:
    a dict of what the parts share, its entries, and how many documents were held out. Raises
    UserError where a part is missing, not finished, damaged, or of other work than the others.
    """
    parts = [os.path.join(shards_folder, "parts", f"{i}_of_{n}.json") for i in range(n)]
    if missing := [path for path in parts if not os.path.exists(path)]:
        there = sorted(glob.glob(os.path.join(glob.escape(shards_folder), "parts", "*.json")))
        raise UserError(
            f"{missing[0]} does not exist; there {'are' if there else 'is'} "
            f"{', '.join(map(os.path.basename, there)) or 'no part'}: prepare the missing ones"
        )
    try:
        return merge_parts(shards_folder, parts, [read_json(path) for path in parts])
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(f"a file of {os.path.dirname(parts[0])} is damaged ({e!r})") from None


def merge_parts(shards_folder, parts, metas):
    """merge() of what is in the files `parts`."""
    first = metas[0]
    for path, meta in zip(parts, metas, strict=True):
        if not meta["complete"]:
            raise UserError(f"{path} is not finished: run its prepare again")
        meta["files"] = {k: portable(key) for k, key in meta["files"].items()}
        meta["split"] = [portable(x) if isinstance(x, list) else x for x in meta["split"]]
        for name in ("tokenizer_hash", "split", "files", "piece"):
            if meta[name] != first[name]:
                raise UserError(
                    f"{path} has another {name} than {parts[0]}: prepare one of them again"
                )
    found = [
        (int(k), entry["piece"], entry)
        for meta in metas
        for k, pieces in meta["pieces"].items()
        for entry in pieces
    ]
    entries = sorted(found, key=lambda one: one[:2])
    expected = {
        (int(k), p) for meta in metas for k, n in meta["finished"].items() for p in range(n)
    }
    read = {int(k) for meta in metas for k in meta["finished"]}
    there = [one[:2] for one in entries]
    if set(there) != expected or len(there) != len(expected) or len(read) < len(first["files"]):
        raise UserError(
            f"the parts in {os.path.dirname(parts[0])} do not make a whole: delete that folder and "
            f"prepare all of them again"
        )
    dtype, train, valid = first["dtype"], [], []
    for k, piece, entry in entries:
        name = f"data_{k:05}_{piece:04}.bin"
        source_key = [f"{first['files'][str(k)][0]} {piece}"]
        for side, into, where in (("train", train, ""), ("valid", valid, "parts")):
            if entry[side]["tokens"]:
                path = os.path.join(shards_folder, where, name)
                if not shard_size_fits(path, entry[side]["tokens"], dtype):
                    raise UserError(f"{path} is missing or damaged: prepare that part again")
                counted = {key: entry[side][key] for key in (*COUNTS, "crc32")}
                into.append({"name": name, "source": source_key, **counted})
    for what, found in (("train on", train), ("validate with", valid)):
        if not found:
            raise UserError(
                f"there is no document to {what}: expected many documents, in .txt files with "
                f"{SEPARATOR.decode()} between them; or another --valid_frac or --valid_source"
            )
    crc = 0
    with atomic_write(os.path.join(shards_folder, "data00.bin")) as out:
        for one in valid:
            path = os.path.join(shards_folder, "parts", one["name"])
            with open(path, "rb") as f:
                data = f.read()
            if zlib.crc32(data) != one["crc32"]:
                raise UserError(f"{path} is damaged: prepare that part again")
            crc = zlib.crc32(data, crc)
            out.write(data)
    counts = {c: sum(one[c] for one in valid) for c in COUNTS}
    all_valid = {"name": "data00.bin", "source": ["validation"], **counts, "crc32": crc}
    held_out = sum(one["held_out"] for one in train)
    about = {name: first[name] for name in ("vocab_size", "dtype", "tokenizer_hash")}
    return about, [all_valid, *train], held_out


def portable(key):
    """The key of a File without what copies on other machines need not share."""
    return [x for x in key if not str(x).startswith(MTIME)]
