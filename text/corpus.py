"""
Text on disk as documents: which files there are, how they are cut, what they say.

These shapes are read, told apart by the end of the name, and JSON by its first character:
  .txt            documents with <|endoftext|> between them (TinyStoriesV2-GPT4); a long file
                  without any, such as a book, is cut into passages at its paragraphs
  .json, .jsonl   a list of objects with the text under "story" or "text" (TinyStories_all_data),
                  or one such object a line (C4, and most others)
  .csv            a table with a heading "story" or "text"
  .parquet        the same as a table of columns
All but the last may be compressed with gzip (.txt.gz). Text is UTF-8, and a byte order mark at the
beginning of a file is skipped. Lines end with a newline, also where Windows ended them. Documents
lose the white space around them, and empty ones are dropped, as in llama2.c.

Files are read in steps: memory depends on the longest document. Its length has a limit, and so has
the factor by which a compressed file may expand.

To add a shape: a reader in READERS, its ending in READABLE, and in MARKS what ends a document if a
file may be cut there.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import re
import zlib
from dataclasses import dataclass, replace

from configurator import UserError
from system.files import check_regular, parse_json

SEPARATOR = b"<|endoftext|>"
HOW_TO_CUT = (
    f"{SEPARATOR.decode()} between documents: sed 's/^$/{SEPARATOR.decode()}/' IN.txt > OUT.txt "
    f"puts it in place of blank lines"
)
SIDECAR = "shards.json"  # of token shards, which may lie in the same folder
# JSON beside data that is not data
METADATA = (SIDECAR, "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
MARKS = {".txt": SEPARATOR, ".jsonl": b"\n"}  # at the end of a document
BOOK_SHARD = 64 << 10  # bytes, at least, of a part of a file that is cut into passages
WHOLE = 16 << 10  # bytes up to which a file without separators is one document
# A passage of a text without separators: 2,000 characters or more, up to the next blank line within
# 2,000 more; or else the next line or word
PASSAGE = re.compile(
    r".{2000,4000}?\n[ \t]*\n|.{2000,4000}?\n|.{2000,4000}?\s|.{1,4000}", re.DOTALL
)
FIELDS = ("story", "text")
OF_OBJECTS = "expected a list of objects, or an object a line"
JSON, BLANKS, BLANK = json.JSONDecoder(), " \t\r\n", re.compile(r"[ \t\r\n]*")
TEXT = (".txt", ".json", ".jsonl", ".csv")
READABLE = (*TEXT, ".parquet", *(f"{ending}.gz" for ending in TEXT))
MIN_SHARDS, MAX_SHARDS = 10, 50  # of a text that is cut
SMALL_SHARD, LARGE_SHARD = 256 << 10, 64 << 20  # bytes; between the two there are MAX_SHARDS
MTIME = "changed "  # begins the version of a file here, which copies elsewhere need not share
IN_PASSAGES = " in passages"  # ends the version of a file without separators that is cut
LONGEST = 1 << 28  # bytes of one document, which is in memory as a whole
LONGEST_RECORD = 1 << 25  # bytes of one in JSON or CSV, which takes up to 25 times as much memory
# a file that unpacks to more than this, and to more than MOST_PACKED times its size, is not text
LARGE, MOST_PACKED = 1 << 28, 200
LFS = b"version https://git-lfs.github.com/spec/"  # begins a file that git did not fetch
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


def not_utf8(what):
    return UserError(f"{what}; convert it, for example with iconv -f LATIN1 -t UTF-8")


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


def has_separator(path):
    with readable(path), opened(path) as (file, _):
        tail = b""
        while chunk := file.read(1 << 20):
            if SEPARATOR in tail + chunk:
                return True
            tail = chunk[-len(SEPARATOR) :]
    return False


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


def end_of_paragraph(path):
    """A blank line as it is in a file, or, if it has none, a newline."""
    with open(path, "rb") as f:
        head = f.read(1 << 20)
    return next((mark for mark in (b"\n\n", b"\n\r\n") if mark in head), b"\n")


def border_after(f, offset, mark):
    """Where the first `mark` in an open file, from `offset` on, ends; or the end of the file."""
    f.seek(offset)
    tail = b""
    while chunk := f.read(1 << 16):
        window = tail + chunk
        if (at := window.find(mark)) >= 0:
            return f.tell() - len(window) + at + len(mark)
        tail = window[-len(mark) :]
    return f.tell()


# ---- documents


class Unpacked(gzip.GzipFile):
    """A file of gzip. Reading it raises UserError where it expands too far."""

    def read(self, size=-1):
        return self.checked(super().read(size))

    def read1(self, size=-1):
        return self.checked(super().read1(size))

    def readline(self, size=-1):
        return self.checked(super().readline(size))

    def checked(self, data):
        check_ratio(self.tell(), self.fileobj)
        return data


def check_ratio(n_bytes, raw):
    """Raise UserError if `n_bytes` came from an open file that is far too small for them."""
    if n_bytes > LARGE and n_bytes > MOST_PACKED * os.fstat(raw.fileno()).st_size:
        raise UserError(
            f"{raw.name} unpacks to more than {MOST_PACKED} times its size: not read, since text "
            f"does not"
        )


def too_long(where, limit=LONGEST_RECORD):
    return UserError(f"{where} is longer than {limit >> 20} MB: expected one document there")


@contextlib.contextmanager
def opened(path):
    """
    (file, raw): a file's bytes, unpacked, after a byte order mark that Windows may put there; and
    the file as it is, whose position tells how much is read.
    """
    with open(path, "rb") as raw:
        file = Unpacked(fileobj=raw) if os.fspath(path).lower().endswith(".gz") else raw
        head = file.read(1 << 6)
        if head.startswith(LFS):
            raise UserError(f"{path} is a pointer of Git LFS; get the file with: git lfs pull")
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield file, raw


def shape_of(path):
    """The key of READERS for a file: .json is a list, and .jsonl an object a line."""
    ending = os.path.splitext(os.fspath(path).lower().removesuffix(".gz"))[1]
    if ending not in (".json", ".jsonl"):
        return ending if ending in READERS else ".txt"
    with readable(path), opened(path) as (file, _):
        return ".json" if file.read(1 << 12).lstrip()[:1] == b"[" else ".jsonl"


def mark_of(path):
    """What ends a document in a file that may be cut; None for other files."""
    return None if is_streamed(path) else MARKS.get(shape_of(path))


def is_streamed(path):
    """Whether a file can only be read from its beginning."""
    return os.fspath(path).lower().endswith((".gz", ".csv", ".parquet"))


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


def stream_documents(path, is_book=False):
    """
    Yield (document, bytes of the file read so far) of a file that need not fit into memory;
    is_book: passages. Raises UserError if it is damaged.
    """
    read = read_passages if is_book else READERS[shape_of(path)]
    with readable(path), opened(path) as (file, raw):
        for text in cleaned(read(file, path)):
            yield text, raw.tell()


@contextlib.contextmanager
def readable(path):
    """UserErrors for what goes wrong while a file is read."""
    try:
        yield
    except UnicodeDecodeError:
        raise not_utf8(f"{path} is not UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} is damaged or was cut off: {e}") from None


def cleaned(texts):
    """
    Texts without the white space around them, and without those that are nothing else; lines end
    with a newline alone.
    """
    for text in texts:
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = text.strip()
        if text:  # JSON can say half of a surrogate pair, which is no text
            yield text.encode("utf-8", "replace").decode()


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


def is_plain(path):
    return mark_of(path) == SEPARATOR


def text_field(item, where):
    """The text of a document; null is an empty one."""
    values = [item[field] for field in FIELDS if isinstance(item, dict) and field in item]
    text = next((value for value in values if value is not None), "")
    if item is None or (values and isinstance(text, str)):
        return text
    raise UserError(f"{where}: expected an object with a text under {' or '.join(FIELDS)}")


def read_txt(file, path):
    tail, mark = b"", SEPARATOR
    while chunk := file.read(1 << 20):
        *whole, tail = (tail + chunk).split(mark)
        for document in whole:
            yield document.decode()
        if len(tail) > LONGEST:
            raise UserError(
                f"{path} has a document of more than {LONGEST >> 20} MB: expected {HOW_TO_CUT}"
            )
    yield tail.decode()


def read_passages(file, path):
    text = io.TextIOWrapper(file, "utf-8")  # also makes \r\n a newline
    rest = ""
    while chunk := text.read(1 << 20):
        *whole, rest = PASSAGE.findall(rest + chunk)
        yield from whole
    yield rest


def read_jsonl(file, path):
    for i, line in enumerate(iter(lambda: file.readline(LONGEST_RECORD + 1), b""), 1):
        where = f"{path}, line {i:,}"
        if len(line) > LONGEST_RECORD:
            raise too_long(where)
        if line.strip():
            yield text_field(parsed(line, where), where)


def read_json(file, path):
    for i, item in enumerate(items_of(file, path)):
        yield text_field(item, f"{path}, item {i:,}")


def items_of(file, path):
    """Yield the items of a JSON list, each of them once it is read. Raises UserError."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, at, before, n, is_end = "", 0, "[", 0, False
    while not is_end:
        try:
            found, at = next_item(text, at, before)
        except (ValueError, RecursionError) as e:  # perhaps since there is more of it to read
            if len(text) - at > LONGEST_RECORD:
                raise too_long(f"item {n:,} of {path}") from None
            chunk = file.read(max(1 << 16, len(text) - at))
            if not chunk:
                why = getattr(e, "msg", e)
                raise UserError(f"{path}, item {n:,} is not JSON ({why}): {OF_OBJECTS}") from None
            text, at = text[at:] + decode(chunk), 0
            continue
        yield from found
        before, n, is_end = ",", n + 1, not found
    text = text[at:]
    while text or (text := decode(file.read(1 << 20))):
        if text.strip(BLANKS):
            raise UserError(f"{path} is not JSON (text follows the list): {OF_OBJECTS}")
        text = ""


def next_item(text, at, before):
    """
    ([item], end) of the next item of a JSON list, from `at` on, where `before` comes first; ([],
    end) at the end of the list. Raises ValueError or RecursionError where `text` ends before that.
    """
    at = BLANK.match(text, at).end()
    if before == "," and text[at : at + 1] == "]":
        return [], at + 1
    if text[at : at + 1] != before:
        raise ValueError(f"expected {before}")
    at = BLANK.match(text, at + 1).end()
    if before == "[" and text[at : at + 1] == "]":
        return [], at + 1
    item, end = JSON.raw_decode(text, at)
    end = BLANK.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):  # also within a number that is read in part
        raise ValueError("expected , or ]")
    return [item], end


def parsed(data, what):
    """What JSON, in bytes, says. UserError: `what` is not JSON."""
    try:
        return parse_json(data.decode(), what)
    except UserError as e:
        why = str(e).replace("line 1 column", "column")  # of a .jsonl it would mislead
        raise UserError(f"{why}: {OF_OBJECTS}") from None


def read_csv(file, path):
    csv.field_size_limit(LONGEST_RECORD)
    text, size = io.TextIOWrapper(file, "utf-8", newline=""), 0

    def lines():
        nonlocal size
        while line := text.readline(LONGEST_RECORD):
            size += len(line)  # since the last row
            if size >= LONGEST_RECORD:
                raise too_long(f"a row of {path}")
            yield line

    try:
        for i, row in enumerate(csv.DictReader(lines()), 1):
            size = 0
            yield text_field(row, f"{path}, row {i:,}")
    except csv.Error as e:
        raise UserError(f"{path} is not CSV: {e}") from None


def read_parquet(file, path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading it needs pyarrow: pip install .[web]") from None
    try:
        table = parquet.ParquetFile(file, buffer_size=1 << 20)
        names = table.schema_arrow.names
        field = next((name for name in FIELDS if name in names), None)
        if field is None:
            raise UserError(
                f"{path}: expected a column {' or '.join(FIELDS)}; it has {', '.join(names)}"
            )
        kind = table.schema_arrow.field(field).type
        kind = getattr(kind, "value_type", kind) if "dictionary" in str(kind) else kind
        if "string" not in str(kind) or "<" in str(kind):
            raise UserError(f"{path}: its column {field} is of type {kind}: expected string")
        yield from parquet_texts(table, field, file)
    except (ArrowException, OSError) as e:
        raise UserError(f"{path} is not a parquet file, or is damaged: {e}") from None


def parquet_texts(table, field, file):
    """Yield the texts in a column of a ParquetFile. Raises UserError where they expand too far."""
    from pyarrow import parquet

    groups, n_bytes = range(table.num_row_groups), 0
    check_ratio(sum(table.metadata.row_group(i).total_byte_size for i in groups), file)
    if os.fstat(file.fileno()).st_size < LARGE:
        # texts that occur often are stored once, and stay so; for others this takes twice as long
        table = parquet.ParquetFile(file, buffer_size=1 << 20, read_dictionary=[field])
    for group in groups:  # all at once they would stay in memory
        words = {"row_groups": [group], "columns": [field], "use_threads": False}
        for rows in table.iter_batches(1024, **words):
            column = rows.column(0)
            if hasattr(column, "dictionary"):
                values, places = column.dictionary, column.indices.to_pylist()
                texts = (None if i is None else values[i].as_py() for i in places)
            else:
                texts = column.to_pylist()
            for text in filter(None, texts):
                n_bytes += len(text)
                check_ratio(n_bytes, file)
                yield text


READERS = {
    ".txt": read_txt,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
