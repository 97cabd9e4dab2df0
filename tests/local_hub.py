"""A stand-in for the Hugging Face hub on 127.0.0.1: create, upload and download models."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LFS = (".safetensors", ".pt", ".bin", ".distcp")


class Hub(ThreadingHTTPServer):
    """
    `models`: {name: {file: bytes}}, with datasets as "datasets/user/name"; `tokens`: the received
    access tokens; `private`: names of private models; `broken`: {file: byte at which its next
    download stops}; `sent`: [(file, first byte sent)]; `asked`: the requested paths; `failures`:
    how many of the next commits fail.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.tokens, self.private, self.blobs = {}, set(), set(), {}
        self.broken, self.sent, self.asked, self.failures = {}, [], [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value=None, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"content_length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self):
        hub, path, body = self.server, self.path.partition("?")[0], self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            hub.models.setdefault(name, {})
            self.answer({"url": f"{hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif name.removesuffix(".git") not in hub.models:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.endswith("/preupload/main"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{hub.url}/blob/{item['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main") and hub.failures:
            hub.failures -= 1
            self.answer({"error": "try again"}, 503)
        elif path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.models[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.models[name][value["path"]] = hub.blobs[value["oid"]]
            commit = hashlib.sha1(body).hexdigest()
            url = f"{hub.url}/{name}/commit/{commit}"
            self.answer({"success": True, "commitUrl": url, "commitOid": commit})
        else:
            self.answer({"error": f"unknown path: {path}"}, 404)

    def do_PUT(self):
        data = self.body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer({"error": "wrong hash"}, 400)
        self.server.blobs[oid] = data
        return self.answer()

    def do_GET(self):
        hub, path = self.server, unquote(self.path.partition("?")[0])
        hub.tokens.add(self.headers.get("Authorization"))
        hub.asked.append(path)
        parts = path.removeprefix("/api").removeprefix("/models").strip("/").split("/")
        n = 3 if parts[0] == "datasets" else 2
        name, rest, commit = "/".join(parts[:n]), parts[n:], "0" * 40
        files = hub.models.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/api") and rest[:1] == ["tree"]:
            inside = "/".join(rest[2:])
            matching = {f: data for f, data in files.items() if f.startswith(inside)}
            self.answer(
                [
                    {"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for f, d in matching.items()
                ]
            )
        elif path.startswith("/api"):
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            self.answer({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        elif rest[0] == "resolve" and "/".join(rest[2:]) in files:
            self.send_file(files["/".join(rest[2:])], "/".join(rest[2:]), commit)
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def send_file(self, data, name, commit):
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": tag, "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        start, asked = 0, self.headers.get("Range")
        if asked and self.headers.get("If-Range", tag) == tag:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.server.sent.append((name, start))
        cut = self.server.broken.pop(name, None) if self.command == "GET" else None
        if cut is None:
            self.answer(data[start:], 206 if start else 200, **headers)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(data[:cut])
        self.close_connection = True
