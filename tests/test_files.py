"""Downloads against a real server that misbehaves, and archives that are broken or hostile."""

import hashlib
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configurator import UserError
from system.files import atomic_write, download, unpack

BODY = os.urandom(1 << 16) * 12  # 768 KiB


class Server(ThreadingHTTPServer):
    """Serves BODY; `plan` lists what to do with each request in turn, the last for all others."""

    def __init__(self, plan):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.ranges = list(plan), []
        self.etag = '"one"'
        self.body = BODY
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        server = self.server
        what = server.plan.pop(0) if len(server.plan) > 1 else server.plan[0]
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        body, start = server.body, 0
        if isinstance(what, int):
            self.send_error(what)
            return
        if asked and what != "no range":
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
        if what != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[: len(rest) // 3] if what == "drop" else rest)


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
def test_the_file_arrives_whole(serve, tmp_path, plan):
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
def test_a_complete_part_file_is_taken_or_started_over(serve, tmp_path, extra, fits):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY + extra)
    server = serve("whole")
    download(server.url, str(path), backoff=0.01)
    assert path.read_bytes() == BODY and len(server.ranges) == (1 if fits else 2)


def test_refusals(serve, tmp_path):
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


def test_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as f:
        f.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


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
def test_unpack(tmp_path, prefix):
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
def test_unpack_refuses_what_escapes(tmp_path, name, data):
    path = archive(tmp_path / "a.tar.gz", {"good": b"x", name: data})
    with pytest.raises(UserError, match="refused"):
        unpack(path, str(tmp_path / "sub" / "out"))
    assert sorted(os.listdir(tmp_path / "sub")) == []


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_half_an_archive_is_not_taken_for_a_whole_one(tmp_path, mode):
    members = {f"data0{i}.bin": os.urandom(4096) for i in range(4)}
    archive(tmp_path / "a.tar", members, mode)
    whole = (tmp_path / "a.tar").read_bytes()
    cuts = [0, 1, 100, len(whole) // 2, len(whole) - 1] if mode == "w:gz" else [0, 512, 2 * 4608]
    for cut in cuts:
        (tmp_path / "half.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="no whole tar archive"):
            unpack(str(tmp_path / "half.tar"), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    for at in [len(whole) // 2] if mode == "w:gz" else [4608 + 10, 2 * 4608 + 130]:
        broken = bytearray(whole)  # one flipped bit; in a plain archive in a header
        broken[at] ^= 16
        (tmp_path / "half.tar").write_bytes(broken)
        with pytest.raises(UserError, match="no whole tar archive"):
            unpack(str(tmp_path / "half.tar"), str(tmp_path / "out"))
