"""
Text on disk: which files a source has, and how they are cut into parts that each make a shard.
text/documents.py reads the documents in them.
"""

import codecs
import contextlib
import functools
import io
import itertools
import os
import re
from dataclasses import dataclass, replace

from configurator import UserError
from system.files import check_regular
from text.documents import (
    READABLE,
    READERS,
    SEPARATOR,
    TEXT,
    border_after,
    cleaned,
    end_of_paragraph,
    has_separator,
    is_plain,
    is_streamed,
    mark_of,
    not_utf8,
    opened,
    read_passages,
    readable,
    shape_of,
    stream_documents,
)

SIDECAR = "shards.json"  # of token shards, which may lie in the same folder
# JSON beside data that is not data
METADATA = (SIDECAR, "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
BOOK_SHARD = 64 << 10  # bytes, at least, of a part of a file that is cut into passages
WHOLE = 16 << 10  # bytes up to which a file without separators is one document
MIN_SHARDS, MAX_SHARDS = 10, 50  # of a text that is cut
SMALL_SHARD, LARGE_SHARD = 256 << 10, 64 << 20  # bytes; between the two there are MAX_SHARDS
MTIME = "changed "  # begins the version of a file here, which copies elsewhere need not share
IN_PASSAGES = " in passages"  # ends the version of a file without separators that is cut
CHECKED = 1 << 32  # bytes of a source, from its beginning, that are checked before work begins


@dataclass(frozen=True)
class Span:
    """Bytes start to end of a file, whole documents; is_book: it is cut into passages."""

    path: str
    start: int
    end: int
    is_book: bool = False

    def key(self):
        """What must stay the same for a shard made from it to stay good."""
        info = os.stat(self.path)
        name = os.path.basename(self.path)
        key = f"{name} {info.st_size} {info.st_mtime_ns} {self.start}-{self.end}"
        return key + IN_PASSAGES * self.is_book

    def data(self):
        """The bytes of a file that is not compressed, without a byte order mark."""
        with opened(self.path) as (file, _):
            file.seek(max(self.start, file.tell()))
            data = file.read(max(0, self.end - file.tell()))
            if file.tell() < self.end:
                raise changed(self.path)
            return data


@dataclass(frozen=True)
class File:
    """
    A file of text at `path`, once it is downloaded from `url`, which is read from its beginning; or
    `spans` of files here, which make one shard. is_book: it is cut into passages.
    """

    name: str
    size: int  # bytes
    version: str  # changes when the content does
    path: str
    url: str = ""
    is_valid: bool = False  # all of it is for validation
    spans: tuple = ()
    is_book: bool = False

    def key(self):
        return [self.name, self.size, self.version]

    def documents(self):
        if self.spans:
            return read_documents(self.spans)
        return (text for text, _ in stream_documents(self.path, self.is_book))

    def check_unchanged(self):
        """Raise UserError if the file was written to, or removed, since this File was made."""
        with watched_for_removal(self.path):
            now = file_here(self.path, is_book=self.is_book)
            now = file_of_spans(self.spans) if self.spans else now
        # a file of the hub has the hub's version
        if now.size != self.size or (not self.url and now.version != self.version):
            raise changed(self.path)


def file_here(path, is_valid=False, is_book=False):
    """The File of a path."""
    info = os.stat(path)
    version = f"{MTIME}{info.st_mtime_ns}" + IN_PASSAGES * is_book
    return File(os.path.basename(path), info.st_size, version, path, "", is_valid, (), is_book)


def file_of_spans(spans, is_valid=False):
    path, version = spans[0].path, "; ".join(span.key() for span in spans)
    size = sum(span.end - span.start for span in spans)
    return File(os.path.basename(path), size, version, path, "", is_valid, tuple(spans))


def changed(path):
    return UserError(
        f"{path} was changed while it was read: run the same command again once it stays as it is"
    )


@contextlib.contextmanager
def watched_for_removal(path):
    try:
        yield
    except FileNotFoundError:
        raise changed(path) from None


@contextlib.contextmanager
def unchanged(spans):
    """Raise UserError at the end of the block if a file of some Spans was written to meanwhile."""
    before = {span.path: whole_file(span.path).key() for span in spans}
    yield
    for path, key in before.items():
        with watched_for_removal(path):
            if whole_file(path).key() != key:
                raise changed(path)


# ---- which files, and where to cut them


def text_files(source):
    """
    The file `source`, or the files of text in that folder, sorted. Raises UserError where there is
    none, or one is not UTF-8.
    """
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist")
    check_regular(source)
    folder, names = "", [source]
    if os.path.isdir(source):
        folder = source
        there = [name for name in os.listdir(source) if os.path.isfile(os.path.join(source, name))]
        names = data_files(there, source)
    paths = [os.path.join(folder, name) for name in names if name.lower().endswith(READABLE)]
    if not paths:
        raise UserError(
            f"{source}: expected a file, or a folder of files, ending in {', '.join(READABLE)}"
        )
    room = CHECKED
    for path in paths:
        info = os.stat(path)
        if room > 0 and path.lower().endswith(TEXT):
            check_utf8(path, info.st_size, info.st_mtime_ns)
        room -= info.st_size
    return paths


def data_files(names, where):
    """
    The names of files of text, sorted. Prints which are left out: what only describes data, and
    all but one of the names that differ in the ending alone, which hold the same text again.
    """
    names = [name for name in names if name.lower().endswith(READABLE)]
    names = [name for name in names if not os.path.basename(name).startswith(".")]  # macOS's ._x
    kept = {}
    for name in sorted(names, key=lambda name: (READABLE.index(full_ending(name)), name)):
        if os.path.basename(name) not in METADATA:
            kept.setdefault(name[: -len(full_ending(name))], name)
    others = set(names) - set(kept.values()) - {SIDECAR}
    if others:
        print_once(f"{where}: not read: {', '.join(sorted(others))}")
    if len({full_ending(name) == ".parquet" for name in kept.values()}) == 2:
        print_once(
            f"note: {where} has .parquet and other files; if they are the same text, name one"
        )
    return sorted(kept.values())


@functools.cache
def print_once(text):
    print(text)


def full_ending(name):
    return re.search(r"\.\w+(\.gz)?$", name.lower())[0]


@functools.cache
def check_utf8(path, size, mtime_ns):
    """Raise UserError unless a file is UTF-8; read once a process for the same size and time."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as f:
        try:
            while chunk := f.read(1 << 22):
                at += len(chunk)
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as e:
            place = f"{at - len(e.object) + e.start:,}"
            raise not_utf8(f"{path} is not UTF-8 at byte {place}") from None


def books_among(paths):
    """
    Which files of a source, a set of paths, are to be cut into passages: .txt without separators,
    if it is long or all there is. Prints that.
    """
    books = [
        path
        for path in paths
        if shape_of(path) == ".txt"
        and (len(paths) == 1 or os.path.getsize(path) > WHOLE)
        and not has_separator(path)
    ]
    if books:
        others = f" and {len(books) - 1} other files have" if len(books) > 1 else " has"
        print_once(
            f"{books[0]}{others} no {SEPARATOR.decode()} between documents: cut at blank lines "
            f"into passages of 2,000 characters or more, each of which is a document"
        )
    return set(books)


def plan_shards(source, valid_source=""):
    """
    Cut a corpus into Files, one a shard; those of valid_source come first. Depends on the files
    alone.
    """
    paths, valid = text_files(source), []
    if valid_source:
        valid = text_files(valid_source)
        paths = [p for p in paths if not any(os.path.samefile(p, v) for v in valid)]
        if not paths:
            raise UserError(f"{valid_source} is all of {source}: nothing is left to train on")
    books = books_among(paths) | books_among(valid)
    # a single .json list is read once, for all workers
    is_list = len(paths) == 1 and shape_of(paths[0]) == ".json"
    streamed = [path for path in paths if is_list or is_streamed(path)]
    paths = [path for path in paths if path not in streamed]
    spans = [whole_file(path, path in books) for path in paths]
    total = sum(span.end for span in spans)
    if not total and not streamed:
        raise UserError(f"{source} has no text to train on: its files are empty")
    n = max(min(max(total // SMALL_SHARD, MIN_SHARDS), MAX_SHARDS), -(-total // LARGE_SHARD))
    parts = (cut(span, n_shards(span, n, total)) for span in spans)
    train = grouped(itertools.chain.from_iterable(parts), total // n)
    whole = (whole_file(path, path in books) for path in valid if not is_streamed(path))
    return [
        *(file_of_spans(spans, True) for spans in grouped(whole, LARGE_SHARD)),
        *(file_here(path, True, path in books) for path in valid if is_streamed(path)),
        *map(file_of_spans, train),
        *(file_here(path, False, path in books) for path in streamed),
    ]


def n_shards(span, n, total):
    """How many of n shards of a corpus of `total` bytes a whole file is worth."""
    worth = round(n * span.end / max(total, 1))
    return min(worth, span.end // BOOK_SHARD) if span.is_book else worth


def whole_file(path, is_book=False):
    return Span(path, 0, os.path.getsize(path), is_book)


def grouped(spans, size):
    """Spans in lists, neighbours together while they make less than half of `size` bytes."""
    groups, room = [], 0
    for span in spans:
        if room <= 0:
            groups.append([])
            room = size // 2
        groups[-1].append(span)
        room -= span.end - span.start
    return groups


def cut(span, n):
    """
    Up to n Spans of about equal size that make up a Span, cut between documents. Where those are
    found by reading alone, it stays whole. A book is cut once, since passages depend on where.
    """
    ends, size = {span.start, span.end}, span.end - span.start
    mark = mark_of(span.path)
    if span.is_book:
        is_whole = span == whole_file(span.path, True)
        mark = end_of_paragraph(span.path) if is_whole else None
    if n > 1 and mark:
        with open(span.path, "rb") as f:
            ends |= {border_after(f, span.start + size * i // n, mark) for i in range(1, n)}
    ends = sorted(end for end in ends if span.start <= end <= span.end)
    return [replace(span, start=a, end=b) for a, b in itertools.pairwise(ends)]


# ---- what they say


def read_documents(spans):
    """The documents of Spans, one str after another."""
    for span in spans:
        if is_streamed(span.path) or shape_of(span.path) == ".json":
            yield from (text for text, _ in stream_documents(span.path, span.is_book))
            continue
        where = f"{span.path} (from byte {span.start:,})" if span.start else span.path
        read = read_passages if span.is_book else READERS[shape_of(span.path)]
        with readable(span.path):
            yield from cleaned(read(io.BytesIO(span.data()), where))


def texts_of(span):
    """
    The texts in a Span: of a .txt file all it says, whatever it is, so that it may be cut anywhere;
    else its documents.
    """
    if not is_plain(span.path):
        yield from read_documents([span])
        return
    with readable(span.path):
        yield span.data().decode()
