"""
Files that are whole or absent: atomic writes, resumable downloads, safe unpacking.

Everything is made beside its final place under a name ending in .part and renamed when complete, so
that a crash, a full disk or a dropped connection never leaves half a file under a real name.
"""

import contextlib
import json
import lzma
import os
import shutil
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from configurator import UserError
from system.progress import progress

TIMEOUT_S = 30  # without a byte from the server
ADDRESS_HINT = "check the address or give another with --url"


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
        if isinstance(e, OSError):  # which names the .part file, or for a full disk nothing
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
            with open(source, "rb") as src, open(destination, "wb") as dst:
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


def read_json(path):
    """The object in a JSON file, as a dict. Raises UserError for anything else."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # Windows puts a byte order mark first
            found = json.load(f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
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

    retries: attempts in a row that bring nothing new; backoff: seconds before the second of them;
    token: for the server, which does not hand it on to others; hint: what to do where it refuses.
    Raises UserError where the server refuses or keeps failing; the .part file stays for next time.
    """
    import requests  # here, since little but this needs it, and it takes long

    if "://" not in url:
        return copy_local(url, path)
    failures, have = 0, part_size(path)
    while True:
        try:
            transfer(url, path, token, hint)
            return
        except Incomplete as e:
            reason = str(e)
        except (requests.ConnectionError, requests.Timeout) as e:
            reason = f"no connection to {urlsplit(url).hostname} ({type(e).__name__})"
        except requests.RequestException as e:
            raise UserError(f"cannot download {url}: {e}") from None
        grown = part_size(path) > have
        failures, have = (0 if grown else failures + 1), part_size(path)
        if failures >= retries:
            raise UserError(
                f"gave up on {url} after {retries} attempts without a new byte: {reason}; "
                f"the {have:,} bytes so far are kept, run the same command to continue"
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

    part, tag_path = path + ".part", path + ".part.etag"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    have = part_size(path)
    headers = {"Accept-Encoding": "identity"}  # sizes are those of the file, not of a compression
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if have:
        headers["Range"] = f"bytes={have}-"
        if os.path.exists(tag_path):  # a changed file is sent whole, not spliced onto the old one
            with open(tag_path, encoding="utf-8") as f:
                headers["If-Range"] = f.read()
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as r:
        if r.status_code == 416:  # nothing beyond what we have: complete, or a different file
            total = r.headers.get("Content-Range", "").rpartition("/")[2]
            if total != str(have):
                os.remove(part)
                raise Incomplete("the partial file does not fit the server's; starting over")
        elif r.status_code in (200, 206):
            start = have if r.status_code == 206 else 0
            if start and not r.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                os.remove(part)
                raise Incomplete("the server sent another range than asked; starting over")
            save_body(r, part, tag_path, start)
        elif r.status_code >= 500 or r.status_code in (408, 429):
            raise Incomplete(f"the server answered {r.status_code} {r.reason}")
        else:
            raise UserError(f"{url}: the server answered {r.status_code} {r.reason}; {hint}")
    os.replace(part, path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(tag_path)


def save_body(r, part, tag_path, start):
    """Append a response's body to the .part file from `start` on and check the final size."""
    import requests

    length = r.headers.get("Content-Length")
    total = start + int(length) if length is not None else None
    tag = r.headers.get("ETag")
    if not start:  # emptied before the new tag is written: old bytes never get it
        open(part, "wb").close()
        if tag and not tag.startswith("W/"):
            with open(tag_path, "w", encoding="utf-8") as f:
                f.write(tag)
    name = os.path.basename(part).removesuffix(".part")
    bar = progress(total=total, initial=start, unit="B", unit_scale=True, desc=name)
    with bar, open(part, "ab") as f:
        try:
            for chunk in r.iter_content(1 << 18):
                f.write(chunk)
                bar.update(len(chunk))
        except requests.RequestException:
            raise Incomplete(f"the connection broke at {f.tell():,} bytes") from None
        except OSError as e:
            raise UserError(f"cannot write {part}: {e.strerror}") from None
    size = os.path.getsize(part)
    if total is not None and size < total:
        raise Incomplete(f"the connection ended at {size:,} of {total:,} bytes")
    if total is not None and size > total:
        os.remove(part)
        raise Incomplete(f"{size:,} bytes came where {total:,} were announced; starting over")


def unpack(archive, folder):
    """
    Unpack a tar archive so that `folder`, absent or empty before, appears with all of its files or
    not at all. An archive that holds one top-level folder is unpacked without it. Raises UserError,
    leaving nothing behind, for a damaged archive or one with a member that is a link, a device, or
    outside the folder.
    """
    part = f"{folder}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    size = os.path.getsize(archive)
    bar = progress(
        total=size, unit="B", unit_scale=True, desc=f"unpack {os.path.basename(archive)}"
    )
    try:
        # opened by hand: the position in the archive is the progress
        with bar, open(archive, "rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if name.startswith("._") or member.name.startswith("__MACOSX"):
                    continue  # attributes that macOS keeps beside files
                extract_member(tar, member, part)
                bar.update(raw.tell() - bar.n)
            check_end(tar)
        entries = os.listdir(part)
        inner = os.path.join(part, entries[0]) if len(entries) == 1 else ""
        top = inner if os.path.isdir(inner) else part
        if not os.listdir(top):
            raise UserError(f"{archive} holds no files")
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(top, folder)
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
        if isinstance(e, OSError) and e.errno:
            raise UserError(f"cannot unpack {archive} to {folder}: {e.strerror}") from None
        raise UserError(
            f"{archive} is no whole tar archive ({e}); delete it and download it again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    target = os.path.join(root, name)
    if member.isdir():
        os.makedirs(target, exist_ok=True)
    elif member.isreg():
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tar.extractfile(member) as src, open(target, "wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
    else:
        raise UserError(f"archive member {member.name!r} is not a regular file; refused")
