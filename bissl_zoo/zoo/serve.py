"""A zoo's folder over HTTP, for the machines of a laboratory: reading only, no password, no encryption."""

import ipaddress
import os
import re
import socket
import socketserver
import stat
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.index import CURATED_FILE, INDEX_FILE
from bissl_zoo.zoo.names import is_name

SILENCE_S = 60


class ZooServer(ThreadingHTTPServer):
    """Serves `index.json`, `curated.json` and the files one folder below, to GET and HEAD, with single byte ranges.

    Names that no entry can have (hidden ones, `..`) and links that lead out of the folder are not found.

    Attributes:
        address: for `BISSL_ZOO` on this machine.
    Raises:
        ZooError: the folder is not a zoo, or the address cannot be taken.
    """

    request_queue_size = 128  # many processes start at once

    def __init__(self, folder: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 8000) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not any((self.folder / index).is_file() for index in (INDEX_FILE, CURATED_FILE)):
            raise ZooError(f"{self.folder} is not served: it has neither {INDEX_FILE} nor {CURATED_FILE} of a zoo.")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ZooError(f"Cannot serve at {host}, port {port}: {error}. Choose another host or port.") from error
        self.address = _address("localhost" if _is_any(host) else host, self.server_port)

    def server_bind(self) -> None:
        """As the base class, without asking for this machine's full name, which can take long in a laboratory."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]


def serve(folder: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a zoo's folder until Ctrl-C; see :class:`ZooServer`.

    Args:
        host: `"127.0.0.1"` for this machine only, `"0.0.0.0"` for all that reach it.
        port: 0 for any that is free.
    """
    with ZooServer(folder, host, port) as server:
        print(f"Serving {server.folder} at {server.address} until Ctrl-C.")
        if _is_loopback(host):
            print("Only this machine can read it; the host 0.0.0.0 lets others. In another terminal:")
            print(f"    export BISSL_ZOO={server.address}", flush=True)
        else:
            name = socket.gethostname() if _is_any(host) else host
            print(f"Everyone who reaches port {server.server_port} of this machine can read it, without a password.")
            print("On other machines:")
            print(f"    export BISSL_ZOO={_address(name, server.server_port)}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nStopped.")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SILENCE_S
    server: ZooServer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def version_string(self) -> str:
        """What the Server header says: not which Python this is."""
        return "bissl_zoo"

    def _answer(self, with_body: bool) -> None:
        stream = self._open()
        if stream is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with stream:
            facts = os.fstat(stream.fileno())
            tag = f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'
            status, begin, end = self._range(facts.st_size, tag) if with_body else (HTTPStatus.OK, 0, facts.st_size)
            self.send_response(status)
            if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self.send_header("Content-Range", f"bytes */{facts.st_size}")
            elif status == HTTPStatus.PARTIAL_CONTENT:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{facts.st_size}")
            kind = "json" if stream.name.endswith(".json") else "octet-stream"
            self.send_header("Content-Type", f"application/{kind}")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", self.date_time_string(int(facts.st_mtime)))
            self.send_header("ETag", tag)
            self.send_header("Connection", "close")  # nothing that follows a request can be taken for another one
            self.end_headers()
            if with_body and end > begin:
                self._send(stream, begin, end)

    def _send(self, stream: BinaryIO, begin: int, end: int) -> None:
        try:
            self.connection.sendfile(stream, begin, end - begin)
        except (ConnectionError, TimeoutError) as error:
            self.log_message("the client left: %s", error)

    def _open(self) -> BinaryIO | None:
        """The file that is asked for, where there is one that may be read."""
        parts = unquote(self.path.partition("?")[0]).split("/")[1:]
        if not 1 <= len(parts) <= 2 or not all(map(is_name, parts)):
            return None
        try:
            file = self.server.folder.joinpath(*parts).resolve()
            if not file.is_relative_to(self.server.folder):
                return None
            # without links by now; a pipe must not be waited for
            flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            stream = open(file, "rb", opener=lambda path, mode: os.open(path, mode | flags))
        except (OSError, RuntimeError):  # RuntimeError: links in a circle, up to Python 3.12
            return None
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return stream
        stream.close()
        return None

    def _range(self, size: int, tag: str) -> tuple[HTTPStatus, int, int]:
        """Status, first byte and end for the Range header; what is not one range of bytes means the whole file."""
        wanted = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", self.headers.get("Range", ""), re.ASCII)
        if not wanted or not any(wanted.groups()) or self.headers.get("If-Range", tag) != tag:
            return HTTPStatus.OK, 0, size
        first, last = wanted.groups()
        if first and last and int(last) < int(first):
            return HTTPStatus.OK, 0, size
        begin = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if begin >= size:
            return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, 0
        return HTTPStatus.PARTIAL_CONTENT, begin, end


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_any(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
