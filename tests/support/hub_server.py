"""A small hub for one model repository, as far as huggingface_hub asks for it."""

import base64
import hashlib
import http.server
import json
import re
import socket
import threading
from urllib.parse import parse_qs, unquote

REPO = "lab/zoo"
TOKEN = "hf_tokenofthetests"


class Hub(http.server.ThreadingHTTPServer):
    """The endpoints of a hub that huggingface_hub uses for one model repository.

    Attributes:
        commits: content of every file by path, for each commit; `commits[head]` is the branch `main`.
        seen: method, path and headers of each request.
        answer_with: gives (status, headers) to answer a request with instead, or None.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.commits, self.messages, self.uploads, self.seen = {}, [], {}, []
        self.answer_with = lambda command, path: None
        self.lock = threading.Lock()
        self.commit({".gitattributes": b""}, "initial commit")

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, files, message):
        self.head = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[self.head] = files
        self.messages.append(message)

    def files(self, revision="main"):
        return self.commits.get(self.head if revision == "main" else revision)


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, self.headers))
        instead = self.server.answer_with(self.command, self.path)
        if instead is not None:
            return self.send(instead[0], b"", instead[1])
        path = self.path.partition("?")[0]
        for pattern, answer in self.ROUTES:
            if matches := re.fullmatch(pattern, path):
                return answer(self, *map(unquote, filter(None, matches.groups())))
        return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def send(self, status, content=b"", headers=None):
        if status == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.close_connection |= (headers or {}).get("Connection") == "close"

    def revision(self, revision):
        if self.server.files(revision) is None:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self.send(200, {"id": REPO, "sha": self.server.head if revision == "main" else revision})

    def paths_info(self, revision):
        files = self.server.files(revision)
        matches = []
        for path in parse_qs(self.body.decode())["paths"]:
            if path in files:
                matches.append({"type": "file", "path": path, "size": len(files[path]), "oid": "0"})
            elif any(name.startswith(f"{path}/") for name in files):
                matches.append({"type": "directory", "path": path, "oid": "0"})
        return self.send(200, matches)

    def tree(self, revision, folder=""):
        if self.server.files(revision) is None:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        start = f"{folder.strip('/')}/".lstrip("/")
        files = {name: content for name, content in self.server.files(revision).items() if name.startswith(start)}
        if folder and not files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        folders = {start + name[len(start) :].partition("/")[0] for name in files if "/" in name[len(start) :]}
        matches = [{"type": "directory", "path": path, "oid": "0"} for path in folders]
        matches += [
            {"type": "file", "path": path, "size": len(content), "oid": "0"}
            for path, content in files.items()
            if "/" not in path[len(start) :]
        ]
        return self.send(200, matches)

    def preupload(self, revision):
        asked = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {True: "lfs", False: "regular"}
        item = [
            {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False} for path in asked
        ]
        return self.send(200, {"files": item})

    def lfs_batch(self):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.server.address}/upload/{item['oid']}"}}
        return self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        self.server.uploads[oid] = self.body
        return self.send(200)

    def commit(self, revision):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(403, {"error": "You don't have the rights"})
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        with self.server.lock:
            if header["value"].get("parentCommit") not in (None, self.server.head):
                return self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
            files = dict(self.server.files())
            for operation in operations:
                value = operation["value"]
                path = value["path"].rstrip("/")
                if operation["key"] == "file":
                    files[path] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[path] = self.server.uploads[value["oid"]]
                else:
                    files = {name: file for name, file in files.items() if not f"{name}/".startswith(f"{path}/")}
            self.server.commit(files, header["value"]["summary"])
        return self.send(
            200, {"commitUrl": f"{self.server.address}/{REPO}/commit/{self.server.head}", "commitOid": self.server.head}
        )

    def resolve(self, revision, path):
        files = self.server.files(revision)
        if path not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if path.endswith(".safetensors"):  # large files lie on another host
            target = f"http://localhost:{self.server.server_port}/cdn/{revision}/{path}"
            size = str(len(files[path]))
            return self.send(
                302, b"", {"Location": target, "X-Linked-Size": size, **self.identity(files[path], "X-Linked-")}
            )
        return self.content(revision, path)

    def identity(self, content, prefix=""):
        """Return the headers that identify a file in a client's cache."""
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return {"X-Repo-Commit": self.server.head, f"{prefix}ETag": etag}

    def content(self, revision, path):
        content = self.server.files(revision)[path]
        matches = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if matches and int(matches[1]) >= len(content):
            return self.send(416)
        part = content[int(matches[1]) : int(matches[2]) + 1 if matches[2] else None] if matches else content
        return self.send(206 if matches else 200, part, self.identity(content))

    def log_message(self, *_):
        """Quiet."""

    API = f"/api/models/{REPO}"
    ROUTES = [
        (f"{API}/revision/(.+)", revision),
        (f"{API}/paths-info/(.+)", paths_info),
        (f"{API}/tree/([^/]+)(/.*)?", tree),
        (f"{API}/preupload/(.+)", preupload),
        (f"{API}/commit/(.+)", commit),
        (f"/{REPO}.git/info/lfs/objects/batch", lfs_batch),
        ("/upload/(.+)", upload),
        (f"/{REPO}/resolve/([^/]+)/(.+)", resolve),
        ("/cdn/([^/]+)/(.+)", content),
    ]
