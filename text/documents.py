"""
The documents in text files: which formats can be read, where a document ends, what is refused.

The ending of the name decides the format; .json and .jsonl are told apart by the first character:
  .txt            documents separated by <|endoftext|> (TinyStoriesV2-GPT4); a long file without
                  separators, such as a book, is cut into passages at its paragraphs
  .json, .jsonl   a list of objects with the text in "story" or "text" (TinyStories_all_data), or
                  one such object per line (C4 and most others)
  .csv            a table with a column "story" or "text"
  .parquet        likewise
All except .parquet may be compressed with gzip (.txt.gz). Text is UTF-8; a byte order mark at the
start of a file is skipped. \\r\\n and \\r become newlines. White space around documents is removed
and empty documents are dropped, as in llama2.c.

Files are streamed, so memory depends on the longest document. There is a limit on its length, and
on how far a compressed file may expand.

To add a format, add a reader to READERS, its ending to READABLE and, if a file can be cut after a
document, the end mark of a document to MARKS.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from functools import partial

from configurator import UserError
from system.files import parse_json
from text.orders import LABELS, labeled

SEPARATOR = b"<|endoftext|>"
HOW_TO_CUT = (
    f"{SEPARATOR.decode()} between documents, for example instead of blank lines: "
    f"tr -d '\\r' < IN.txt | sed 's/^$/{SEPARATOR.decode()}/' > OUT.txt"
)
MARKS = {".txt": SEPARATOR, ".jsonl": b"\n"}  # what ends a document
# A passage of a text without separators: at least 2,000 characters and at most 4,000, up to a blank
# line, or else to the end of a line or word
PASSAGE = re.compile(
    r".{2000,4000}?\n[ \t]*\n|.{2000,4000}?\n|.{2000,4000}?\s|.{1,4000}", re.DOTALL
)
FIELDS = ("story", "text")
EXPECTED_JSON = "expected a list of objects or one object per line"
JSON, BLANKS, BLANK = json.JSONDecoder(), " \t\r\n", re.compile(r"[ \t\r\n]*")
TEXT = (".txt", ".json", ".jsonl", ".csv")
READABLE = (*TEXT, ".parquet", *(f"{ending}.gz" for ending in TEXT))
MAX_DOCUMENT = 1 << 28  # bytes of a document, which is in memory as a whole
MAX_RECORD = 1 << 25  # bytes of a document in JSON or CSV, which takes up to 25 times the memory
# a file that unpacks to more than LARGE bytes and to more than MAX_RATIO times its size is not text
LARGE, MAX_RATIO = 1 << 28, 200
LFS = b"version https://git-lfs.github.com/spec/"  # the start of a file that git did not fetch


def not_utf8(problem):
    return UserError(f"{problem}; convert it, for example with iconv -f LATIN1 -t UTF-8")


def has_separator(path):
    with readable(path), opened(path) as (file, _):
        tail = b""
        while chunk := file.read(1 << 20):
            if SEPARATOR in tail + chunk:
                return True
            tail = chunk[-len(SEPARATOR) :]
    return False


def paragraph_mark(path):
    """Return what ends a paragraph in a file: a blank line, or a newline if it has none."""
    with open(path, "rb") as f:
        head = f.read(1 << 20)
    return next((mark for mark in (b"\n\n", b"\n\r\n") if mark in head), b"\n")


def border_after(f, offset, mark):
    """Return where the first `mark` at or after `offset` ends, or the end of the open file."""
    f.seek(offset)
    tail = b""
    while chunk := f.read(1 << 16):
        window = tail + chunk
        if (at := window.find(mark)) >= 0:
            return f.tell() - len(window) + at + len(mark)
        tail = window[-len(mark) :]
    return f.tell()


class Unpacked(gzip.GzipFile):
    """A gzip file. Reading it raises UserError if it expands too far."""

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
    """Raise UserError if an open file is too small to unpack to `n_bytes` of text."""
    if n_bytes > LARGE and n_bytes > MAX_RATIO * os.fstat(raw.fileno()).st_size:
        raise UserError(
            f"{raw.name} unpacks to more than {MAX_RATIO} times its size, so it is not text"
        )


def too_long(where, limit=MAX_RECORD):
    return UserError(f"{where} is longer than {limit >> 20} MB: expected one document")


@contextlib.contextmanager
def opened(path):
    """
    Open a file; yield (file, raw): the file unpacked, after a byte order mark if it has one, and
    the file on disk. The position of raw shows how much has been read.
    """
    with open(path, "rb") as raw:
        file = Unpacked(fileobj=raw) if os.fspath(path).lower().endswith(".gz") else raw
        head = file.read(1 << 6)
        if head.startswith(LFS):
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder"
            )
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield file, raw


def shape_of(path):
    """Return the key of READERS for a file: .json for a list, .jsonl for an object per line."""
    ending = os.path.splitext(os.fspath(path).lower().removesuffix(".gz"))[1]
    if ending not in (".json", ".jsonl"):
        return ending if ending in READERS else ".txt"
    with readable(path), opened(path) as (file, _):
        return ".json" if file.read(1 << 12).lstrip()[:1] == b"[" else ".jsonl"


def mark_of(path):
    """Return what ends a document in a file that can be cut, or None."""
    return None if is_streamed(path) else MARKS.get(shape_of(path))


def is_streamed(path):
    """Return whether a file can only be read from its start."""
    return os.fspath(path).lower().endswith((".gz", ".csv", ".parquet"))


def stream_documents(path, is_book=False, with_labels=False):
    """
    Yield (document, bytes of the file read so far), without holding the file in memory. is_book:
    the documents are passages; with_labels: they start with an order, if the file has labels for
    them. Raises UserError if the file is damaged.
    """
    read = read_passages if is_book else reader_of(path, with_labels)
    with readable(path), opened(path) as (file, raw):
        for text in cleaned(read(file, path)):
            yield text, raw.tell()


def reader_of(path, with_labels=False):
    """Return the function of READERS for a file."""
    shape = shape_of(path)
    has_labels = with_labels and shape != ".txt"
    return partial(READERS[shape], with_labels=True) if has_labels else READERS[shape]


@contextlib.contextmanager
def readable(path):
    """Turn errors of reading a file into UserErrors."""
    try:
        yield
    except UnicodeDecodeError:
        raise not_utf8(f"{path} is not UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} is damaged: {e}; get the file again") from None


def cleaned(texts):
    """Yield texts without white space around them, except empty ones; line ends become newlines."""
    for text in texts:
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = text.strip()
        if text:  # JSON may contain half of a surrogate pair, which cannot be encoded
            yield text.encode("utf-8", "replace").decode()


def is_plain(path):
    return mark_of(path) == SEPARATOR


def text_field(item, where, with_labels=False):
    """Return the text of a parsed document, after an order from its labels; null is no text."""
    values = [item[field] for field in FIELDS if isinstance(item, dict) and field in item]
    text = next((value for value in values if value is not None), "")
    if item is None or (values and isinstance(text, str)):
        return labeled(text, item) if with_labels and text else text
    raise UserError(f"{where}: expected an object with text in a field {' or '.join(FIELDS)}")


def read_txt(file, path):
    tail, mark = b"", SEPARATOR
    while chunk := file.read(1 << 20):
        *whole, tail = (tail + chunk).split(mark)
        for document in whole:
            yield document.decode()
        if len(tail) > MAX_DOCUMENT:
            raise UserError(
                f"{path} has a document of more than {MAX_DOCUMENT >> 20} MB: expected {HOW_TO_CUT}"
            )
    yield tail.decode()


def read_passages(file, path):
    text = io.TextIOWrapper(file, "utf-8")  # also turns \r\n into a newline
    rest = ""
    while chunk := text.read(1 << 20):
        *whole, rest = PASSAGE.findall(rest + chunk)
        yield from whole
    yield rest


def read_jsonl(file, path, with_labels=False):
    for i, line in enumerate(iter(lambda: file.readline(MAX_RECORD + 1), b""), 1):
        where = f"{path}, line {i:,}"
        if len(line) > MAX_RECORD:
            raise too_long(where)
        if line.strip():
            yield text_field(parsed(line, where), where, with_labels)


def read_json(file, path, with_labels=False):
    for i, item in enumerate(items_of(file, path)):
        yield text_field(item, f"{path}, item {i:,}", with_labels)


def items_of(file, path):
    """Yield the items of a JSON list while reading it; raise UserError if it is not one."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, at, before, n, is_end = "", 0, "[", 0, False
    while not is_end:
        try:
            items, at = next_item(text, at, before)
        except (ValueError, RecursionError) as e:  # perhaps only because there is more to read
            if len(text) - at > MAX_RECORD:
                raise too_long(f"item {n:,} of {path}") from None
            chunk = file.read(max(1 << 16, len(text) - at))
            if not chunk:
                problem = f"{path}, item {n:,} is not JSON ({getattr(e, 'msg', e)})"
                raise UserError(f"{problem}: {EXPECTED_JSON}") from None
            text, at = text[at:] + decode(chunk), 0
            continue
        yield from items
        before, n, is_end = ",", n + 1, not items
    text = text[at:]
    while text or (text := decode(file.read(1 << 20))):
        if text.strip(BLANKS):
            raise UserError(f"{path} is not JSON (text follows the list): {EXPECTED_JSON}")
        text = ""


def next_item(text, at, before):
    """
    Parse the next item of a JSON list, which starts at `at` with the character `before`. Return
    ([item], end), or ([], end) at the end of the list. Raises ValueError or RecursionError if
    `text` is too short or not JSON.
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
    if text[end : end + 1] not in (",", "]"):  # also inside a number that is not complete yet
        raise ValueError("expected , or ]")
    return [item], end


def parsed(data, where):
    """Parse JSON from bytes; the UserError for other data starts with `where`."""
    try:
        return parse_json(data.decode(), where)
    except UserError as e:
        problem = str(e).replace("line 1 column", "column")  # line 1 would be wrong for a .jsonl
        raise UserError(f"{problem}: {EXPECTED_JSON}") from None


def read_csv(file, path, with_labels=False):
    csv.field_size_limit(MAX_RECORD)
    text, size = io.TextIOWrapper(file, "utf-8", newline=""), 0

    def lines():
        nonlocal size
        while line := text.readline(MAX_RECORD):
            size += len(line)  # since the last row
            if size >= MAX_RECORD:
                raise too_long(f"a row of {path}")
            yield line

    try:
        for i, row in enumerate(csv.DictReader(lines()), 1):
            size = 0
            yield text_field(row, f"{path}, row {i:,}", with_labels)
    except csv.Error as e:
        raise UserError(f"{path} is not CSV: {e}") from None


def read_parquet(file, path, with_labels=False):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"reading {path} needs the package pyarrow: pip install '.[web]'") from None
    try:
        table = parquet.ParquetFile(file, buffer_size=1 << 20)
        names = table.schema_arrow.names
        field = next((name for name in FIELDS if name in names), None)
        if field is None:
            raise UserError(
                f"{path}: expected a column {' or '.join(FIELDS)}, but it has {', '.join(names)}"
            )
        kind = table.schema_arrow.field(field).type
        kind = getattr(kind, "value_type", kind) if "dictionary" in str(kind) else kind
        if "string" not in str(kind) or "<" in str(kind):
            raise UserError(f"{path}: column {field} is of type {kind}: expected string")
        labels = [name for name in LABELS if with_labels and name in names]
        yield from parquet_texts(table, field, file, labels)
    except (ArrowException, OSError) as e:
        raise UserError(f"{path} is damaged or not a parquet file: {e}") from None


def parquet_texts(table, field, file, labels=()):
    """
    Yield the texts in a column of a ParquetFile, after orders from the columns `labels`; raise
    UserError if they expand too far.
    """
    from pyarrow import parquet

    groups, n_bytes = range(table.num_row_groups), 0
    check_ratio(sum(table.metadata.row_group(i).total_byte_size for i in groups), file)
    if os.fstat(file.fileno()).st_size < LARGE:
        # keeps repeated texts in memory only once, but takes twice as long for other texts
        table = parquet.ParquetFile(file, buffer_size=1 << 20, read_dictionary=[field])
    for group in groups:  # one by one, or all of them would stay in memory
        options = {"row_groups": [group], "columns": [field, *labels], "use_threads": False}
        for rows in table.iter_batches(1024, **options):
            column = rows.column(field)
            if hasattr(column, "dictionary"):
                values, places = column.dictionary, column.indices.to_pylist()
                texts = (None if i is None else values[i].as_py() for i in places)
            else:
                texts = column.to_pylist()
            items = rows.select(list(labels)).to_pylist() if labels else itertools.repeat(None)
            for text, item in zip(texts, items, strict=False):
                if text:
                    n_bytes += len(text)
                    check_ratio(n_bytes, file)
                    yield labeled(text, item) if labels else text


READERS = {
    ".txt": read_txt,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
