"""
Text on disk as documents: which files there are, how they are cut into shards, what they say.

Three shapes are read, told apart by the end of the name:
  .txt    documents with <|endoftext|> between them (TinyStoriesV2-GPT4)
  .json   a list of objects with the text under "story" or "text" (TinyStories_all_data)
  .jsonl  one such object a line
Documents lose the white space around them, and empty ones are passed over, as in llama2.c.

Files of any size can be read as a stream too, from their beginning: then .parquet tables, and the
three compressed with gzip (.txt.gz), are known as well.

To add a shape: a reader in READERS and a way to find its document borders in BORDERS; for streams
one in STREAMS.
"""

import gzip
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
MIN_SHARDS, MAX_SHARDS = 10, 50  # of a text that is cut; the first is 2 % or more of it
SMALL_SHARD, LARGE_SHARD = 256 << 10, 64 << 20  # bytes; between the two there are MAX_SHARDS
UTF8 = "utf-8-sig"  # which passes over the mark that Windows puts before a file
LONGEST = 1 << 28  # bytes of one document of a stream, which is in memory as a whole


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


def text_files(source):
    """The files behind a path: itself, or those of a folder with a known ending, sorted."""
    if os.path.isfile(source):
        if os.path.splitext(source)[1] not in READERS:
            raise UserError(f"{source}: expected a file ending in {', '.join(READERS)}")
        return [source]
    if not os.path.isdir(source):
        raise UserError(f"{source} does not exist")
    names = sorted(n for n in os.listdir(source) if os.path.splitext(n)[1] in READERS)
    files = [os.path.join(source, n) for n in names if n != SIDECAR]
    if not files:
        raise UserError(f"folder {source} has no file ending in {', '.join(READERS)}")
    return files


def plan_shards(source, valid_source=""):
    """
    Cut a corpus into shards: a list of lists of Spans, the first of which is for validation: all of
    `valid_source` where one is given, else the first part. Depends on the files alone.
    """
    files = text_files(source)
    valid = []
    if valid_source:
        valid_files = text_files(valid_source)
        valid = [[Span(f, 0, os.path.getsize(f)) for f in valid_files]]
        files = [f for f in files if not any(os.path.samefile(f, v) for v in valid_files)]
        if not files:
            raise UserError(f"{valid_source} is all of {source}: nothing is left to train on")
    total = sum(map(os.path.getsize, files))
    n = min(max(total // SMALL_SHARD, MIN_SHARDS), MAX_SHARDS)
    n = max(n, -(-total // LARGE_SHARD))
    spans = []
    for path in files:
        size = os.path.getsize(path)
        # The dataset's own JSON shards stay as they are; finding borders inside means parsing
        whole = path.endswith(".json") and (len(files) > 1 or valid_source)
        cuts = [] if whole else cut_points(path, max(1, round(n * size / max(total, 1))))
        ends = [0, *cuts, size]
        spans += [Span(path, a, b) for a, b in itertools.pairwise(ends) if b > a]
    train = grouped(spans, total // n)
    if len(train) + len(valid) < 2:
        for _ in itertools.chain.from_iterable(map(read_documents, train)):
            pass  # if it cannot be read at all, that says why
        raise UserError(
            f"{source} cannot be cut into a training and a validation part: expected several "
            f"documents, in .txt files with {SEPARATOR.decode()} between them; "
            f"or give a validation text with --valid_source"
        )
    return valid + train


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


def cut_points(path, n):
    """Up to n - 1 byte offsets between documents that cut a file into about equal parts."""
    size = os.path.getsize(path)
    next_border = BORDERS[os.path.splitext(path)[1]](path)
    cuts = {next_border(size * i // n) for i in range(1, n)}
    return sorted(c for c in cuts if 0 < c < size)


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
    text = read_text(Span(path, 0, os.path.getsize(path)))
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


def read_text(span):
    with open(span.path, "rb") as f:
        f.seek(span.start)
        data = f.read(span.end - span.start)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{span.path} is not UTF-8 at byte {span.start + e.start:,}; convert it, "
            f"for example with iconv -t UTF-8"
        ) from None


def read_txt(span):
    yield from read_text(span).split(SEPARATOR.decode())


def text_field(item, where):
    for field in FIELDS:
        if isinstance(item, dict) and isinstance(item.get(field), str):
            return item[field]
    raise UserError(f"{where}: expected an object with a text under {' or '.join(FIELDS)}")


def read_json(span):
    text = read_text(span)
    if span.end - span.start < os.path.getsize(span.path):  # a part of the list, cut between items
        text = "[" + text.strip(" \t\r\n[],") + "]"
    try:
        items = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{span.path} is not JSON: {e}") from None
    yield from texts_of_list(items, span.path)


def texts_of_list(items, path):
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a JSON list of stories")
    for i, item in enumerate(items):
        yield text_field(item, f"{path}, item {i}")


def read_jsonl(span):
    for line in read_text(span).split("\n"):
        if line.strip():
            yield text_of_line(line, span.path)


def text_of_line(line, where):
    try:
        return text_field(json.loads(line), where)
    except (ValueError, RecursionError) as e:
        why = getattr(e, "msg", str(e))
        raise UserError(f"{where} has a line that is not JSON: {why}") from None


READERS = {".txt": read_txt, ".json": read_json, ".jsonl": read_jsonl}
BORDERS = {".txt": border_after(SEPARATOR), ".json": json_borders, ".jsonl": border_after(b"\n")}


def read_documents(spans):
    """The documents of a list of Spans, one str after another."""
    for span in spans:
        yield from cleaned(READERS[os.path.splitext(span.path)[1]](span))


def cleaned(texts):
    """Texts without the white space around them, and without those that are nothing else."""
    for text in texts:
        text = text.strip()
        if text:  # JSON can say half of a surrogate pair, which is no text
            yield text.encode("utf-8", "replace").decode()


# ---- streams


def stream_ending(path):
    """The key of STREAMS for a file, "" where there is none."""
    name = path.lower()
    ending = os.path.splitext(name.removesuffix(".gz"))[1]
    is_known = ending in STREAMS and not (ending == ".parquet" and name.endswith(".gz"))
    return ending if is_known else ""


def stream_documents(path):
    """
    Yield (document, bytes of the file read so far) of a file that need not fit into memory; only a
    .json list is read as a whole. Raises UserError where it is damaged.
    """
    read = STREAMS[stream_ending(path)]
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
        try:
            for text in cleaned(read(file, path)):
                yield text, raw.tell()
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8; convert it, for example with iconv") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise UserError(f"{path} is damaged or was cut off: {e}") from None


def stream_txt(file, path):
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


def stream_jsonl(file, path):
    for i in itertools.count(1):
        if not (line := file.readline(LONGEST)):
            return
        if line.strip():
            yield text_of_line(line.decode(UTF8), f"{path}, line {i:,},")


def stream_json(file, path):
    try:
        items = json.loads(file.read().decode(UTF8))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    yield from texts_of_list(items, path)


def stream_parquet(file, path):
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
        raise UserError(f"{path} is no parquet file, or damaged: {e}") from None


STREAMS = {
    ".txt": stream_txt,
    ".json": stream_json,
    ".jsonl": stream_jsonl,
    ".parquet": stream_parquet,
}
