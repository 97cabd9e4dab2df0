"""Downloads from a server that misbehaves, and archives that are broken or hostile."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import refused, script

from configurator import UserError
from system.files import atomic_write, download, link_or_copy, read_json, unpack
from text.corpus import text_files

BODY = os.urandom(1 << 16) * 12  # 768 KiB


class Server(ThreadingHTTPServer):
    """Serves BODY; `plan` says what to do with each request, its last entry with all others."""

    def __init__(self, plan):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.ranges = list(plan), []
        self.etag = '"one"'
        self.body = BODY
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        action = server.plan.pop(0) if len(server.plan) > 1 else server.plan[0]
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        body, start = server.body, 0
        if isinstance(action, int):
            self.send_error(action)
            return
        if asked and action != "no range":
            same = self.headers.get("If-Range", server.etag) == server.etag
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if same else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", server.etag)
        if action != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[: len(rest) // 3] if action == "drop" else rest)


@pytest.fixture
def serve():
    servers = []

    def start(*plan):
        servers.append(Server(plan))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "plan",
    [
        ["whole"],
        ["no length"],
        ["drop", "drop", "drop", "whole"],
        ["drop", "no range"],
        [500, 503, 429, "whole"],
        ["drop", 500, "drop", "whole"],
    ],
)
def test_the_whole_file_arrives(serve, tmp_path, plan):
    path = tmp_path / "sub" / "file.bin"
    download(serve(*plan).url, str(path), backoff=0.01)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(BODY).digest()
    assert os.listdir(path.parent) == ["file.bin"]


def test_a_later_call_resumes(serve, tmp_path):
    path = tmp_path / "file.bin"
    server = serve("drop", 500)
    with pytest.raises(UserError, match="run the same command to continue"):
        download(server.url, str(path), retries=2, backoff=0.01)
    assert not path.exists() and (tmp_path / "file.bin.part").stat().st_size == len(BODY) // 3
    server.plan[:] = ["whole"]
    download(server.url, str(path), backoff=0.01)
    assert path.read_bytes() == BODY and server.ranges[-1] == f"bytes={len(BODY) // 3}-"


def test_a_file_that_changed_is_not_spliced(serve, tmp_path):
    path = tmp_path / "file.bin"
    server = serve("drop", 500)
    with pytest.raises(UserError):
        download(server.url, str(path), retries=2, backoff=0.01)
    server.plan[:], server.etag, server.body = ["whole"], '"two"', BODY[::-1]
    download(server.url, str(path), backoff=0.01)
    assert path.read_bytes() == BODY[::-1]


@pytest.mark.parametrize("extra, fits", [(b"", True), (b"more than there is", False)])
def test_a_complete_part_file_is_used_or_discarded(serve, tmp_path, extra, fits):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY + extra)
    server = serve("whole")
    download(server.url, str(path), backoff=0.01)
    assert path.read_bytes() == BODY and len(server.ranges) == (1 if fits else 2)


class Scripted(BaseHTTPRequestHandler):
    """Answers each request with the next function in the server's plan, then with the last one."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        plan, asked = self.server.plan, self.headers.get("Range")
        self.server.asked.append(asked)
        answer = plan.pop(0) if len(plan) > 1 else plan[0]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if len(self.server.asked) > 40:
            answer = gone
        with contextlib.suppress(ConnectionError):
            answer(self, start)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


def gone(handler, start):
    handler.answer(410, b"")


def sends(body, n=None, tag=None, **headers):
    """Send up to n bytes of a body from the requested start, but announce all the rest."""

    def answer(handler, start):
        about = {**(tag or {}), "Content_Length": len(body) - start, **headers}
        if start:
            about = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}", **about}
        end = None if n is None else start + n
        handler.answer(206 if start else 200, body[start:end], **about)

    return answer


@pytest.fixture
def serve_plan():
    servers = []

    def start(*plan):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
        server.plan, server.asked = list(plan), []
        server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


TAGS = [{"ETag": '"1"'}, {"Last_Modified": "Sun, 01 Jan 2023 00:00:00 GMT"}, {"ETag": 'W/"1"'}, {}]
OTHER_TAGS = [
    {"ETag": '"2"'},
    {"Last_Modified": "Sun, 01 Jan 2023 00:00:09 GMT"},
    {"ETag": 'W/"2"'},
    {},
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_range_shorter_than_requested_is_not_taken_for_the_whole(serve_plan, tmp_path, tag):
    def short(handler, start):
        part = BODY[start : start + 200_000]
        at = f"bytes {start}-{start + len(part) - 1}/{len(BODY)}"
        handler.answer(206, part, Content_Range=at, Content_Length=len(part), **tag)

    path = tmp_path / "file.bin"
    download(serve_plan(sends(BODY, 70_000, tag), short).url, str(path), backoff=0.01)
    assert path.read_bytes() == BODY and os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("tag, other", list(zip(TAGS, OTHER_TAGS, strict=True)))
@pytest.mark.parametrize("new", [BODY[::-1], BODY[::-1] + b"longer", BODY[:300_000]])
def test_a_file_that_changes_midway_is_not_spliced(serve_plan, tmp_path, tag, other, new):
    # on a server that ignores If-Range
    path = tmp_path / "file.bin"
    server = serve_plan(sends(BODY, 400_000, tag), sends(new, tag=other))
    download(server.url, str(path), backoff=0.01)
    assert path.read_bytes() == new and os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("tag", TAGS)
def test_lost_connections_lose_no_bytes(serve_plan, tmp_path, tag):
    path = tmp_path / "file.bin"
    server = serve_plan(*[sends(BODY, 90_000, tag)] * 20)
    download(server.url, str(path), retries=2, backoff=0.001)
    assert path.read_bytes() == BODY and len(server.asked) < 40


def test_downloads_give_up_on_endless_wrong_ranges(serve_plan, tmp_path):
    def wrong(handler, start):
        handler.answer(206, b"x" * 9, Content_Range=f"bytes 7-15/{len(BODY)}", Content_Length=9)

    plan = [sends(BODY, 300_000, TAGS[0]), wrong] * 30
    with pytest.raises(UserError, match=r"gave up .* after 4 attempts"):
        download(serve_plan(*plan).url, str(tmp_path / "file.bin"), retries=4, backoff=0.001)
    with pytest.raises(UserError, match=r"gave up .* the server sent the wrong range"):
        download(serve_plan(wrong).url, str(tmp_path / "file.bin"), retries=4, backoff=0.001)


@pytest.mark.parametrize(
    "status, headers, message",
    [
        (200, {"Content_Length": "many"}, "Content-Length is 'many'"),
        (200, {"Content_Length": "-5"}, "Content-Length is '-5'"),
        (200, {"Content_Length": "9" * 5000}, "Content-Length is '9999"),
        (200, {"Content_Length": "5, 6"}, "cannot download"),
        (206, {"Content_Range": "bytes 0-4"}, "the server sent the wrong range"),
        (206, {"Content_Range": f"bytes {'0' * 5000}-4/5"}, "the server sent the wrong range"),
        (206, {}, "the server sent the wrong range"),
        (416, {}, "the server returned 416"),
        (302, {"Location": "http://[::1"}, "cannot download"),
        (302, {"Location": "http://a..b/c"}, "cannot download"),
        (302, {"Location": "http://127.0.0.1:many/"}, "cannot download"),
        (302, {"Location": "file:///etc/passwd"}, "cannot download"),
        (302, {"Location": "/file.bin"}, "redirects"),
        (200, {"Content_Encoding": "gzip"}, "the server sent unrequested compression .gzip."),
        (200, {"Content_Encoding": "x" * 99}, "the server sent unrequested compression"),
    ],
)
def test_malformed_headers_are_refused(serve_plan, tmp_path, status, headers, message):
    server = serve_plan(lambda handler, start: handler.answer(status, b"12345", **headers))
    with pytest.raises(UserError, match=message):
        download(server.url, str(tmp_path / "file.bin"), retries=2, backoff=0.001)
    assert not (tmp_path / "file.bin").exists()


def test_nothing_is_decompressed(serve_plan, tmp_path):
    body = gzip.compress(bytes(1 << 20))
    server = serve_plan(sends(body, Content_Encoding="x-gzip"))
    download(f"{server.url}.gz", str(tmp_path / "file.gz"))  # some servers declare a .gz file so
    assert (tmp_path / "file.gz").read_bytes() == body


def test_the_body_of_a_redirect_is_not_read(serve_plan, tmp_path):
    over = threading.Event()

    def redirect(handler, start):
        handler.answer(
            302, body[:64], Location="/b", Content_Encoding="gzip", Content_Length=1 << 50
        )
        over.wait(20)

    body = gzip.compress(bytes(1 << 20))
    server = serve_plan(redirect, sends(BODY))
    worker = threading.Thread(target=download, args=(server.url, str(tmp_path / "file.bin")))
    worker.start()
    worker.join(10)
    is_done = not worker.is_alive()
    over.set()
    worker.join()
    assert is_done and (tmp_path / "file.bin").read_bytes() == BODY


def test_failed_downloads_leave_nothing(serve, tmp_path):
    path = str(tmp_path / "file.bin")
    with pytest.raises(UserError, match="404"):
        download(serve(404).url, path, backoff=0.01)
    with pytest.raises(UserError, match=r"gave up .* 500"):
        download(serve(500).url, path, retries=3, backoff=0.01)
    with pytest.raises(UserError, match="no connection"):
        download("http://127.0.0.1:9/none", path, retries=2, backoff=0.01)
    with pytest.raises(UserError, match="neither a URL nor a file"):
        download(str(tmp_path / "none"), path)
    assert os.listdir(tmp_path) == []


def test_a_local_path_is_copied(tmp_path):
    (tmp_path / "here").write_bytes(BODY)
    download(str(tmp_path / "here"), str(tmp_path / "there"))
    assert (tmp_path / "there").read_bytes() == BODY


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as f:
        f.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@contextlib.contextmanager
def full_disk(n_bytes):
    """Limit files to n_bytes, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_errors_for_a_full_disk_name_the_file(serve, tmp_path):
    (tmp_path / "big").write_bytes(BODY)
    with full_disk(100_000), pytest.raises(OSError) as e, atomic_write(tmp_path / "a") as f:
        f.write(BODY)
    assert e.value.filename == str(tmp_path / "a")
    with full_disk(100_000), pytest.raises(OSError) as e:
        download(serve("whole").url, str(tmp_path / "b"))
    assert e.value.filename == str(tmp_path / "b.part")
    with pytest.raises(FileNotFoundError) as e, atomic_write(tmp_path / "a"):
        (tmp_path / "another").read_bytes()
    assert e.value.filename == str(tmp_path / "another")
    members = {"x": BODY}
    path = archive(tmp_path / "a.tar", members, "w")
    with (
        full_disk(100_000),
        pytest.raises(UserError, match=r"cannot unpack .*/out: File too large"),
    ):
        unpack(path, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "b.part", "b.part.tag", "big"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, name",
    [
        (["tinystories.py", "synth", "--n_stories=400", "--data_dir=new"], "data00.json"),
        (["webtext.py", "train_vocab", "--source=t", "--vocab_size=300"], "sample.txt"),
        (["bpe.py", "encode", "--source=t", "--model=a.model", "--out=x.npy"], "x.npy"),
        (["bpe.py", "encode", "--source=t", "--model=a.model", "--out=x"], "data_0"),
    ],
)
def test_a_script_on_a_full_disk_names_the_file(tmp_path, args, name):
    (tmp_path / "t").mkdir()
    rng = random.Random(1)
    for i in range(3):
        text = "<|endoftext|>".join(f"a day {rng.random()}" for _ in range(5000))
        (tmp_path / "t" / f"{i}.txt").write_text(text)
    train = ["train", "--source=t/0.txt", "--vocab_size=270", "--model=a.model"]
    assert not script("bpe.py", *train, cwd=tmp_path).returncode
    before = sorted(os.listdir(tmp_path))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    done = script(*args, "--num_workers=1", cwd=tmp_path, preexec_fn=limit)
    refused(done, name, "File too large")
    new = set(os.listdir(tmp_path)) - set(before)
    assert not new & {"x.npy"} and not list((tmp_path / "new").glob("*"))


def test_text_paths_may_be_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    assert text_files("text.txt") == ["text.txt"]
    assert text_files(".") == ["./text.txt"]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for read in (text_files, read_json, lambda path: unpack(path, str(tmp_path / "out"))):
        answers = []

        def call(read=read, answers=answers):
            try:
                read(str(tmp_path / "pipe.txt"))
            except UserError as e:
                answers.append(str(e))

        worker = threading.Thread(target=call, daemon=True)
        worker.start()
        worker.join(5)
        assert not worker.is_alive() and "is a pipe or a device" in answers[0]
    assert os.listdir(tmp_path) == ["pipe.txt"]


def test_a_failed_copy_on_a_full_disk_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "big").write_bytes(BODY)

    def no_links(source, destination):
        raise OSError

    monkeypatch.setattr(os, "link", no_links)
    with full_disk(100_000), pytest.raises(OSError) as e:
        link_or_copy(str(tmp_path / "big"), str(tmp_path / "copy"))
    assert e.value.filename == str(tmp_path / "copy")


def archive(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                tar.addfile(info)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "./", "top/"])
def test_archives_unpack_without_a_top_folder(tmp_path, prefix):
    members = {f"{prefix}data0{i}.bin": os.urandom(5000) for i in range(3)}
    unpack(archive(tmp_path / "a.tar.gz", members), str(tmp_path / "out"))
    for name, data in members.items():
        assert (tmp_path / "out" / os.path.basename(name)).read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "out"]


@pytest.mark.parametrize(
    "name, data",
    [
        ("../escape", b"x"),
        ("a/../../escape", b"x"),
        ("/tmp/escape", b"x"),
        ("link", (tarfile.SYMTYPE, "/etc/passwd")),
        ("link", (tarfile.LNKTYPE, "../escape")),
        ("pipe", (tarfile.FIFOTYPE, "")),
    ],
)
def test_members_outside_the_folder_are_refused(tmp_path, name, data):
    path = archive(tmp_path / "a.tar.gz", {"good": b"x", name: data})
    reason = "(points outside the folder|is not a regular file)"
    with pytest.raises(UserError, match=f"cannot unpack .*: its member .* {reason}"):
        unpack(path, str(tmp_path / "sub" / "out"))
    assert sorted(os.listdir(tmp_path / "sub")) == []


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_truncated_or_damaged_archives_are_refused(tmp_path, mode):
    members = {f"data0{i}.bin": os.urandom(4096) for i in range(4)}
    archive(tmp_path / "a.tar", members, mode)
    whole = (tmp_path / "a.tar").read_bytes()
    cuts = [0, 1, 100, len(whole) // 2, len(whole) - 1] if mode == "w:gz" else [0, 512, 2 * 4608]
    for cut in cuts:
        (tmp_path / "half.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="is not a complete tar archive"):
            unpack(str(tmp_path / "half.tar"), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    for at in [len(whole) // 2] if mode == "w:gz" else [4608 + 10, 2 * 4608 + 130]:
        broken = bytearray(whole)  # flip one bit; in a plain archive, one of a header
        broken[at] ^= 16
        (tmp_path / "half.tar").write_bytes(broken)
        with pytest.raises(UserError, match="is not a complete tar archive"):
            unpack(str(tmp_path / "half.tar"), str(tmp_path / "out"))


def header(size, kind, name="x"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros(n):
    return (bytes(1 << 20) for _ in range(n >> 20))


END = [header(0, tarfile.REGTYPE), bytes(1024)]
NEGATIVE = bytearray(header(0, tarfile.REGTYPE))
NEGATIVE[124:136] = (-1024).to_bytes(12, "big", signed=True)
NEGATIVE[148:156] = b"%06o\0 " % tarfile.calc_chksums(NEGATIVE)[0]
SPARSE = tarfile.TarInfo("s")
SPARSE.size, SPARSE.pax_headers = 0, {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
TOO_LARGE = "unpacks to more than .* bytes, over 100 times its size"
BOMBS = {
    "a pax header": ([header(1 << 28, b"x"), *zeros(1 << 28), *END], "header .* longer"),
    "a global header": ([header(1 << 28, b"g"), *zeros(1 << 28), *END], "header .* longer"),
    "a long name": ([header(1 << 28, b"L"), *zeros(1 << 28), *END], "header .* longer"),
    "a chain of pax headers": (
        [header(12, b"x"), b"12 path=abc\n".ljust(512, b"\0")] * 2000 + END,
        "longer",
    ),
    "a chain of long names": ([header(4, b"L"), b"name".ljust(512, b"\0")] * 2000 + END, "longer"),
    "zeros": ([header(1 << 28, b"0"), *zeros(1 << 28), *END], TOO_LARGE),
    "skipped zeros": ([header(1 << 28, b"0", "._x"), *zeros(1 << 28), *END], TOO_LARGE),
    "zeros after the end": ([*END, *zeros(1 << 28)], TOO_LARGE),
    "a negative size": ([bytes(NEGATIVE), *END], "is not a complete tar archive"),
    "a sparse file": ([SPARSE.tobuf(tarfile.PAX_FORMAT), *END], "not a regular file"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_would_fill_memory_or_the_disk_is_refused(tmp_path, name):
    chunks, message = BOMBS[name]
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as f:
        f.writelines(chunks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with full_disk(1 << 30), pytest.raises(UserError, match=message):
        unpack(str(tmp_path / "a.tar.gz"), str(tmp_path / "out"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_too_many_or_too_deep_members_are_refused(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar.gz", {"a/" * 1900 + "x": b"x"})
    with pytest.raises(UserError, match="too many nested folders"):
        unpack(path, str(tmp_path / "out"))
    monkeypatch.setattr("system.files.MAX_MEMBERS", 9)
    path = archive(tmp_path / "a.tar.gz", {f"{i}": b"x" for i in range(10)})
    with pytest.raises(UserError, match="more than 9 files"):
        unpack(path, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def seeds(folder):
    """Yield archives of every format, to mutate."""
    members = {f"top/{'long' * 40}{i}.json": json.dumps([i] * 300).encode() for i in range(3)}
    members |= {"top/link": (tarfile.SYMTYPE, "x"), "top/\u00e9": b"x" * 600}
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for mode in ("w", "w:gz", "w:bz2", "w:xz"):
            with tarfile.open(folder / "seed", mode, format=kind) as tar:
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    if isinstance(data, bytes):
                        info.size, info.mtime = len(data), 0.5
                    elif mode != "w":
                        info.type, info.linkname = data
                    tar.addfile(info, io.BytesIO(data if isinstance(data, bytes) else b""))
                if mode == "w":
                    tar.addfile(SPARSE)
            yield (folder / "seed").read_bytes()
    with zipfile.ZipFile(folder / "seed", "w") as z:
        z.writestr("a.json", "[]")
    yield (folder / "seed").read_bytes()


def mutated(rng, data):
    """Change a few bytes, fields or lengths; headers of uncompressed archives stay well-formed."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data))
        if len(data) % 512 == 0 and rng.random() < 0.8:
            at = at // 512 * 512 + rng.choice([0, 100, 124, 156, 257, 345, 386, 482])
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            n = rng.choice([1, 8, 12])
            data[at : at + n] = rng.choice([b"\xff", b"\0", b"7", b"9", b"L", b"x", b"S"]) * n
        elif kind == 2:
            del data[at:]
            data += bytes(rng.choice([0, 512, 1024]))
        else:
            block = at // 512 * 512
            data[at:at] = data[block : block + 512] * rng.choice([1, 5, 500])
        if not data:
            break
        for block in range(0, len(data) - 511, 512) if len(data) % 512 == 0 else ():
            part = data[block : block + 512]
            if part[257:262] == b"ustar":
                data[block + 148 : block + 156] = b"%06o\0 " % tarfile.calc_chksums(part)[0]
    return bytes(data)


@pytest.mark.slow
def test_mutated_archives_unpack_or_are_refused_with_a_sentence(tmp_path):
    rng, counts = random.Random(1), {"unpacked": 0, "refused": 0}
    (tmp_path / "there").mkdir()
    originals = list(seeds(tmp_path))
    for i in range(1000):
        path, out = tmp_path / "a", tmp_path / "there" / "out"
        path.write_bytes(mutated(rng, originals[i % len(originals)]))
        try:
            unpack(str(path), str(out))
            counts["unpacked"] += 1
            assert os.listdir(out)
        except UserError as e:
            assert len(str(e)) < 2000
            counts["refused"] += 1
            assert not out.exists(), i
        else:
            shutil.rmtree(out)
        assert os.listdir(tmp_path / "there") == [], i
    assert counts["unpacked"] > 20 and counts["refused"] > 200, counts
