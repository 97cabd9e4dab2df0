"""
Text on disk: which files a source has, and how they are cut into parts that each become a shard.
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
    SEPARATOR,
    TEXT,
    border_after,
    cleaned,
    has_separator,
    is_plain,
    is_streamed,
    mark_of,
    not_utf8,
    opened,
    paragraph_mark,
    read_passages,
    readable,
    reader_of,
    shape_of,
    stream_documents,
)

SIDECAR = "shards.json"  # describes token shards, which may be in the same folder
# JSON files that describe data and are not data
METADATA = (SIDECAR, "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
BOOK_SHARD = 64 << 10  # minimum bytes of a shard from a file that is cut into passages
WHOLE = 16 << 10  # maximum bytes of a file without separators that is one document
MIN_SHARDS, MAX_SHARDS = 10, 50  # for a text that is cut
SMALL_SHARD, LARGE_SHARD = 256 << 10, 64 << 20  # bytes; between the two there are MAX_SHARDS
MTIME = "changed "  # starts the version of a local file, which copies elsewhere need not share
IN_PASSAGES = " in passages"  # ends the version of a file that is cut into passages
CHECKED = 1 << 32  # bytes at the start of a source that are checked before any work


@dataclass(frozen=True)
class Span:
    """Bytes start to end of a file, with whole documents; is_book: it is cut into passages."""

    path: str
    start: int
    end: int
    is_book: bool = False
    with_labels: bool = False  # its documents start with an order, if they have labels

    def key(self):
        """Return a string that changes when shards made from this Span become invalid."""
        info = os.stat(self.path)
        name = os.path.basename(self.path)
        key = f"{name} {info.st_size} {info.st_mtime_ns} {self.start}-{self.end}"
        return key + IN_PASSAGES * self.is_book

    def data(self):
        """Return the bytes without a byte order mark; the file must not be compressed."""
        with opened(self.path) as (file, _):
            file.seek(max(self.start, file.tell()))
            data = file.read(max(0, self.end - file.tell()))
            if file.tell() < self.end:
                raise changed(self.path)
            return data


@dataclass(frozen=True)
class File:
    """
    A text file at `path`, perhaps still to be downloaded from `url`, which is read from the start;
    or `spans` of local files that make one shard. is_book: it is cut into passages.
    """

    name: str
    size: int  # bytes
    version: str  # changes when the content does
    path: str
    url: str = ""
    is_valid: bool = False  # all of it is for validation
    spans: tuple = ()
    is_book: bool = False
    with_labels: bool = False

    def labeled(self):
        """Return this File with orders from the labels of its documents."""
        spans = tuple(replace(span, with_labels=True) for span in self.spans)
        return replace(self, spans=spans, with_labels=True)

    def key(self):
        return [self.name, self.size, self.version]

    def documents(self):
        if self.spans:
            return read_documents(self.spans)
        return (text for text, _ in self.stream())

    def stream(self):
        return stream_documents(self.path, self.is_book, self.with_labels)

    def check_unchanged(self):
        """Raise UserError if the file was changed or removed since this File was made."""
        with watched_for_removal(self.path):
            now = file_here(self.path, is_book=self.is_book)
            now = file_of_spans(self.spans) if self.spans else now
        # the version of a downloaded file comes from the hub
        if now.size != self.size or (not self.url and now.version != self.version):
            raise changed(self.path)


def file_here(path, is_valid=False, is_book=False):
    """Return the File of a local path."""
    info = os.stat(path)
    version = f"{MTIME}{info.st_mtime_ns}" + IN_PASSAGES * is_book
    return File(os.path.basename(path), info.st_size, version, path, "", is_valid, (), is_book)


def file_of_spans(spans, is_valid=False):
    path, version = spans[0].path, "; ".join(span.key() for span in spans)
    size = sum(span.end - span.start for span in spans)
    return File(os.path.basename(path), size, version, path, "", is_valid, tuple(spans))


def changed(path):
    return UserError(f"{path} was changed while it was being read: run the same command again")


@contextlib.contextmanager
def watched_for_removal(path):
    try:
        yield
    except FileNotFoundError:
        raise changed(path) from None


@contextlib.contextmanager
def unchanged(spans):
    """Raise UserError after the block if a file of these Spans has changed."""
    before = {span.path: whole_file(span.path).key() for span in spans}
    yield
    for path, key in before.items():
        with watched_for_removal(path):
            if whole_file(path).key() != key:
                raise changed(path)


# ---- the files of a source, and where to cut them


def text_files(source):
    """
    Return the paths of a source, sorted: a text file, or all text files in a folder. Raises
    UserError if there are none or one is not UTF-8.
    """
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist; pass a text file or a folder of them")
    check_regular(source)
    folder, names = "", [source]
    if os.path.isdir(source):
        folder = source
        names = [name for name in os.listdir(source) if os.path.isfile(os.path.join(source, name))]
        names = data_files(names, source)
    paths = [os.path.join(folder, name) for name in names if name.lower().endswith(READABLE)]
    if not paths:
        raise UserError(
            f"{source}: expected a file or a folder of files ending in {', '.join(READABLE)}"
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
    Return the sorted names of text files. Files that only describe data are skipped. If names
    differ only in the ending, one is kept, since the files hold the same text. Prints the others.
    """
    names = [name for name in names if name.lower().endswith(READABLE)]
    names = [name for name in names if not os.path.basename(name).startswith(".")]  # macOS's ._x
    kept = {}
    for name in sorted(names, key=lambda name: (READABLE.index(full_ending(name)), name)):
        if os.path.basename(name) not in METADATA:
            kept.setdefault(name[: -len(full_ending(name))], name)
    others = set(names) - set(kept.values()) - {SIDECAR}
    if others:
        print_once(f"note: {where}: not reading {', '.join(sorted(others))}")
    if len({full_ending(name) == ".parquet" for name in kept.values()}) == 2:
        print_once(
            f"note: {where} has .parquet and other files; if they hold the same text, choose one"
        )
    return sorted(kept.values())


@functools.cache
def print_once(text):
    print(text)


def full_ending(name):
    return re.search(r"\.\w+(\.gz)?$", name.lower())[0]


@functools.cache
def check_utf8(path, size, mtime_ns):
    """Raise UserError unless a file is UTF-8; cached for the same size and time."""
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
    Return the paths of a source that must be cut into passages, a set: .txt files without
    separators that are long or the only file. Prints a note about them.
    """
    books = [
        path
        for path in paths
        if shape_of(path) == ".txt"
        and (len(paths) == 1 or os.path.getsize(path) > WHOLE)
        and not has_separator(path)
    ]
    if books:
        separator, others = SEPARATOR.decode(), f" and {len(books) - 1} other files"
        have, are = ("has", "is") if len(books) == 1 else ("have", "are")
        print_once(
            f"note: {books[0]}{others * (len(books) > 1)} {have} no {separator} between documents "
            f"and {are} cut at blank lines into documents of at least 2,000 characters"
        )
    return set(books)


def plan_shards(source, valid_source=""):
    """
    Cut a corpus into Files, one per shard, those of valid_source first. The result depends only on
    the files.
    """
    paths, valid = text_files(source), []
    if valid_source:
        valid = text_files(valid_source)
        paths = [p for p in paths if not any(os.path.samefile(p, v) for v in valid)]
        if not paths:
            raise UserError(f"{valid_source} has all files of {source}: none is left to train on")
    books = books_among(paths) | books_among(valid)
    # a single .json list is read once for all workers
    is_list = len(paths) == 1 and shape_of(paths[0]) == ".json"
    streamed = [path for path in paths if is_list or is_streamed(path)]
    paths = [path for path in paths if path not in streamed]
    spans = [whole_file(path, path in books) for path in paths]
    total = sum(span.end for span in spans)
    if not total and not streamed:
        raise UserError(f"{source} contains no text to train on: its files are empty")
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
    """Return a whole file's share of the n shards of a corpus of `total` bytes."""
    share = round(n * span.end / max(total, 1))
    return min(share, span.end // BOOK_SHARD) if span.is_book else share


def whole_file(path, is_book=False):
    return Span(path, 0, os.path.getsize(path), is_book)


def grouped(spans, size):
    """Group Spans into lists: consecutive ones together up to about half of `size` bytes."""
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
    Cut a Span into up to n Spans of similar size, between documents. A file that can only be read
    from its start stays whole. A book is cut only once, because its passages depend on the cuts.
    """
    ends, size = {span.start, span.end}, span.end - span.start
    mark = mark_of(span.path)
    if span.is_book:
        is_whole = span == whole_file(span.path, True)
        mark = paragraph_mark(span.path) if is_whole else None
    if n > 1 and mark:
        with open(span.path, "rb") as f:
            ends |= {border_after(f, span.start + size * i // n, mark) for i in range(1, n)}
    ends = sorted(end for end in ends if span.start <= end <= span.end)
    return [replace(span, start=a, end=b) for a, b in itertools.pairwise(ends)]


# ---- the text of Spans


def read_documents(spans):
    """Yield the documents of Spans."""
    for span in spans:
        if is_streamed(span.path) or shape_of(span.path) == ".json":
            documents = stream_documents(span.path, span.is_book, span.with_labels)
            yield from (text for text, _ in documents)
            continue
        where = f"{span.path} (from byte {span.start:,})" if span.start else span.path
        read = read_passages if span.is_book else reader_of(span.path, span.with_labels)
        with readable(span.path):
            yield from cleaned(read(io.BytesIO(span.data()), where))


def texts_of(span):
    """
    Yield the texts in a Span: for a .txt file its whole content, unchanged, so that it may be cut
    anywhere; for other files the documents.
    """
    if not is_plain(span.path):
        yield from read_documents([span])
        return
    with readable(span.path):
        yield span.data().decode()
