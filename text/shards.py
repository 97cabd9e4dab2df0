"""
The writer of token shards: how text is split, encoded, written and described.

A shard is a plain array of ids, little-endian uint16 (uint32 if the vocabulary needs it), with a
BOS before each document. shards.json in the same folder lists the shards; the first, data00.bin, is
for validation. The others contain none of its documents: a hash of its text decides on which side a
document is, or, with a separate validation text, training leaves out documents that are in it.

After an interruption, the same command continues at the shard where it stopped; text/pieces.py
records what is done. Memory depends on the number of workers, not on the size of the text.
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
from text.orders import Orders, first_uses, parse, problem_of, story_of
from text.pieces import DTYPES, FORMAT, Part, batches_of, merge

WHITE_SPACE = b" \t\n\v\f\r"
TINY = 2_500_000  # bytes of text; a smaller text gets the exact number of validation documents
# (minimum bytes of text, share of the documents for validation)
FRACTIONS = ((200_000_000, 0.005), (TINY, 0.05), (0, 0.1))
ORDER_MB = 20  # megabytes of text in which the words for orders are counted
MAX_NAMED = 3  # malformed documents that are named


# ---- the split


def document_key(text):
    """Return a 16-byte hash of a document without its order; ASCII white space is ignored."""
    data = story_of(text).encode().translate(None, WHITE_SPACE)
    return hashlib.blake2b(data, digest_size=16).digest()


def place_of(text):
    """Return a hash of a document from 0 to 2 ** 64 - 1."""
    return int.from_bytes(document_key(text)[:8], "little")


@functools.cache
def keys_of(files):
    """Return the document_key() of all documents in some files; cached."""
    return frozenset(document_key(text) for file in files for text in file.documents())


@dataclass(frozen=True)
class Split:
    """Which documents are for validation: those in the files `valid`, or else a share `frac`."""

    frac: float
    valid: tuple = ()

    def key(self):
        return [self.frac, *(file.key() for file in self.valid)]

    def sides(self, texts, is_valid):
        """Return the texts of a file as (training, validation) lists; is_valid: all validation."""
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
    Return the Split of some files: the validation files, if there are any, else a share `frac` of
    the documents (0: by FRACTIONS), at least one, which depends only on the text. Raises UserError
    if one side would have no document, unless files are still to be downloaded.
    """
    if not 0 <= frac < 1:
        raise UserError(f"valid_frac = {frac}: expected at least 0 and less than 1")
    valid = tuple(file for file in files if file.is_valid)
    train = [file for file in files if not file.is_valid]
    texts = itertools.chain.from_iterable(file.documents() for file in train)
    if any(file.url for file in files):
        texts = None
    elif (first := next(texts, None)) is None:
        raise UserError(f"{train[0].path} contains only white space: nothing to train on")
    else:
        texts = itertools.chain([first], texts)
    if valid:
        known = keys_of(valid)
        if not known:
            raise UserError(f"{valid[0].path} contains only white space: nothing to validate on")
        if texts and all(document_key(text) in known for text in texts):
            raise UserError(
                "all training documents are also in the validation text: use another --valid_source"
            )
        return Split(0.0, valid)
    size = sum(file.size for file in train)
    frac = frac or next(share for minimum, share in FRACTIONS if size >= minimum)
    return Split(checked_fraction(texts, frac, size, train[0].path) if texts else frac)


def checked_fraction(texts, frac, size, path):
    """
    Return `frac` if it leaves documents on both sides. If not, or if the text has fewer than TINY
    bytes, return the fraction that holds out exactly that share of the different documents, and at
    least one of them.
    """
    places, sides = set(), set()
    for text in texts:
        places.add(place_of(text))
        sides.add(place_of(text) < frac * 2**64)
        if size >= TINY and len(sides) == 2:
            return frac
    if len(places) < 2:
        raise UserError(
            f"{path} cannot be split into training and validation text: expected several documents "
            f"or a --valid_source; a .txt file needs {HOW_TO_CUT}"
        )
    places = sorted(places)
    n = min(max(1, round(frac * len(places))), len(places) - 1)
    return (places[n - 1] + places[n]) / 2**65


def orders_of(files, split, fetch=lambda file: None):
    """Return the Orders of some files; their words are counted in the first ORDER_MB megabytes."""
    note = "counting words in the first {:.0f} MB"
    return Orders(training_documents(files, split, ORDER_MB, fetch, note))


def training_documents(
    files,
    split,
    mb,
    fetch=lambda file: None,
    note="training on the first {:.0f} MB (--vocab_mb)",
):
    """
    Yield the first megabytes of the training documents in some files. fetch(file) is called before
    a file is read; note: printed, with the number of megabytes, if there is more text.
    """
    if mb < 1:
        raise UserError(f"vocab_mb = {mb}: expected at least 1")
    n_bytes, limit = 0, mb * 1_000_000
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
                    print(note.format(n_bytes / 1e6))
                    return
            file.check_unchanged()


# ---- writing


def id_type(tokenizer, has_orders=False):
    """Return the smallest dtype for the ids of a Tokenizer, and two bits to mark orders."""
    return DTYPES[tokenizer.vocab_size > 1 << (14 if has_orders else 16)]


def encode_batch(batch, tokenizer, encoder, dtype, split, orders=None):
    """
    Return (ids, counts) of a Batch for training and for validation; counts is a dict. With Orders,
    most documents start with an order, whose tokens are marked; bytes are those of the stories.
    counts["malformed"] lists sentences about documents whose own orders cannot be read.
    """
    encode, texts = tokenizer.encoder(encoder)[1], batch.documents()
    sides = split.sides(texts, batch.file.is_valid)
    n_held_out = len(texts) - sum(map(len, sides))
    results = []
    for texts, held_out in zip(sides, (n_held_out, 0), strict=True):
        malformed = []
        if orders:
            wrong = [(text, problem) for text in texts if (problem := problem_of(text))]
            malformed = [f"{batch.file.name}: {quoted(text)} {problem}" for text, problem in wrong]
            ids, texts = encode_orders(texts, tokenizer, encode, dtype, orders)
        else:
            ids = tokenizer.encode_flat(texts, encode).astype(dtype)
        counts = {
            "documents": len(texts),
            "tokens": len(ids),
            "bytes": sum(len(text.encode()) for text in texts),
            "unk": int((ids == tokenizer.unk_id).sum()) if tokenizer.unk_id >= 0 else 0,
            "held_out": held_out,
            "malformed": malformed,
        }
        results.append((ids, counts))
    return results


def encode_orders(texts, tokenizer, encode, dtype, orders):
    """
    Return (ids, stories) of documents with Orders in front; the ids of orders are marked, and so is
    what they order, where the story first has it. Documents without a story are left out.
    """
    placed = [(order, story) for order, story in map(orders.place, texts) if story]
    stories = [story for _, story in placed]
    whole = [f"{order} {story}" if order else story for order, story in placed]
    ids = tokenizer.encode_flat(whole, encode).astype(dtype)
    mark, table = mark_of_orders(dtype), tokenizer.piece_bytes()
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id)[1:])
    with_order = [i for i, (order, _) in enumerate(placed) if order]
    prefixes = encode([placed[i][0] for i in with_order])[1] if with_order else []
    for i, n in zip(with_order, prefixes, strict=True):  # n: how many ids the order has
        order, story = documents[i][1 : 1 + n], documents[i][1 + n :]
        pieces = [table[k] for k in story]
        ends = np.cumsum([len(piece) for piece in pieces])  # of the pieces in the text, in bytes
        text = b"".join(pieces).decode(errors="replace")
        for start, end in first_uses(parse(placed[i][0])[0], text):
            first, last = (len(text[:at].encode()) for at in (start, end))
            first = np.searchsorted(ends, first, side="right")
            story[first : np.searchsorted(ends, last) + 1] |= mark >> 1
        order |= mark
    return ids, stories


def quoted(text, n=60):
    """Return the start of a text on one line, in quotes."""
    text = " ".join(text.split())
    return f"“{text[:n]}{'…' * (len(text) > n)}”"


def mark_of_orders(dtype):
    """
    Return the bit that marks the ids of orders: the highest of the dtype. The bit below it marks
    what is ordered, where the story first has it.
    """
    return np.dtype(dtype).type(1 << (8 * np.dtype(dtype).itemsize - 1))


def without_marks(ids, mark):
    """Return ids without the bit `mark` and the one below it; mark = 0: there are none."""
    return ids & ((int(mark) >> 1) - 1) if mark else ids


def write_shards(
    folder,
    tokenizer,
    files,
    split,
    num_workers,
    about,
    encoder="auto",
    machine=(0, 1),
    fetched=iter,
    done=lambda file, part: None,
    orders=None,
):
    """
    Encode Files into the shards of a folder. Existing shards of the same text, tokenizer and split
    are kept. Returns the finished sidecar, or None if several machines share the work.

    about: the sidecar's {"valid_source": the text, "made_by": the command}; machine: (i, n) if this
    is machine i of n; orders: the Orders to put before documents, or None; fetched(files): yields
    files once they can be read; done(file, part): called when all of a file is in shards.
    """
    shared = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_type(tokenizer, bool(orders)),
        "tokenizer_hash": tokenizer.hash,
        "split": split.key(),
        "orders": orders.key() if orders else "",
    }
    old = read_sidecar(folder)
    part = Part(folder, *machine, shared, files)
    todo = part.todo(files)
    n_bytes = sum(file.size for file in todo)
    unit = "shards to make" if files[0].spans else "files to read"
    print(f"{len(todo)} of {len(files)} {unit}, {n_bytes / 1e6:,.1f} MB")
    if old and todo:
        if not part.meta["pieces"]:
            source = " and ".join(old.get("valid_source", [])) or "another text"
            print(
                f"note: replacing the shards in {folder}, which were made from {source}, or with "
                f"another tokenizer, split or orders"
            )
        write_json(os.path.join(folder, SIDECAR), {**old, "complete": False})
    args = tokenizer, tokenizer.encoder(encoder)[0], part.dtype, split, orders
    write_part(part, files, args, num_workers, fetched, done)
    return finish(folder, 1, about) if machine[1] == 1 else None


def write_part(part, files, args, num_workers, fetched, done):
    """Do the unfinished work of a Part; args: of encode_batch(), after the batch."""
    number, todo = {file: k for k, file in enumerate(files)}, part.todo(files)
    batches = (batch for file in fetched(todo) for batch in batches_of(file, todo[file]))
    n_bytes = sum(file.size for file in todo)
    bar = progress(total=n_bytes, unit="B", unit_scale=True, desc="encode", disable=not todo)
    results, at, before, n_malformed, named = [], None, 0, 0, []
    try:
        for batch, result in in_order(encode_batch, batches, args, num_workers):
            here = number[batch.file], batch.piece
            if results and at != here:
                part.add(*at, results)
                results = []
            if batch.texts or batch.spans:
                results, at = [*results, result], here
            malformed = [sentence for _, counts in result for sentence in counts["malformed"]]
            n_malformed, named = n_malformed + len(malformed), (named + malformed)[:MAX_NAMED]
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
    if n_malformed:
        print(
            f"note: {n_malformed:,} document{'s' * (n_malformed > 1)} with malformed orders; "
            f"what cannot be read is left out:"
        )
        print("\n".join(named + ["..."] * (n_malformed > MAX_NAMED)))


def finish(folder, n, about):
    """Merge the parts of n machines into one set of shards; return the sidecar."""
    shared, shards = merge(folder, n)
    held_out = sum(shard["held_out"] for shard in shards)
    return write_sidecar(folder, {**shared, **about, "held_out": held_out}, shards)


def write_sidecar(folder, about, shards):
    """Write shards.json, delete shards that it does not list, and print a summary."""
    meta = {"format": FORMAT, **about, "complete": True, "shards": shards}
    write_json(os.path.join(folder, SIDECAR), meta)
    kept = {shard["name"] for shard in shards}
    names = map(os.path.basename, glob.glob(os.path.join(glob.escape(folder), "data*.bin")))
    old = [name for name in names if re.fullmatch(r"data(\d+|_\d+_\d+)\.bin", name)]
    if old := [name for name in old if name not in kept]:
        print(f"deleting {len(old)} shards of another text")
    for name in old:
        remove(os.path.join(folder, name))
    report(meta, folder)
    return meta


def report(meta, folder):
    """Print a summary of the shards of a folder."""
    counts, by_hash = ("documents", "tokens", "bytes", "unk"), meta.get("valid_frac", 0.0) > 0
    total = {k: sum(s[k] for s in meta["shards"]) for k in counts}
    print(
        f"{total['documents']:,} documents, {total['tokens']:,} tokens, "
        f"{total['bytes'] / max(total['tokens'], 1):.2f} bytes per token, "
        f"{len(meta['shards'])} shards in {folder}"
    )
    valid = meta["shards"][0]
    print(
        f"validation: {valid['documents']:,} documents "
        f"({valid['documents'] / total['documents']:.1%}), {valid['tokens']:,} tokens"
        + (", chosen by a hash of their text from all files" if by_hash else "")
    )
    if meta["held_out"]:
        print(f"left out {meta['held_out']:,} training documents that are in the validation text")
    if total["unk"]:
        print(f"{total['unk']:,} tokens are <unk>, for characters that are not in the vocabulary")


# ---- reading the sidecar


def is_shard(value):
    """Return whether a parsed value describes a shard in the folder of the sidecar."""
    return fits(value, SHARD, OPTIONAL_COUNTS)


def are_shards(value):
    return list_of(is_shard)(value) and len({shard["name"] for shard in value}) == len(value)


SHARD = {
    "name": lambda value: is_string(value) and re.fullmatch(r"[\w-]+\.bin", value, re.ASCII),
    "source": lambda value: type(value) is list,
    **dict.fromkeys(("documents", "bytes"), is_count),
}
# earlier versions do not write these
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
    "orders": is_string,
}


def read_sidecar(folder):
    """Read shards.json of a folder; None if there is none."""
    path = os.path.join(folder, SIDECAR)
    if not os.path.exists(path):
        return None
    try:
        meta = read_json(path)
    except UserError:
        raise UserError(
            f"{path} is damaged: it is not a JSON object; delete it and pretokenize again"
        ) from None
    if is_count(meta.get("format")) and meta["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer version of this program: update this one")
    if not fits(meta, SIDECAR_FIELDS, OPTIONAL):
        raise UserError(
            f"{path} is damaged: a field is missing or wrong; delete it and pretokenize again"
        )
    return meta


# ---- one array instead of shards


def encode_span(span, tokenizer, encoder, dtype):
    """Return the ids of a Span: of a .txt file those of the unchanged text, else as in a shard."""
    encode, texts = tokenizer.encoder(encoder)[1], list(texts_of(span))
    ids = encode(texts)[0] if is_plain(span.path) else tokenizer.encode_flat(texts, encode)
    return ids.astype(dtype)


def write_npy(path, tokenizer, spans, num_workers, encoder="auto"):
    """
    Encode Spans into one NumPy array of ids: .txt files unchanged, with the special tokens in them,
    and other files with a BOS before each document. Returns the number of ids and their dtype.
    """
    dtype, n = id_type(tokenizer), 0
    args = tokenizer, tokenizer.encoder(encoder)[0], dtype
    header = {"descr": np.dtype(dtype).str, "fortran_order": False}
    with atomic_write(path) as f, unchanged(spans):
        np.lib.format.write_array_header_1_0(f, header | {"shape": (0,)})
        for ids in over_spans(encode_span, spans, args, num_workers, "encode"):
            f.write(ids)  # tofile() does not report a full disk
            n += len(ids)
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, header | {"shape": (n,)})  # has room for any number
    return n, dtype
