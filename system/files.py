"""
Files that are complete or absent: atomic writes, resumable downloads, safe unpacking.

Each file is written beside its final place under a name ending in .part, and renamed when complete.
A crash, a full disk or a dropped connection never leaves a partial file under the final name.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import re
import shutil
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from configurator import UserError, printable
from system.progress import progress

TIMEOUT_S = 30  # without a byte from the server
ADDRESS_HINT = "check the address, or use another with --url=ADDRESS"
OVERLAP = 1 << 16  # bytes fetched again and compared if a server does not identify its files

COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# Limits for archives: a small file can hold gigabytes of headers, folders or zeros
MAX_HEADER_BYTES = 1 << 17  # per member
MAX_MEMBERS, MAX_DEPTH = 100_000, 50
# an archive may unpack to FREE_BYTES plus MAX_RATIO times its size
MAX_RATIO, FREE_BYTES = 100, 64 << 20
# what tarfile raises for truncated, damaged or hostile archives
DAMAGE = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)
DAMAGE += (MemoryError, zlib.error, lzma.LZMAError)


@contextlib.contextmanager
def atomic_write(path, mode="wb", durable=True):
    """
    Open a temporary file for writing and rename it to `path` when the block ends. If the block
    raises, the temporary file is deleted and `path` is untouched. `durable` flushes to disk first;
    a file that is verified before use does not need it. Raises UserError if `path` is a folder or
    a device.
    """
    path = os.fspath(path)
    if (os.path.exists(path) and not os.path.isfile(path)) or not os.path.basename(path):
        raise UserError(f"cannot write {path}: it is a folder or a device, not a file")
    folder = os.path.dirname(path) or "."
    is_new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(part, path)
        if durable:
            flush_folder(os.path.dirname(path))
    except BaseException as e:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if isinstance(e, OSError) and e.filename in (None, part):  # None: a full disk
            e.filename = path
        raise


@contextlib.contextmanager
def named(path):
    """Add `path` to an OSError without a file name, such as the one for a full disk."""
    try:
        yield
    except OSError as e:
        if e.errno and not e.filename:
            e.filename = path
        raise


def flush_folder(folder):
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    if os.name == "nt":  # Windows cannot flush folders
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        fd = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def flush_files(paths):
    """Flush files that were written with durable=False to disk, several at a time."""

    def flush(path):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(flush, paths))
    for folder in {os.path.dirname(path) for path in paths}:
        flush_folder(folder)


def remove(path):
    """Delete a file or a folder if it exists."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def replace(path, target):
    """os.replace() that also replaces folders; `target` is absent for some microseconds then."""
    old = None
    if os.path.isdir(target) or (os.path.isdir(path) and os.path.exists(target)):
        old = f"{target}.old.part"
        remove(old)
        os.replace(target, old)
    os.replace(path, target)
    if old:
        remove(old)


def link_or_copy(path, target):
    """Hard-link a file, or every file of a folder; copy if links are impossible."""

    def link(source, destination):
        try:
            os.link(source, destination)
        except OSError:
            with open(source, "rb") as src, named(destination), open(destination, "wb") as dst:
                shutil.copyfileobj(src, dst, 1 << 22)
                dst.flush()
                os.fsync(dst.fileno())

    remove(target)
    if os.path.isdir(path):
        shutil.copytree(path, target, copy_function=link)
        flush_folder(target)
    else:
        link(path, target)


def checksum(path):
    """Return [size, CRC-32] of a file."""
    crc, size = 0, 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]


def check_regular(path):
    """Raise UserError for a pipe, a device or a socket, where reading could block forever."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path} is a pipe or a device: save its data to a file first")


def check_file(path):
    """Raise UserError for anything but a regular file, if `path` exists."""
    check_regular(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: expected a file")


def check_not_pointer(path):
    """Raise UserError for a Git LFS pointer, a few lines that stand for a large file."""
    with open(path, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its folder"
            )


def write_json(path, value):
    """Write `value` to `path` as indented JSON, atomically."""
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


def parse_json(text, name):
    """Parse JSON from str or bytes; if it is invalid, raise UserError that starts with `name`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # also numbers of 5,000 digits, and deep nesting
        raise UserError(f"{name} is not JSON: {e}") from None


def read_json(path):
    """Read a JSON file that holds an object, as a dict. Raises UserError for any other file."""
    check_regular(path)
    try:
        with open(path, encoding="utf-8-sig") as f:  # Windows puts a byte order mark first
            text = f.read()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


class Incomplete(Exception):
    """A transfer ended early and can be retried."""


def download(url, path, retries=6, backoff=1.0, token="", hint=ADDRESS_HINT):
    """
    Download `url` (or copy a local path) to `path`. The bytes go to `path`.part. A dropped
    connection is retried with exponential backoff, and a later call continues where the last one
    stopped, if the server still has the same file. The size is checked before the rename.

    retries: attempts in a row without progress; backoff: seconds before the second of them;
    token: sent to this server only, not to where it redirects; hint: what to do if it refuses.
    Raises UserError if the server refuses or keeps failing; the .part file stays for next time.
    """
    import requests  # here, because importing it is slow and little else needs it
    import urllib3

    if "://" not in url:
        return copy_local(url, path)
    failures, furthest = 0, part_size(path)
    while True:
        try:
            transfer(url, path, token, hint)
            return
        except Incomplete as e:
            reason = printable(str(e))
        except (requests.ConnectionError, requests.Timeout) as e:
            reason = f"no connection to {urlsplit(url).hostname} ({type(e).__name__})"
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as e:
            # the last two: a malformed address or header from the server
            raise UserError(f"cannot download {url}: {e}") from None
        size = part_size(path)
        failures, furthest = (0 if size > furthest else failures + 1), max(size, furthest)
        if failures >= retries:
            raise UserError(
                f"gave up on {url} after {retries} attempts without progress: {reason}; "
                f"{size:,} bytes are kept: run the same command to continue"
            )
        wait = backoff * 2 ** max(failures - 1, 0)
        print(f"{reason}; retrying in {wait:g} s")
        time.sleep(wait)


def copy_local(source, path):
    source = os.path.expanduser(source)
    if not os.path.isfile(source):
        raise UserError(f"{source} is neither a URL nor a file on this machine")
    if os.path.exists(path) and os.path.samefile(source, path):
        return
    with open(source, "rb") as src, atomic_write(path) as dst:
        shutil.copyfileobj(src, dst, 1 << 20)


def part_size(path):
    return os.path.getsize(path + ".part") if os.path.exists(path + ".part") else 0


def transfer(url, path, token="", hint=ADDRESS_HINT):
    """Attempt a download once, from the end of the .part file if the server supports that."""
    import requests

    part, tag_path = path + ".part", path + ".part.tag"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    have, tag = part_size(path), read_tag(tag_path)
    headers = {"Accept-Encoding": "identity"}  # sizes must be those of the file
    if token:
        headers["Authorization"] = f"Bearer {token}"
    start = have
    if have:
        if tag[0].startswith('"') or tag[1]:  # if the file has changed, it is sent whole
            headers["If-Range"] = tag[0] if tag[0].startswith('"') else tag[1]
        else:  # only size and content can show that the file has changed
            start -= min(have, OVERLAP)
        headers["Range"] = f"bytes={start}-"
    # close redirects at once: requests would read and decompress their bodies into memory
    hooks = {"response": lambda r, **_: r.close() if r.is_redirect else None}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S, hooks=hooks) as r:
        if r.status_code >= 500 or r.status_code in (408, 429):
            raise Incomplete(f"the server returned {r.status_code} {r.reason}")
        if r.status_code not in (200, 206) and not (r.status_code == 416 and have):
            raise UserError(f"{url}: the server returned {r.status_code} {r.reason}; {hint}")
        check_encoding(r, url)
        if r.status_code == 200:
            start, total = 0, length_of(r, url)
        else:
            total = total_of(r, start, have, part, tag[2])
        if r.status_code == 200 or not have:
            open(part, "wb").close()  # before the new tag is written, so that no old bytes match it
        new = [r.headers.get("ETag", ""), r.headers.get("Last-Modified", ""), str(total or "")]
        if start and any(a and b and a != b for a, b in zip(tag, new, strict=True)):
            raise start_over(part, "the file on the server has changed")
        if r.status_code != 416:
            if not start:
                write_tag(tag_path, new)
            save_body(r, part, start, total)
    os.replace(part, path)
    remove(tag_path)


def read_tag(path):
    """Return [ETag, Last-Modified, size] of the file that a .part file comes from, or ""s."""
    if not os.path.isfile(path):
        return ["", "", ""]
    with open(path, encoding="latin-1") as f:  # HTTP's encoding
        return [*f.read().split("\n"), "", "", ""][:3]


def write_tag(path, tag):
    with named(path), open(path, "w", encoding="latin-1") as f:
        f.write("\n".join(tag))


def start_over(part, reason):
    """Delete a useless .part file and return the Incomplete to raise."""
    remove(part)
    return Incomplete(f"{reason}; starting over")


def check_encoding(r, url):
    """Raise UserError for unrequested compression, which could unpack to any size."""
    encoding = r.headers.get("Content-Encoding", "identity").lower()
    # some servers declare a .gz file as an encoding, but its bytes are still those of the file
    if encoding != "identity" and not urlsplit(url).path.endswith((".gz", ".tgz")):
        raise UserError(
            f"{url}: the server sent unrequested compression ({encoding}); "
            f"download the file from another address"
        )


def length_of(r, url):
    """Return the Content-Length in bytes of a response with a whole file, or None."""
    length = r.headers.get("Content-Length")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise UserError(
            f"{url}: the server's Content-Length is {length[:40]!r}: expected a number; "
            f"download the file from another address"
        )
    return None if length is None else int(length)


def total_of(r, start, have, part, known):
    """
    Return the total size in bytes of a file, from a 206 response with its bytes from `start`, or a
    416 response, which means that the .part file's `have` bytes are all. known: the size according
    to an earlier response, or "". Raises Incomplete if the response has another range.
    """
    pattern = r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18}|\*)"
    match = re.fullmatch(pattern, r.headers.get("Content-Range", ""))
    if r.status_code == 206 and not (match and match[1] and int(match[1]) == start):
        raise start_over(part, "the server sent the wrong range")
    if r.status_code == 416 and not (match and match[2] == str(have)):
        raise start_over(part, "the partial file does not match the one on the server")
    total = match[2] if match[2] != "*" else known
    if not total.isdecimal():
        raise start_over(part, "the server does not report the size of the file")
    return int(total)


def save_body(r, part, start, total):
    """
    Write the body of a response to the .part file from `start`. Raises Incomplete if it ends before
    `total`, or differs from bytes that the file already has.
    """
    import urllib3

    name = os.path.basename(part).removesuffix(".part")
    bar = progress(total=total, initial=start, unit="B", unit_scale=True, desc=name)
    with bar, named(part), open(part, "rb+") as f:
        at = f.seek(start)
        while True:
            try:  # raw bytes as they arrive: a lost connection loses none, none are decompressed
                chunk = r.raw.read1(1 << 18, decode_content=False)
            except urllib3.exceptions.HTTPError:
                raise Incomplete(f"the connection was lost at {at:,} bytes") from None
            if not chunk:
                break
            if not chunk.startswith(f.read(len(chunk))):
                raise start_over(part, "the file on the server has changed")
            f.seek(at)
            f.write(chunk)
            at += len(chunk)
            bar.update(len(chunk))
            if total is not None and at > total:
                raise start_over(part, f"the server sent more than the announced {total:,} bytes")
    if total is not None and at < total:
        raise Incomplete(f"the connection closed at {at:,} of {total:,} bytes")
    if os.path.getsize(part) > at:
        raise start_over(part, "the file on the server is shorter now")


class Limited:
    """
    The bytes of an archive for tarfile, which reads whole headers into memory and follows chains of
    them. At most `room` bytes can be read until it is set again, and `limit` bytes in total.
    """

    def __init__(self, file, limit):
        self.file, self.limit, self.room = file, limit, MAX_HEADER_BYTES

    def tell(self):
        return self.file.tell()

    def seek(self, place):
        self.check(place)  # a compressed file seeks by reading
        return self.file.seek(place)

    def read(self, n):
        self.room -= n
        if self.room < 0:
            raise tarfile.ReadError("a header is longer than allowed")
        data = self.file.read(n)
        self.check(self.tell())
        return data

    def check(self, place):
        if place > self.limit:
            raise UserError(
                f"it unpacks to more than {self.limit:,} bytes, over {MAX_RATIO} times its size"
            )


@contextlib.contextmanager
def decompressed(path):
    """Yield (Limited decompressed bytes, raw file) of a tar archive."""
    check_regular(path)
    with open(path, "rb") as raw, contextlib.ExitStack() as stack:
        head = raw.read(8)
        raw.seek(0)
        openers = [opener for magic, opener in COMPRESSIONS.items() if head.startswith(magic)]
        file = stack.enter_context(openers[0](raw)) if openers else raw
        yield Limited(file, FREE_BYTES + MAX_RATIO * os.path.getsize(path)), raw


def unpack(archive, folder):
    """
    Unpack a tar archive so that `folder`, absent or empty before, appears with all files or not at
    all. A single top-level folder in the archive is dropped from the paths. Raises UserError,
    leaving nothing on disk, if the archive is damaged, unpacks to far more than its size, or has a
    member that is a link, a device, or outside the folder.
    """
    part = f"{folder}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        extract_all(archive, part)
        entries = os.listdir(part)
        inner = os.path.join(part, entries[0]) if len(entries) == 1 else ""
        top = inner if os.path.isdir(inner) else part
        if not os.listdir(top):
            raise UserError("it contains no files")
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(top, folder)
    except UserError as e:
        raise UserError(f"cannot unpack {archive}: {e}") from None
    except (OSError, *DAMAGE) as e:
        if isinstance(e, OSError) and e.errno:
            raise UserError(f"cannot unpack {archive} to {folder}: {e.strerror}") from None
        reason = str(e) or type(e).__name__
        raise UserError(
            f"{archive} is not a complete tar archive: {reason}; delete it and download it again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def extract_all(archive, root):
    """Write the files of an archive into `root`; see unpack()."""
    desc, size = f"unpack {os.path.basename(archive)}", os.path.getsize(archive)
    bar = progress(total=size, unit="B", unit_scale=True, desc=desc)
    # tarfile does not open the file, so that the position in it can show the progress
    with bar, decompressed(archive) as (file, raw), tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            if len(tar.members) > MAX_MEMBERS:
                raise UserError(f"it has more than {MAX_MEMBERS:,} files")
            if member.size < 0:
                raise tarfile.ReadError("a file has a negative size")
            file.room = member.size + MAX_HEADER_BYTES
            name = os.path.basename(member.name)
            # skip the attributes that macOS stores beside files
            if not (name.startswith("._") or member.name.startswith("__MACOSX")):
                extract_member(tar, member, root)
            file.room = MAX_HEADER_BYTES
            bar.update(raw.tell() - bar.n)
        file.room = 2 * file.limit
        check_end(tar)


def check_end(tar):
    """Raise if the end marker is missing; read to the end, where gzip checks the CRC."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end marker is missing")
    while tar.fileobj.read(1 << 20):
        pass


def extract_member(tar, member, root):
    """Write one regular file of an archive into `root`; refuse links, devices and `..`."""
    # not by tarfile's data filter, which Python 3.11.2 of Debian 12 does not have
    name = os.path.normpath(member.name)
    if os.path.isabs(name) or name.split(os.sep)[0] == ".." or "\\" in name or ":" in name:
        raise UserError(f"its member {member.name!r} points outside the folder")
    if name.count(os.sep) > MAX_DEPTH:
        raise UserError(f"its member {name[:40]!r}... is in too many nested folders")
    target = os.path.join(root, name)
    if member.isdir():
        os.makedirs(target, exist_ok=True)
    elif member.isreg() and not member.issparse():  # a sparse file can have holes of any size
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tar.extractfile(member) as src, open(target, "wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
    else:
        raise UserError(f"its member {member.name!r} is not a regular file")
