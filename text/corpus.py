"""
Text on disk as documents: which files there are, how they are cut, what they say.

Four shapes are read, told apart by the end of the name:
  .txt      documents with <|endoftext|> between them (TinyStoriesV2-GPT4)
  .json     a list of objects with the text under "story" or "text" (TinyStories_all_data)
  .jsonl    one such object a line
  .parquet  a table with a column "story" or "text"
The first three may be compressed with gzip (.txt.gz) where a file is read from its beginning.
Documents lose the white space around them, and empty ones are dropped, as in llama2.c.

To add a shape: a reader in READERS, and a way to find its document borders in BORDERS if a file
can be cut into parts.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from dataclasses import dataclass

from configurator import UserError

SEPARATOR = b"<|endoftext|>"
SIDECAR = "shards.json"  # of token shards, which may lie in the same folder
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
    """A file of text, read from its beginning: at `path`, once it is downloaded from `url`."""

    name: str
    size: int  # bytes
    version: str  # changes when the content does
    path: str
    url: str = ""
    is_valid: bool = False  # all of it is for validation

    def key(self):
        return [self.name, self.size, self.version]

    def documents(self):
        return (text for text, _ in stream_documents(self.path))


@dataclass(frozen=True)
class Section:
    """Spans of files on this machine that make one shard."""

    spans: tuple
    is_valid: bool = False
    url = ""

    @property
    def name(self):
        return os.path.basename(self.spans[0].path)

    @property
    def path(self):
        return self.spans[0].path

    @property
    def size(self):
        return sum(span.end - span.start for span in self.spans)

    def key(self):
        return [span.key() for span in self.spans]

    def documents(self):
        return read_documents(self.spans)


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
    Cut a corpus into Sections, one a shard; those of valid_source come first. Depends on the files
    alone.
    """
    files, valid = text_files(source), []
    if valid_source:
        valid_files = text_files(valid_source)
        files = [f for f in files if not any(os.path.samefile(f, v) for v in valid_files)]
        if not files:
            raise UserError(f"{valid_source} is all of {source}: nothing is left to train on")
        valid = grouped([whole_file(path) for path in valid_files], LARGE_SHARD)
    total = sum(map(os.path.getsize, files))
    n = min(max(total // SMALL_SHARD, MIN_SHARDS), MAX_SHARDS)
    n = max(n, -(-total // LARGE_SHARD))
    spans = []
    for path in files:
        # the dataset's own JSON files stay as they are; finding borders inside means parsing
        whole = ending(path) == ".json" and (len(files) > 1 or valid_source)
        n_parts = 1 if whole else max(1, round(n * os.path.getsize(path) / max(total, 1)))
        spans += cut(whole_file(path), n_parts)
    return [Section(tuple(group), True) for group in valid] + [
        Section(tuple(group)) for group in grouped(spans, total // n)
    ]


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
    """Up to n Spans of about equal size that make up a Span, cut between documents."""
    ends = [span.start, span.end]
    if n > 1:
        next_border = BORDERS[ending(span.path)](span.path)
        size = span.end - span.start
        ends += {next_border(span.start + size * i // n) for i in range(1, n)}
    ends = sorted(end for end in set(ends) if span.start <= end <= span.end)
    return [Span(span.path, a, b) for a, b in itertools.pairwise(ends)]


def border_after(mark):
    """For files whose documents end in `mark`: a function path -> (offset -> next border)."""

    def finder(path):
        def next_border(offset):
            with open(path, "rb") as f:
                f.seek(offset)
                tail = b""
                while chunk := f.read(1 << 16):
                    window = tail + chunk
                    at = window.find(mark)
                    if at >= 0:
                        return f.tell() - len(window) + at + len(mark)
                    tail = window[-len(mark) :]
            return os.path.getsize(path)

        return next_border

    return finder


def json_borders(path):
    """Like border_after for a JSON list: its objects are parsed once to find where they end."""
    with open(path, "rb") as f, readable(path):
        text = f.read().decode()
    decoder, borders, at, n_bytes = json.JSONDecoder(), [], 0, 0
    gap = re.compile(r"[\s,\[]*(?=\{)")
    while match := gap.match(text, at):
        try:
            _, end = decoder.raw_decode(text, match.end())
        except json.JSONDecodeError as e:
            raise UserError(f"{path} is not JSON: {e}") from None
        n_bytes += len(text[at:end].encode())
        borders.append(n_bytes)
        at = end
    return lambda offset: next((b for b in borders[:-1] if b > offset), n_bytes)


BORDERS = {".txt": border_after(SEPARATOR), ".json": json_borders, ".jsonl": border_after(b"\n")}


# ---- documents


def ending(path):
    """The key of READERS for a file, without .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def read_documents(spans):
    """The documents of Spans, one str after another."""
    for span in spans:
        with open(span.path, "rb") as f:
            f.seek(span.start)
            data = f.read(span.end - span.start)
            is_part = len(data) < os.path.getsize(span.path)
        if is_part and ending(span.path) == ".json":  # cut between the items of the list
            data = b"[" + data.strip(b" \t\r\n[],") + b"]"
        with readable(span.path, data, span.start):
            yield from cleaned(READERS[ending(span.path)](io.BytesIO(data), span.path))


def stream_documents(path):
    """
    Yield (document, bytes of the file read so far) of a file that need not fit into memory; only a
    .json list is read as a whole. Raises UserError if it is damaged.
    """
    with open(path, "rb") as raw, readable(path):
        file = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
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


def texts_of_list(items, path):
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a JSON list of stories")
    for i, item in enumerate(items):
        yield text_field(item, f"{path}, item {i}")


def text_of_line(line, where):
    try:
        return text_field(json.loads(line), where)
    except (ValueError, RecursionError) as e:
        why = getattr(e, "msg", str(e))
        raise UserError(f"{where} has a line that is not JSON: {why}") from None


def read_txt(file, path):
    tail, mark = b"", SEPARATOR
    while chunk := file.read(1 << 20):
        *whole, tail = (tail + chunk).split(mark)
        for document in whole:
            yield document.decode(UTF8)
        if len(tail) > LONGEST:
            raise UserError(
                f"{path} has a document of more than {LONGEST >> 20} MB: expected "
                f"{mark.decode()} between documents"
            )
    yield tail.decode(UTF8)


def read_jsonl(file, path):
    for i in itertools.count(1):
        if not (line := file.readline(LONGEST)):
            return
        if line.strip():
            yield text_of_line(line.decode(UTF8), f"{path}, line {i:,},")


def read_json(file, path):
    try:
        items = json.loads(file.read().decode(UTF8))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    yield from texts_of_list(items, path)


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
