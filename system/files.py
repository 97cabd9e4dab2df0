"""
Files that are whole or absent: atomic writes, resumable downloads, safe unpacking.

Everything is made beside its final place under a name ending in .part and renamed when complete, so
that a crash, a full disk or a dropped connection never leaves half a file under a real name.
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
ADDRESS_HINT = "check the address or give another with --url"
OVERLAP = 1 << 16  # bytes that are fetched again where a server does not say which file it sends

# of archives: what a gigabyte of headers, folders or zeros in a small file may cost
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
MOST_HEADERS = 1 << 17  # bytes of the headers of one member
MOST_MEMBERS, MOST_FOLDERS = 100_000, 50
MOST_RATIO, SMALL_ARCHIVE = 100, 64 << 20  # times the archive's size, and bytes that always may be
# what tarfile raises for archives that are cut, damaged or hostile
DAMAGE = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)
DAMAGE += (MemoryError, zlib.error, lzma.LZMAError)


@contextlib.contextmanager
def atomic_write(path, mode="wb", durable=True):
    """
    Open a file beside `path` for writing and rename it to `path` once the block ends without an
    exception, flushed to disk if `durable`: a file that is checked before it is used need not be.
    On an exception nothing is left behind and `path` is untouched.
    A folder or a device is not replaced: UserError.
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
        if isinstance(e, OSError) and e.filename in (None, part):  # None: for a full disk
            e.filename = path
        raise


@contextlib.contextmanager
def named(path):
    """Let an OSError that names no file, like that of a full disk, name `path`."""
    try:
        yield
    except OSError as e:
        if e.errno and not e.filename:
            e.filename = path
        raise


def flush_folder(folder):
    """Have the names in a folder on disk too, so that a rename outlives a power cut."""
    if os.name == "nt":  # has no such call for folders
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        fd = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def flush_files(paths):
    """Have files on disk that were written with durable=False; the disk gets several at a time."""

    def flush(path):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(flush, paths))
    for folder in {os.path.dirname(path) for path in paths}:
        flush_folder(folder)


def remove(path):
    """Delete a file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def replace(path, target):
    """os.replace, for a folder as well: there are some microseconds in which `target` is absent."""
    old = None
    if os.path.isdir(target) or (os.path.isdir(path) and os.path.exists(target)):
        old = f"{target}.old.part"
        remove(old)
        os.replace(target, old)
    os.replace(path, target)
    if old:
        remove(old)


def link_or_copy(path, target):
    """A second name for a file or for those of a folder; a copy where that is impossible."""

    def one(source, destination):
        try:
            os.link(source, destination)
        except OSError:
            with open(source, "rb") as src, named(destination), open(destination, "wb") as dst:
                shutil.copyfileobj(src, dst, 1 << 22)
                dst.flush()
                os.fsync(dst.fileno())

    remove(target)
    if os.path.isdir(path):
        shutil.copytree(path, target, copy_function=one)
        flush_folder(target)
    else:
        one(path, target)


def checksum(path):
    """[size, CRC-32] of a file."""
    crc, size = 0, 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]


def check_regular(path):
    """Raise UserError for a pipe, a device or a socket, on which a reader could wait for ever."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path} is a pipe or a device: expected a file; write the data to one")


def check_file(path):
    """check_regular() where a folder is wrong as well."""
    check_regular(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: expected a file")


def check_not_pointer(path):
    """Raise UserError for the few lines that Git LFS leaves in place of a large file."""
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


def parse_json(text, what):
    """What JSON says, in a str or in bytes. Raises UserError: `what` is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # numbers of 5,000 digits, and deep nesting
        raise UserError(f"{what} is not JSON: {e}") from None


def read_json(path):
    """The object in a JSON file, as a dict. Raises UserError for anything else."""
    check_regular(path)
    try:
        with open(path, encoding="utf-8-sig") as f:  # Windows puts a byte order mark first
            text = f.read()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    found = parse_json(text, path)
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: expected a JSON object")
    return found


class Incomplete(Exception):
    """A transfer that ended early and may be continued."""


def download(url, path, retries=6, backoff=1.0, token="", hint=ADDRESS_HINT):
    """
    Fetch `url` (or copy a local path) to `path`. Bytes go to `path`.part; a dropped connection is
    retried with exponential back-off, and a later call goes on from where the last one stopped if
    the server still has the same file. The size is checked against the server's before the rename.

    retries: attempts in a row that come no further; backoff: seconds before the second of them;
    token: for the server, which does not hand it on to others; hint: what to do where it refuses.
    Raises UserError where the server refuses or keeps failing; the .part file stays for next time.
    """
    import requests  # here, since little but this needs it, and it takes long
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
            # the last two: an address or a header of the server that is malformed
            raise UserError(f"cannot download {url}: {e}") from None
        size = part_size(path)
        failures, furthest = (0 if size > furthest else failures + 1), max(size, furthest)
        if failures >= retries:
            raise UserError(
                f"gave up on {url} after {retries} attempts without a new byte: {reason}; "
                f"the {size:,} bytes so far are kept, run the same command to continue"
            )
        wait = backoff * 2 ** max(failures - 1, 0)
        print(f"{reason}; trying again in {wait:g} s")
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
    """One attempt at a download: from the end of the .part file on, if the server can do that."""
    import requests

    part, tag_path = path + ".part", path + ".part.tag"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    have, tag = part_size(path), read_tag(tag_path)
    headers = {"Accept-Encoding": "identity"}  # sizes are those of the file, not of a compression
    if token:
        headers["Authorization"] = f"Bearer {token}"
    start = have
    if have:
        if tag[0].startswith('"') or tag[1]:  # a changed file is sent whole, not spliced
            headers["If-Range"] = tag[0] if tag[0].startswith('"') else tag[1]
        else:  # nothing tells a changed file, except its size and content
            start -= min(have, OVERLAP)
        headers["Range"] = f"bytes={start}-"
    # closed at once: requests reads the body of a redirect into memory and inflates it
    hooks = {"response": lambda r, **_: r.close() if r.is_redirect else None}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S, hooks=hooks) as r:
        if r.status_code >= 500 or r.status_code in (408, 429):
            raise Incomplete(f"the server answered {r.status_code} {r.reason}")
        if r.status_code not in (200, 206) and not (r.status_code == 416 and have):
            raise UserError(f"{url}: the server answered {r.status_code} {r.reason}; {hint}")
        check_encoding(r, url)
        if r.status_code == 200:
            start, total = 0, length_of(r, url)
        else:
            total = total_of(r, start, have, part, tag[2])
        if r.status_code == 200 or not have:
            open(part, "wb").close()  # before the new tag is written: old bytes never get it
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
    """What identifies the file that a .part file is from: ETag, Last-Modified, size; or ""."""
    if not os.path.isfile(path):
        return ["", "", ""]
    with open(path, encoding="latin-1") as f:  # as in HTTP
        return [*f.read().split("\n"), "", "", ""][:3]


def write_tag(path, tag):
    with named(path), open(path, "w", encoding="latin-1") as f:
        f.write("\n".join(tag))


def start_over(part, why):
    """The Incomplete to raise once the .part file is of no use; deletes it."""
    remove(part)
    return Incomplete(f"{why}; starting over")


def check_encoding(r, url):
    """Raise UserError for a compression that was not asked for: it could unpack to anything."""
    encoding = r.headers.get("Content-Encoding", "identity").lower()
    # of a .gz file some servers say that it is an encoding; its bytes are the file's all the same
    if encoding != "identity" and not urlsplit(url).path.endswith((".gz", ".tgz")):
        raise UserError(
            f"{url}: the server sent it compressed ({encoding}), though not asked to; "
            f"get the file from another address"
        )


def length_of(r, url):
    """The size in bytes that the answer with a whole file announces, or None."""
    length = r.headers.get("Content-Length")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise UserError(
            f"{url}: the server's Content-Length is {length[:40]!r}: expected a number; "
            f"get the file from another address"
        )
    return None if length is None else int(length)


def total_of(r, start, have, part, known):
    """
    The size in bytes of the file of which an answer with 206 brings the bytes from `start` on, or
    416 says that there are none after the `have` that we have; `known`: what an earlier answer said
    of it, or "". Raises Incomplete where the range is not the one that was asked for.
    """
    pattern = r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18}|\*)"
    match = re.fullmatch(pattern, r.headers.get("Content-Range", ""))
    if r.status_code == 206 and not (match and match[1] and int(match[1]) == start):
        raise start_over(part, "the server sent another range than asked")
    if r.status_code == 416 and not (match and match[2] == str(have)):
        raise start_over(part, "the partial file does not fit the server's")
    total = match[2] if match[2] != "*" else known
    if not total.isdecimal():
        raise start_over(part, "the server does not say how long the file is")
    return int(total)


def save_body(r, part, start, total):
    """
    Write the body of an answer to the .part file from `start` on. Raises Incomplete where it ends
    before `total`, or differs from what the file has there already.
    """
    import urllib3

    name = os.path.basename(part).removesuffix(".part")
    bar = progress(total=total, initial=start, unit="B", unit_scale=True, desc=name)
    with bar, named(part), open(part, "rb+") as f:
        at = f.seek(start)
        while True:
            try:  # what has come, and as it comes: a break loses nothing, nothing is inflated
                chunk = r.raw.read1(1 << 18, decode_content=False)
            except urllib3.exceptions.HTTPError:
                raise Incomplete(f"the connection broke at {at:,} bytes") from None
            if not chunk:
                break
            if not chunk.startswith(f.read(len(chunk))):
                raise start_over(part, "the file on the server has changed")
            f.seek(at)
            f.write(chunk)
            at += len(chunk)
            bar.update(len(chunk))
            if total is not None and at > total:
                raise start_over(part, f"more came than the {total:,} bytes that were announced")
    if total is not None and at < total:
        raise Incomplete(f"the connection ended at {at:,} of {total:,} bytes")
    if os.path.getsize(part) > at:
        raise start_over(part, "the file on the server has become shorter")


class Limited:
    """
    The bytes of an archive for tarfile, which takes headers into memory whole and follows chains of
    them: no more than `room` bytes until that is set again, and `most` together.
    """

    def __init__(self, file, most):
        self.file, self.most, self.room = file, most, MOST_HEADERS

    def tell(self):
        return self.file.tell()

    def seek(self, place):
        self.check(place)  # in a compressed file it is reached by reading
        return self.file.seek(place)

    def read(self, n):
        self.room -= n
        if self.room < 0:
            raise tarfile.ReadError("a header in it is longer than it could be")
        data = self.file.read(n)
        self.check(self.tell())
        return data

    def check(self, place):
        if place > self.most:
            raise UserError(
                f"it unpacks to more than {self.most:,} bytes, {MOST_RATIO} times its size; refused"
            )


@contextlib.contextmanager
def decompressed(path):
    """(file, raw): a tar archive's bytes, Limited, and the archive as it is on disk."""
    check_regular(path)
    with open(path, "rb") as raw, contextlib.ExitStack() as stack:
        head = raw.read(8)
        raw.seek(0)
        kinds = [kind for mark, kind in COMPRESSIONS.items() if head.startswith(mark)]
        file = stack.enter_context(kinds[0](raw)) if kinds else raw
        most = SMALL_ARCHIVE + MOST_RATIO * os.path.getsize(path)
        yield Limited(file, most), raw


def unpack(archive, folder):
    """
    Unpack a tar archive so that `folder`, absent or empty before, appears with all of its files or
    not at all. An archive that holds one top-level folder is unpacked without it. Raises UserError,
    leaving nothing behind, for a damaged archive, one with a member that is a link, a device, or
    outside the folder, and one that unpacks to far more than its size.
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
            raise UserError("it holds no files")
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(top, folder)
    except UserError as e:
        raise UserError(f"cannot unpack {archive}: {e}") from None
    except (OSError, *DAMAGE) as e:
        if isinstance(e, OSError) and e.errno:
            raise UserError(f"cannot unpack {archive} to {folder}: {e.strerror}") from None
        why = str(e) or type(e).__name__
        raise UserError(
            f"{archive} is no whole tar archive ({why}); delete it and download it again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def extract_all(archive, root):
    """Write the files of an archive below `root`; see unpack()."""
    desc, size = f"unpack {os.path.basename(archive)}", os.path.getsize(archive)
    bar = progress(total=size, unit="B", unit_scale=True, desc=desc)
    # opened by hand: the position in the archive is the progress
    with bar, decompressed(archive) as (file, raw), tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            if len(tar.members) > MOST_MEMBERS:
                raise UserError(f"it has more than {MOST_MEMBERS:,} files; refused")
            if member.size < 0:
                raise tarfile.ReadError("a file in it has a negative size")
            file.room = member.size + MOST_HEADERS
            name = os.path.basename(member.name)
            # attributes that macOS keeps beside files
            if not (name.startswith("._") or member.name.startswith("__MACOSX")):
                extract_member(tar, member, root)
            file.room = MOST_HEADERS
            bar.update(raw.tell() - bar.n)
        file.room = 2 * file.most
        check_end(tar)


def check_end(tar):
    """Raise unless the end marker is there; read on to the end, where gzip checks the CRC."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end mark is not where its last file ends")
    while tar.fileobj.read(1 << 20):
        pass


def extract_member(tar, member, root):
    """Write one regular file of an archive below `root`; links, devices and `..` are refused."""
    # by hand, because the data filter of tarfile is absent from Python 3.11.2, which Debian 12 has
    name = os.path.normpath(member.name)
    if os.path.isabs(name) or name.split(os.sep)[0] == ".." or "\\" in name or ":" in name:
        raise UserError(f"archive member {member.name!r} points outside the archive; refused")
    if name.count(os.sep) > MOST_FOLDERS:
        raise UserError(f"archive member {name[:40]!r}... lies in too many folders; refused")
    target = os.path.join(root, name)
    if member.isdir():
        os.makedirs(target, exist_ok=True)
    elif member.isreg() and not member.issparse():  # holes of any size come from nothing
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tar.extractfile(member) as src, open(target, "wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
    else:
        raise UserError(f"archive member {member.name!r} is not a regular file; refused")
