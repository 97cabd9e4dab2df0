"""
The one writer of token shards: how text is split, encoded and written, and what is said of it.

A shard is a bare array of ids, little-endian uint16 (uint32 if the vocabulary needs it), with a BOS
before each document. shards.json in the same folder lists the shards; the first, data00.bin, is for
validation. No document of it is in the others: a document goes to one side by the hash of its text,
or, if there is a text for validation, training documents that are in that text too are left out.

After an interruption the same command continues at the shard where it stopped; text/pieces.py
keeps the books. What is in memory depends on the number of workers, not on the size of the text.
"""

import functools
import glob
import hashlib
import itertools
import os
import re
from dataclasses import dataclass

import numpy as np

from configurator import UserError
from system.fields import fits, is_bool, is_count, is_size, is_string, list_of
from system.files import atomic_write, read_json, remove, write_json
from system.progress import progress
from system.workers import in_order, over_spans
from text.corpus import SIDECAR, texts_of, unchanged
from text.documents import HOW_TO_CUT, is_plain
from text.pieces import DTYPES, FORMAT, Part, batches_of, merge

WHITE_SPACE = b" \t\n\v\f\r"
TINY = 2_500_000  # bytes of text below which the validation part has as many documents as it should
# bytes of text from which on a part of the documents is for validation
FRACTIONS = ((200_000_000, 0.005), (TINY, 0.05), (0, 0.1))


# ---- the split


def document_key(text):
    """16 bytes, the same for two documents that differ only in ASCII white space."""
    return hashlib.blake2b(text.encode().translate(None, WHITE_SPACE), digest_size=16).digest()


def place_of(text):
    """A number from 0 to 2 ** 64 - 1, the hash of a document."""
    return int.from_bytes(document_key(text)[:8], "little")


@functools.cache
def keys_of(files):
    """The document_key() of all documents of some files, read once a process."""
    return frozenset(document_key(text) for file in files for text in file.documents())


@dataclass(frozen=True)
class Split:
    """Which documents are for validation: all of the files `valid`, or else a part `frac`."""

    frac: float
    valid: tuple = ()

    def key(self):
        return [self.frac, *(file.key() for file in self.valid)]

    def sides(self, texts, is_valid):
        """Texts of a file as lists for training and for validation; `is_valid`: it is for that."""
        train, valid = [], []
        if is_valid:
            valid = list(texts)
        elif self.valid:
            known = keys_of(self.valid)
            train = [text for text in texts if document_key(text) not in known]
        else:
            limit = self.frac * 2**64
            for text in texts:
                (valid if place_of(text) < limit else train).append(text)
        return train, valid


def choose_split(files, frac=0.0):
    """
    The Split of a text in some files: those for validation, if there are any, else a part `frac` of
    the documents (0: FRACTIONS), and one at least. The latter depends on the text alone. Raises
    UserError if one side would have no document, unless files have yet to be downloaded.
    """
    if not 0 <= frac < 1:
        raise UserError(f"valid_frac = {frac}: expected from 0 to below 1")
    valid = tuple(file for file in files if file.is_valid)
    train = [file for file in files if not file.is_valid]
    texts = itertools.chain.from_iterable(file.documents() for file in train)
    if any(file.url for file in files):
        texts = None
    elif (first := next(texts, None)) is None:
        raise UserError(f"{train[0].path} has no text to train on: only white space")
    else:
        texts = itertools.chain([first], texts)
    if valid:
        known = keys_of(valid)
        if not known:
            raise UserError(f"{valid[0].path} has no text for validation: only white space")
        if texts and all(document_key(text) in known for text in texts):
            raise UserError(
                "every training document is in the validation text too: give another --valid_source"
            )
        return Split(0.0, valid)
    size = sum(file.size for file in train)
    frac = frac or next(part for least, part in FRACTIONS if size >= least)
    return Split(checked_fraction(texts, frac, size, train[0].path) if texts else frac)


def checked_fraction(texts, frac, size, path):
    """
    `frac`, if it leaves documents on both sides; else, and for a text of less than TINY bytes, what
    holds out that part of the different documents, and one at least.
    """
    places, sides = set(), set()
    for text in texts:
        places.add(place_of(text))
        sides.add(place_of(text) < frac * 2**64)
        if size >= TINY and len(sides) == 2:
            return frac
    if len(places) < 2:
        raise UserError(
            f"{path} cannot be split into a training and a validation part: expected several "
            f"documents, or a validation text as --valid_source. A .txt file needs {HOW_TO_CUT}"
        )
    places = sorted(places)
    n = min(max(1, round(frac * len(places))), len(places) - 1)
    return (places[n - 1] + places[n]) / 2**65


def training_documents(files, split, vocab_mb, fetch=lambda file: None):
    """
    The first vocab_mb megabytes of the training documents of files, for a vocabulary. fetch(file):
    called before a file is read.
    """
    if vocab_mb < 1:
        raise UserError(f"vocab_mb = {vocab_mb}: expected at least 1")
    n_bytes, limit = 0, vocab_mb * 1_000_000
    files = [file for file in files if not file.is_valid]
    size = sum(file.size for file in files)
    with progress(total=min(limit, size), unit="B", unit_scale=True, desc="read") as bar:
        for file in files:
            fetch(file)
            for text in file.documents():
                bar.update(n := len(text.encode()))
                if not split.sides([text], False)[0]:
                    continue
                yield text
                n_bytes += n
                if n_bytes >= limit:
                    print(f"--vocab_mb={vocab_mb}: training on the first {n_bytes / 1e6:.0f} MB")
                    return
            file.check_unchanged()


# ---- writing


def id_type(tokenizer):
    """The smallest number format for the ids of a Tokenizer."""
    return DTYPES[tokenizer.vocab_size > 1 << 16]


def encode_batch(batch, tokenizer, encoder, dtype, split):
    """For training and for validation: the ids of a Batch, and its counts as a dict."""
    encode, texts = tokenizer.encoder(encoder)[1], batch.documents()
    sides = split.sides(texts, batch.file.is_valid)
    n_held_out = len(texts) - sum(map(len, sides))
    results = []
    for texts, held_out in zip(sides, (n_held_out, 0), strict=True):
        ids = tokenizer.encode_flat(texts, encode).astype(dtype)
        counts = {
            "documents": len(texts),
            "tokens": len(ids),
            "bytes": sum(len(text.encode()) for text in texts),
            "unk": int((ids == tokenizer.unk_id).sum()) if tokenizer.unk_id >= 0 else 0,
            "held_out": held_out,
        }
        results.append((ids, counts))
    return results


def write_shards(
    folder,
    tokenizer,
    files,
    split,
    num_workers,
    about,
    encoder="auto",
    machine=(0, 1),
    bring=iter,
    done=lambda file, part: None,
):
    """
    Encode Files into the shards of a folder. Shards that are there already, of the same
    text, tokenizer and split, are kept. Returns the finished sidecar, or None where several
    machines share the work.

    about: {"valid_source", "made_by"} of the sidecar: the text, and the command; machine: (i, n),
    this one is i of n; bring(files): yields files once they can be read; done(file, part): called
    when all of a file is in shards.
    """
    shared = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_type(tokenizer),
        "tokenizer_hash": tokenizer.hash,
        "split": split.key(),
    }
    old = read_sidecar(folder)
    part = Part(folder, *machine, shared, files)
    todo = part.todo(files)
    n_bytes = sum(file.size for file in todo)
    what = "shards to make" if files[0].spans else "files to read"
    print(f"{len(todo)} of {len(files)} {what}, {n_bytes / 1e6:,.1f} MB")
    if old and todo:
        if not part.meta["pieces"]:
            of = " and ".join(old.get("valid_source", [])) or "another text"
            print(
                f"the shards in {folder} were made of {of}, or with another tokenizer or split: "
                f"made again"
            )
        write_json(os.path.join(folder, SIDECAR), {**old, "complete": False})
    words = tokenizer, tokenizer.encoder(encoder)[0], part.dtype, split
    write_part(part, files, words, num_workers, bring, done)
    return finish(folder, 1, about) if machine[1] == 1 else None


def write_part(part, files, words, num_workers, bring, done):
    """Do what is to do of a Part; words: those of encode_batch()."""
    number, todo = {file: k for k, file in enumerate(files)}, part.todo(files)
    batches = (batch for file in bring(todo) for batch in batches_of(file, todo[file]))
    n_bytes = sum(file.size for file in todo)
    bar = progress(total=n_bytes, unit="B", unit_scale=True, desc="encode", disable=not todo)
    results, at, before = [], None, 0
    try:
        for batch, result in in_order(encode_batch, batches, words, num_workers):
            here = number[batch.file], batch.piece
            if results and at != here:
                part.add(*at, results)
                results = []
            if batch.texts or batch.spans:
                results, at = [*results, result], here
            bar.update(before + batch.read - bar.n)
            if batch.n_pieces is None:
                continue
            batch.file.check_unchanged()
            if results:
                part.add(*at, results)
                results = []
            part.finish(here[0], batch.n_pieces)
            before += batch.file.size
            done(batch.file, part)
        part.complete()
    finally:
        part.save()
        bar.close()


def finish(folder, n, about):
    """
    Make one set of shards of the parts of n machines: write data00.bin and the sidecar. Returns the
    sidecar.
    """
    shared, shards = merge(folder, n)
    held_out = sum(shard["held_out"] for shard in shards)
    return write_sidecar(folder, {**shared, **about, "held_out": held_out}, shards)


def write_sidecar(folder, about, shards):
    """Write shards.json, delete shards that it does not list, and print what is there."""
    meta = {"format": FORMAT, **about, "complete": True, "shards": shards}
    write_json(os.path.join(folder, SIDECAR), meta)
    kept = {shard["name"] for shard in shards}
    there = map(os.path.basename, glob.glob(os.path.join(glob.escape(folder), "data*.bin")))
    old = [name for name in there if re.fullmatch(r"data(\d+|_\d+_\d+)\.bin", name)]
    if old := [name for name in old if name not in kept]:
        print(f"{len(old)} earlier shards that are not of this text are deleted")
    for name in old:
        remove(os.path.join(folder, name))
    report(meta, folder)
    return meta


def report(meta, folder):
    """Print what is in the shards of a folder."""
    counts, by_hash = ("documents", "tokens", "bytes", "unk"), meta.get("valid_frac", 0.0) > 0
    total = {k: sum(s[k] for s in meta["shards"]) for k in counts}
    print(
        f"{total['documents']:,} documents, {total['tokens']:,} tokens, "
        f"{total['bytes'] / max(total['tokens'], 1):.2f} bytes a token, "
        f"in {len(meta['shards'])} shards in {folder}"
    )
    valid = meta["shards"][0]
    print(
        f"for validation: {valid['documents']:,} of the documents "
        f"({valid['documents'] / total['documents']:.1%}), {valid['tokens']:,} tokens"
        + (", chosen by a hash of their text, from all files" if by_hash else "")
    )
    if meta["held_out"]:
        print(f"{meta['held_out']:,} training documents are in the validation text too: left out")
    if total["unk"]:
        print(f"{total['unk']:,} tokens are <unk>: characters that the vocabulary lacks")


# ---- reading the sidecar


def is_shard(value):
    """Whether a parsed value describes a shard in the folder of the sidecar."""
    return fits(value, SHARD, OPTIONAL_COUNTS)


def are_shards(value):
    return list_of(is_shard)(value) and len({shard["name"] for shard in value}) == len(value)


SHARD = {
    "name": lambda value: is_string(value) and re.fullmatch(r"[\w-]+\.bin", value, re.ASCII),
    "source": lambda value: type(value) is list,
    **dict.fromkeys(("documents", "bytes"), is_count),
}
# which earlier versions left out
OPTIONAL_COUNTS = dict.fromkeys(("tokens", "unk", "held_out", "crc32"), is_count)
SIDECAR_FIELDS = {
    **dict.fromkeys(("format", "vocab_size"), is_count),
    "dtype": lambda value: value in DTYPES,
    "tokenizer_hash": is_string,
    "complete": is_bool,
    "shards": are_shards,
}
OPTIONAL = {
    "made_by": is_string,
    "valid_source": list_of(is_string),
    "valid_frac": is_size,
    "held_out": is_count,
}


def read_sidecar(folder):
    """What shards.json of a folder says, or None if there is none."""
    path = os.path.join(folder, SIDECAR)
    if not os.path.exists(path):
        return None
    try:
        meta = read_json(path)
    except UserError:
        raise UserError(f"{path} is damaged; delete it and pretokenize again") from None
    if is_count(meta.get("format")) and meta["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer version of this program")
    if not fits(meta, SIDECAR_FIELDS, OPTIONAL):
        raise UserError(f"{path} is damaged; delete it and pretokenize again")
    return meta


# ---- one array instead of shards


def encode_span(span, tokenizer, encoder, dtype):
    """The ids of a Span: of a .txt file those of the text as it stands, else as in a shard."""
    encode, texts = tokenizer.encoder(encoder)[1], list(texts_of(span))
    ids = encode(texts)[0] if is_plain(span.path) else tokenizer.encode_flat(texts, encode)
    return ids.astype(dtype)


def write_npy(path, tokenizer, spans, num_workers, encoder="auto"):
    """
    Encode Spans into one NumPy array of ids: .txt as they stand, with the special tokens in them,
    and the documents of others with a BOS before each. Returns how many ids there are, and their
    number format.
    """
    dtype, n = id_type(tokenizer), 0
    words = tokenizer, tokenizer.encoder(encoder)[0], dtype
    header = {"descr": np.dtype(dtype).str, "fortran_order": False}
    with atomic_write(path) as f, unchanged(spans):
        np.lib.format.write_array_header_1_0(f, header | {"shape": (0,)})
        for ids in over_spans(encode_span, spans, words, num_workers, "encode"):
            f.write(ids)  # tofile() does not report a full disk
            n += len(ids)
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, header | {"shape": (n,)})  # has room for any number
    return n, dtype
