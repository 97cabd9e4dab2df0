"""
Text on disk as documents: which files there are, how they are cut, what they say.

Four shapes are read, told apart by the end of the name:
  .txt      documents with <|endoftext|> between them (TinyStoriesV2-GPT4)
  .json     a list of objects with the text under "story" or "text" (TinyStories_all_data)
  .jsonl    one such object a line
  .parquet  a table with a column "story" or "text"
The first three may be compressed with gzip (.txt.gz) where a file is read from its beginning.
Documents lose the white space around them, and empty ones are dropped, as in llama2.c.

To add a shape: a reader in READERS, its ending in READABLE, and in MARKS what ends a document.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import zlib
from dataclasses import dataclass

from configurator import UserError

SEPARATOR = b"<|endoftext|>"
SIDECAR = "shards.json"  # of token shards, which may lie in the same folder
MARKS = {".txt": SEPARATOR, ".jsonl": b"\n"}  # at the end of a document
FIELDS = ("story", "text")
PLAIN = (".txt", ".json", ".jsonl")  # endings of files that can be read from anywhere
READABLE = (*PLAIN, ".txt.gz", ".json.gz", ".jsonl.gz", ".parquet")  # or from the beginning
MIN_SHARDS, MAX_SHARDS = 10, 50  # of a text that is cut
SMALL_SHARD, LARGE_SHARD = 256 << 10, 64 << 20  # bytes; between the two there are MAX_SHARDS
MTIME = "changed "  # begins the version of a file here, which copies elsewhere need not share
UTF8 = "utf-8-sig"  # which skips the byte order mark that Windows puts before a file
LONGEST = 1 << 28  # bytes of one document, which is in memory as a whole


@dataclass(frozen=True)
class Span:
    """Bytes start to end of a file, whole documents."""

    path: str
    start: int
    end: int

    def key(self):
        """What must stay the same for a shard made from it to stay good."""
        info = os.stat(self.path)
        name = os.path.basename(self.path)
        return f"{name} {info.st_size} {info.st_mtime_ns} {self.start}-{self.end}"


@dataclass(frozen=True)
class File:
    """
    A file of text at `path`, once it is downloaded from `url`, which is read from its beginning; or
    `spans` of files here, which make one shard.
    """

    name: str
    size: int  # bytes
    version: str  # changes when the content does
    path: str
    url: str = ""
    is_valid: bool = False  # all of it is for validation
    spans: tuple = ()

    def key(self):
        return [self.name, self.size, self.version]

    def documents(self):
        if self.spans:
            return read_documents(self.spans)
        return (text for text, _ in stream_documents(self.path))


def file_here(path, is_valid=False):
    """The File of a path."""
    info = os.stat(path)
    version = f"{MTIME}{info.st_mtime_ns}"
    return File(os.path.basename(path), info.st_size, version, path, "", is_valid)


def file_of_spans(spans, is_valid=False):
    path, version = spans[0].path, "; ".join(span.key() for span in spans)
    size = sum(span.end - span.start for span in spans)
    return File(os.path.basename(path), size, version, path, "", is_valid, tuple(spans))


# ---- which files, and where to cut them


def text_files(source, endings=PLAIN):
    """The file `source`, or the files of that folder with one of `endings`, sorted."""
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist")
    paths = [source]
    if os.path.isdir(source):
        paths = sorted(os.path.join(source, name) for name in os.listdir(source))
        paths = [p for p in paths if os.path.isfile(p) and os.path.basename(p) != SIDECAR]
    paths = [path for path in paths if path.lower().endswith(endings)]
    if not paths:
        raise UserError(
            f"{source}: expected a file, or a folder of files, ending in {', '.join(endings)}"
        )
    return paths


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
        valid = grouped(map(whole_file, valid), LARGE_SHARD)
    total = sum(map(os.path.getsize, paths))
    n = max(min(max(total // SMALL_SHARD, MIN_SHARDS), MAX_SHARDS), -(-total // LARGE_SHARD))
    parts = (
        cut(whole_file(path), round(n * os.path.getsize(path) / max(total, 1))) for path in paths
    )
    train = grouped(itertools.chain.from_iterable(parts), total // n)
    if len(paths) == 1 and ending(paths[0]) == ".json":  # read once, for all workers
        return [*(file_of_spans(spans, True) for spans in valid), file_here(paths[0])]
    return [file_of_spans(spans, i < len(valid)) for i, spans in enumerate(valid + train)]


def whole_file(path):
    return Span(path, 0, os.path.getsize(path))


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
    Up to n Spans of about equal size that make up a Span, cut between documents. A .json file stays
    whole: to find its documents is to parse it.
    """
    ends, size = {span.start, span.end}, span.end - span.start
    if n > 1 and ending(span.path) in MARKS:
        mark = MARKS[ending(span.path)]
        with open(span.path, "rb") as f:
            ends |= {border_after(f, span.start + size * i // n, mark) for i in range(1, n)}
    ends = sorted(end for end in ends if span.start <= end <= span.end)
    return [Span(span.path, a, b) for a, b in itertools.pairwise(ends)]


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


def ending(path):
    """The key of READERS for a file, without .gz."""
    return os.path.splitext(os.fspath(path).lower().removesuffix(".gz"))[1]


def read_documents(spans):
    """The documents of Spans, one str after another."""
    for span in spans:
        with open(span.path, "rb") as f:
            f.seek(span.start)
            data = f.read(span.end - span.start)
        with readable(span.path, data, span.start):
            yield from cleaned(READERS[ending(span.path)](io.BytesIO(data), span.path))


def stream_documents(path):
    """
    Yield (document, bytes of the file read so far) of a file that need not fit into memory; only a
    .json list is read as a whole. Raises UserError if it is damaged.
    """
    with open(path, "rb") as raw, readable(path):
        file = gzip.GzipFile(fileobj=raw) if os.fspath(path).lower().endswith(".gz") else raw
        for text in cleaned(READERS[ending(path)](file, path)):
            yield text, raw.tell()


@contextlib.contextmanager
def readable(path, data=b"", start=0):
    """UserErrors for what goes wrong while a file, or `data` at byte `start` of it, is read."""
    try:
        yield
    except UnicodeDecodeError as e:
        at = f" at byte {start + data.find(e.object) + e.start:,}" if data else ""
        raise UserError(
            f"{path} is not UTF-8{at}; convert it, for example with iconv -t UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} is damaged or was cut off: {e}") from None


def cleaned(texts):
    """Texts without the white space around them, and without those that are nothing else."""
    for text in texts:
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
    with open(span.path, "rb") as f:
        f.seek(span.start)
        yield f.read(span.end - span.start).decode(errors="replace")


def is_plain(path):
    return ending(path) not in (".json", ".jsonl")


def text_field(item, where):
    for field in FIELDS:
        if isinstance(item, dict) and isinstance(item.get(field), str):
            return item[field]
    raise UserError(f"{where}: expected an object with a text under {' or '.join(FIELDS)}")


def read_txt(file, path):
    tail, mark = b"", SEPARATOR
    while chunk := file.read(1 << 20):
        *whole, tail = (tail + chunk).split(mark)
        for document in whole:
            yield document.removeprefix(codecs.BOM_UTF8).decode()
        if len(tail) > LONGEST:
            raise UserError(
                f"{path} has a document of more than {LONGEST >> 20} MB: expected "
                f"{mark.decode()} between documents"
            )
    yield tail.removeprefix(codecs.BOM_UTF8).decode()


def read_jsonl(file, path):
    for i, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
        if line.strip():
            where = f"{path}, line {i:,},"
            yield text_field(parsed(line, f"{where} has a line that"), where)


def read_json(file, path):
    items = parsed(file.read(), path)
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a JSON list of stories")
    for i, item in enumerate(items):
        yield text_field(item, f"{path}, item {i}")


def parsed(data, what):
    """What JSON, in bytes, says. UserError: `what` is not JSON."""
    text = data.decode(UTF8)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        why = str(e).replace("line 1 column", "column")  # of a .jsonl it would mislead
        raise UserError(f"{what} is not JSON: {why}") from None


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
        for group in range(table.num_row_groups):  # all at once they would stay in memory
            words = {"row_groups": [group], "columns": [field], "use_threads": False}
            for rows in table.iter_batches(1024, **words):
                yield from (text for text in rows.column(0).to_pylist() if text)
    except (ArrowException, OSError) as e:
        raise UserError(f"{path} is not a parquet file, or is damaged: {e}") from None


READERS = {
    ".txt": read_txt,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
