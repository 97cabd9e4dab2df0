"""
Pieces of text, which machines share, and the record of finished pieces. Text files are cut into
pieces, and the documents of a piece into batches that workers encode. Each piece becomes an array
of training ids and one of validation ids; the pieces of all machines make one set of shards.
"""

import contextlib
import glob
import math
import os
import re
import time
import zlib
from dataclasses import dataclass

import numpy as np

from configurator import UserError
from system.fields import fits, is_bool, is_count, is_size, is_string, list_of
from system.files import atomic_write, checksum, flush_files, read_json, write_json
from text.corpus import MTIME, File, cut, read_documents
from text.documents import HOW_TO_CUT

FORMAT = 2  # version of shards.json and of the files in parts/
DTYPES = ("uint16", "uint32")  # of ids
PARTS = "parts"  # the folder, beside the shards, that records what each machine has done
PIECE = 1 << 27  # minimum characters of text in a shard, except the last shard of a file
BATCH = 1 << 20  # characters that a worker encodes at a time
SPAN = 1 << 22  # bytes that a worker reads at a time
SAVE_INTERVAL = 1.0  # minimum seconds between two writes of these records
COUNTS = ("documents", "tokens", "bytes", "unk", "held_out")


@dataclass(frozen=True)
class Batch:
    """Some documents of a File: a list of texts, or Spans that a worker reads."""

    file: File
    piece: int  # index of their piece in the file
    texts: list = ()
    spans: tuple = ()
    read: int = 0  # bytes of the file that have been read
    n_pieces: int | None = None  # of the file; None except in its last batch

    def documents(self):
        return self.texts or list(read_documents(self.spans))


def batches_of(file, wanted):
    """Yield the Batches, at least one, of a file's pieces for which wanted(piece) is true."""
    return (span_batches if file.spans else stream_batches)(file, wanted)


def span_batches(file, wanted):
    """Yield the Batches of a file with `spans`, which is one piece."""
    spans, read = [], 0
    for span in file.spans if wanted(0) else ():
        spans += cut(span, (span.end - span.start) // SPAN)
    for span in spans[:-1]:
        read += span.end - span.start
        yield Batch(file, 0, spans=(span,), read=read)
    yield Batch(file, 0, spans=tuple(spans[-1:]), read=file.size, n_pieces=1)


def stream_batches(file, wanted):
    """Yield the Batches of a file that is streamed; a piece ends when it has PIECE characters."""
    piece, texts, n_batch, n_piece = 0, [], 0, 0
    for text, at in file.stream():
        n_piece += len(text)
        if wanted(piece):
            texts.append(text)
            n_batch += len(text)
        if texts and (n_batch >= BATCH or n_piece >= PIECE):
            yield Batch(file, piece, texts, read=at)
            texts, n_batch = [], 0
        if n_piece >= PIECE:
            piece, n_piece = piece + 1, 0
    yield Batch(file, piece, texts, read=file.size, n_pieces=piece + bool(n_piece))


class Part:
    """
    What machine i of n has done: its pieces of each file, recorded in parts/I_of_N.json. Validation
    arrays are in parts/, training arrays beside shards.json. If the tokenizer, the split (`shared`)
    or the division of the work has changed, the part starts from scratch. by_file: there are enough
    files for each machine to do whole files; else each does every n-th piece of every file.
    """

    def __init__(self, folder, i, n, shared, files):
        self.folder, self.i, self.n, self.saved = folder, i, n, -math.inf
        self.parts = os.path.join(folder, PARTS)
        self.path = os.path.join(self.parts, f"{i}_of_{n}.json")
        self.lock()
        self.dtype = shared["dtype"]
        self.by_file = sum(not file.is_valid for file in files) >= n
        shared = {**shared, "by_file": self.by_file, "piece": PIECE}
        self.meta = {
            **shared,
            "files": {str(k): file.key() for k, file in enumerate(files)},
            "pieces": {},  # {file: [{"piece", "train": {...}, "valid": {...}}]}
            "finished": {},  # {file that this machine has read: its number of pieces}
            "complete": False,
        }
        with contextlib.suppress(UserError):  # missing or damaged: do all of it again
            self.keep(read_part(self.path), shared, files)
        self.save()

    def lock(self):
        """Lock the part until the process ends; raise UserError if another process has it."""
        os.makedirs(self.parts, exist_ok=True)
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            self.locked = open(f"{self.path}.lock", "w")  # noqa: SIM115
            try:
                fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is writing to {self.folder}: wait until it ends, or choose "
                    f"another folder"
                ) from None
            except OSError:  # the file system has no locks
                pass

    def keep(self, old, shared, files):
        """Keep what an earlier run has done, if it was the same work."""
        if any(old.get(name) != value for name, value in shared.items()):
            return
        for k, file in enumerate(files):
            if old["files"].get(str(k)) != file.key():
                continue
            pieces = {entry["piece"]: entry for entry in old["pieces"].get(str(k), [])}
            whole = [entry for entry in pieces.values() if self.is_whole(k, entry)]
            n_pieces = old["finished"].get(str(k))
            if whole:
                self.meta["pieces"][str(k)] = whole
            # skip an impossible number: machines share pieces evenly, or this one has all or none
            if n_pieces is None or n_pieces > self.n * (len(whole) + 1):
                continue
            if sum(map(self.is_mine(k), range(n_pieces))) == len(whole):
                self.meta["finished"][str(k)] = n_pieces

    def save(self, interval=0.0):
        if time.monotonic() >= self.saved + interval:
            write_json(self.path, self.meta)
            self.saved = time.monotonic()

    def array(self, k, piece, side):
        """Return the path of the ids of a piece; side: "train" or "valid"."""
        name = f"data_{k:05}_{piece:04}.bin"
        return os.path.join(self.parts if side == "valid" else self.folder, name)

    def is_whole(self, k, entry):
        """Return whether the arrays of a piece are intact on disk."""
        width = np.dtype(self.dtype).itemsize
        for side in ("train", "valid"):
            path, counts = self.array(k, entry["piece"], side), entry[side]
            found = checksum(path) if counts["tokens"] and os.path.exists(path) else [0, 0]
            if found != [counts["tokens"] * width, counts["crc32"]]:
                return False
        return True

    def is_mine(self, k):
        """Return a function that tests whether piece p of file k is this machine's."""
        return lambda p: (k if self.by_file else k + p) % self.n == self.i

    def todo(self, files):
        """Return this machine's unfinished files, {file: function of a piece, see wanted()}."""
        return {
            file: self.wanted(k)
            for k, file in enumerate(files)
            if str(k) not in self.meta["finished"] and (not self.by_file or self.is_mine(k)(0))
        }

    def wanted(self, k):
        """Return a function that tests whether this machine must still do piece p of file k."""
        is_mine = self.is_mine(k)
        done = {entry["piece"] for entry in self.meta["pieces"].get(str(k), [])}
        return lambda p: is_mine(p) and p not in done

    def add(self, k, piece, results):
        """Write a piece; results: for each of its batches, (ids, counts) of both sides."""
        entry = {"piece": piece}
        for side, batches in zip(("train", "valid"), zip(*results, strict=True), strict=True):
            ids = np.concatenate([ids for ids, _ in batches])
            if len(ids):
                with atomic_write(self.array(k, piece, side), durable=False) as f:
                    f.write(ids)  # tofile() does not report a full disk
            counts = {c: sum(counts[c] for _, counts in batches) for c in COUNTS}
            entry[side] = {**counts, "crc32": zlib.crc32(ids)}
        self.meta["pieces"].setdefault(str(k), []).append(entry)
        self.save(SAVE_INTERVAL)

    def finish(self, k, n_pieces):
        self.meta["finished"][str(k)] = n_pieces
        self.save(SAVE_INTERVAL)

    def complete(self):
        """Flush all arrays to disk together, which is faster than flushing each after writing."""
        flush_files(
            [
                self.array(int(k), entry["piece"], side)
                for k, entries in self.meta["pieces"].items()
                for entry in entries
                for side in ("train", "valid")
                if entry[side]["tokens"]
            ]
        )
        self.meta["complete"] = True


# ---- from parts to one set of shards


def keyed_by_file(check):
    """Return a check for {index of a file: value that passes `check`}."""
    return lambda value: (
        type(value) is dict
        and all(re.fullmatch(r"0|[1-9][0-9]{0,8}", name) for name in value)
        and all(map(check, value.values()))
    )


def is_key(value):
    """Return whether a parsed value is a File.key()."""
    return type(value) is list and fits(dict(enumerate(value)), KEY) and len(value) == len(KEY)


def is_side(value):
    return fits(value, dict.fromkeys((*COUNTS, "crc32"), is_count))


def is_piece(value):
    return fits(value, {"piece": is_count, "train": is_side, "valid": is_side})


KEY = {0: is_string, 1: is_count, 2: is_string}
SHARED = ("tokenizer_hash", "vocab_size", "dtype", "orders")  # in parts and in the sidecar
PART = {
    "format": lambda value: is_count(value) and value == FORMAT,
    "vocab_size": is_count,
    "dtype": lambda value: value in DTYPES,
    "tokenizer_hash": is_string,
    "split": lambda value: type(value) is list and value and is_size(value[0]),
    "by_file": is_bool,
    "piece": is_count,
    "files": keyed_by_file(is_key),
    "pieces": keyed_by_file(list_of(is_piece)),
    "finished": keyed_by_file(is_count),
    "complete": is_bool,
    "orders": is_string,
}


def read_part(path):
    """Read the record of a part; raise UserError if it is damaged or from another version."""
    meta = {"orders": "", **read_json(path)}  # earlier versions do not write it
    if not fits(meta, PART) or not {*meta["pieces"], *meta["finished"]} <= {*meta["files"]}:
        raise UserError(f"{path} is damaged or from another version: prepare that part again")
    return meta


def merge(folder, n):
    """
    Merge the parts of n machines: write data00.bin, for validation. Returns what the parts share, a
    dict, and the entries of the shards. Raises UserError if a part is missing, unfinished, damaged,
    or does not fit the others.
    """
    paths = [os.path.join(folder, PARTS, f"{i}_of_{n}.json") for i in range(n)]
    if missing := [path for path in paths if not os.path.exists(path)]:
        existing = sorted(glob.glob(os.path.join(glob.escape(folder), PARTS, "*.json")))
        names = ", ".join(map(os.path.basename, existing)) or "none"
        raise UserError(f"{missing[0]} does not exist; prepare the missing parts (found: {names})")
    metas = list(map(read_part, paths))
    pieces = [  # (index of the file, index of the piece, its entry)
        (int(k), entry["piece"], entry)
        for meta in metas
        for k, entries in meta["pieces"].items()
        for entry in entries
    ]
    pieces.sort(key=lambda x: x[:2])
    check_parts(paths, metas, [x[:2] for x in pieces])
    train, valid = entries_of(folder, metas[0], pieces)
    shared = {name: metas[0][name] for name in SHARED}
    shared["valid_frac"] = metas[0]["split"][0]
    return shared, [write_validation(folder, valid), *train]


def check_parts(paths, metas, pieces):
    """
    Raise UserError unless the parts are finished, belong to the same work, and together are all of
    it. pieces: (file, piece) of all parts, sorted.
    """
    first = metas[0]
    for path, meta in zip(paths, metas, strict=True):
        if not meta["complete"]:
            raise UserError(f"{path} is not finished: prepare that part again")
        meta["files"] = {k: portable(key) for k, key in meta["files"].items()}
        meta["split"] = [portable(x) if isinstance(x, list) else x for x in meta["split"]]
        for name in (*SHARED, "split", "files", "piece"):
            if meta[name] != first[name]:
                raise UserError(
                    f"{path} and {paths[0]} differ in {name!r}: prepare one of them again"
                )
    finished = {int(k): n for meta in metas for k, n in meta["finished"].items()}
    is_whole = len(pieces) == sum(finished.values()) and len(finished) == len(first["files"])
    if not is_whole or pieces != [(k, p) for k, n in sorted(finished.items()) for p in range(n)]:
        raise UserError(
            f"the parts in {os.path.dirname(paths[0])} do not fit together: delete that folder and "
            f"prepare all parts again"
        )


def portable(key):
    """Return the key of a File without what its copies on other machines need not share."""
    return [x for x in key if not str(x).startswith(MTIME)]


def entries_of(folder, meta, pieces):
    """
    Return the sidecar's entries for the training arrays and the validation arrays of all pieces.
    meta: the record of any part.
    """
    sides = {"train": [], "valid": []}
    width = np.dtype(meta["dtype"]).itemsize
    for k, piece, entry in pieces:
        name = f"data_{k:05}_{piece:04}.bin"
        source = [f"{meta['files'][str(k)][0]} {piece}"]
        for side, where in (("train", ""), ("valid", PARTS)):
            counts = {key: entry[side][key] for key in (*COUNTS, "crc32")}
            if counts["tokens"]:
                path = os.path.join(folder, where, name)
                if not shard_size_fits(path, counts["tokens"], width):
                    raise UserError(f"{path} is missing or damaged; prepare that part again")
                sides[side].append({"name": name, "source": source, **counts})
    for side, entries in sides.items():
        if not entries:
            purpose = "training" if side == "train" else "validation"
            raise UserError(
                f"no document is for {purpose}: use more documents, another --valid_frac or a "
                f"--valid_source; a .txt file needs {HOW_TO_CUT}"
            )
    return sides["train"], sides["valid"]


def shard_size_fits(path, n_tokens, width):
    return os.path.isfile(path) and os.path.getsize(path) == n_tokens * width


def write_validation(folder, entries):
    """Write data00.bin from the validation arrays of the pieces; return its entry."""
    crc = 0
    with atomic_write(os.path.join(folder, "data00.bin")) as out:
        for entry in entries:
            path = os.path.join(folder, PARTS, entry["name"])
            with open(path, "rb") as f:
                data = f.read()
            if zlib.crc32(data) != entry["crc32"]:
                raise UserError(
                    f"{path} is damaged: its checksum is wrong; prepare that part again"
                )
            crc = zlib.crc32(data, crc)
            out.write(data)
    counts = {c: sum(entry[c] for entry in entries) for c in COUNTS}
    return {"name": "data00.bin", "source": ["validation"], **counts, "crc32": crc}
