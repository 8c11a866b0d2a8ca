"""A web server whose answers a test plans, and which records all requests."""

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLOCK = 1 << 14


@dataclass
class Answer:
    """The answer to one request; by default that of a correct server.

    Attributes:
        headers: replace the usual ones; None removes one.
        body: instead of the file.
        ranges: support Range requests.
        sends: bytes of the body that are sent before `end`.
        end: "close" the connection, "reset" it, or "stall" until the client leaves.
        raw: sent instead of all this.
    """

    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    body: bytes | None = None
    ranges: bool = True
    sends: int | None = None
    end: str = "close"
    raw: bytes | None = None


@dataclass
class Received:
    """A request, and the number of body bytes sent."""

    path: str
    headers: dict[str, str]
    sent: int = 0


class FaultyServer(ThreadingHTTPServer):
    """`files` by path with "/"; the n-th request for a path follows the n-th item of `plans[path]`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host="127.0.0.1"):
        super().__init__((host, 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.plans: dict[str, list[Answer]] = {}
        self.requests: list[Received] = []
        self.progress = threading.Condition()
        self.closing = threading.Event()
        self.address = f"http://{host}:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    @property
    def sent(self):
        """Bytes of all bodies."""
        return sum(request.sent for request in self.requests)

    def ranges(self):
        """The Range header of each request."""
        return [request.headers.get("range") for request in self.requests]

    def wait_until_sent(self, count):
        with self.progress:
            assert self.progress.wait_for(lambda: self.sent >= count, timeout=60)

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Do not log: tests use `requests`."""

    def do_GET(self):
        server, self.close_connection = self.server, True
        received = Received(self.path, {name.lower(): value for name, value in self.headers.items()})
        with server.progress:
            server.requests.append(received)
            plan = server.plans.get(self.path)
            answer = plan.pop(0) if plan else Answer()
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            return self._end(answer.end)
        status, headers, body = self._usual(answer)
        self.send_response_only(status)
        for name, value in {**headers, **answer.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body), BLOCK):
            block = body[start : start + BLOCK]
            self.wfile.write(block)
            with server.progress:
                received.sent += len(block)
                server.progress.notify_all()
        self._end(answer.end)

    do_HEAD = do_GET

    def _usual(self, answer):
        content = self.server.files.get(self.path) if answer.body is None else answer.body
        status = answer.status or (404 if content is None else 200)
        if status != 200 and answer.body is None:
            content = b""
        start, headers = 0, {}
        wanted = self.headers.get("Range")
        if wanted and answer.ranges and status == 200:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if start >= len(content):
                status, headers["Content-Range"] = 416, f"bytes */{len(content)}"
                content = b""
        headers["Content-Length"] = str(max(len(content) - start, 0))
        return status, headers, content[start:][: answer.sends]

    def _end(self, how):
        if how == "stall":
            self.connection.settimeout(0.02)
            while not self.server.closing.is_set():
                with contextlib.suppress(TimeoutError):
                    if not self.connection.recv(1):
                        break
        elif how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
