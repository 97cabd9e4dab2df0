"""
Files of text as documents: where one ends, what a file's text is, and what is refused.

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
import gzip
import io
import json
import os
import re
import zlib

from configurator import UserError
from system.files import parse_json

SEPARATOR = b"<|endoftext|>"
HOW_TO_CUT = (
    f"{SEPARATOR.decode()} between documents: sed 's/^$/{SEPARATOR.decode()}/' IN.txt > OUT.txt "
    f"puts it in place of blank lines"
)
MARKS = {".txt": SEPARATOR, ".jsonl": b"\n"}  # at the end of a document
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
LONGEST = 1 << 28  # bytes of one document, which is in memory as a whole
LONGEST_RECORD = 1 << 25  # bytes of one in JSON or CSV, which takes up to 25 times as much memory
# a file that unpacks to more than this, and to more than MOST_PACKED times its size, is not text
LARGE, MOST_PACKED = 1 << 28, 200
LFS = b"version https://git-lfs.github.com/spec/"  # begins a file that git did not fetch


def not_utf8(what):
    return UserError(f"{what}; convert it, for example with iconv -f LATIN1 -t UTF-8")


def has_separator(path):
    with readable(path), opened(path) as (file, _):
        tail = b""
        while chunk := file.read(1 << 20):
            if SEPARATOR in tail + chunk:
                return True
            tail = chunk[-len(SEPARATOR) :]
    return False


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
