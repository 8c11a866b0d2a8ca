"""A zoo on a web server, read by GET and Range requests (RFC 9110).

fsspec's HTTP file system is not used: it follows every redirect with all headers, also from https to http, and aborts
any transfer after five minutes.
"""

import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from bissl_zoo import __version__
from bissl_zoo.errors import ZooError, printable
from bissl_zoo.zoo.stores import Missing, Store, Transient

#: seconds without a byte, and for the headers or one block
TIMEOUT_S, STEP_S = 20.0, 120.0
MAX_REDIRECTS = 5
_BLOCK = 1 << 18


class HttpStore(Store):
    """Files below `https://HOST/FOLDER`, which anyone may read.

    The proxies of the environment are used. At most `MAX_REDIRECTS` redirects are followed, never from https to http
    and never from a public address to a private one.
    """

    def __init__(self, location: str, timeout: float = TIMEOUT_S) -> None:
        try:
            parts = urlsplit(location)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid or "@" in parts.netloc or parts.query or parts.fragment:
            hidden = re.sub("//.*@", "//", location)
            raise ZooError(
                f"'{hidden}' is not the address of a zoo. Write https://HOST/FOLDER without password, '?' and '#'."
            )
        self.location = _shown(location).rstrip("/")
        self._headers = {"User-Agent": f"bissl_zoo/{__version__}", "Accept-Encoding": "identity"}
        self._timeout = timeout
        self._opener = urllib.request.OpenerDirector()  # without handlers for other schemes, redirects and errors
        for handler in (urllib.request.ProxyHandler, _Handler, _SecureHandler):
            self._opener.add_handler(handler())

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See :class:`Store`. If the server ignores ranges, the first `start` bytes are dropped."""
        address = f"{self.location}/{quote(path, safe='/@')}"
        with closing(self._request(address, start)) as response:
            content_range = response.headers.get("Content-Range", "")
            if response.status == 416 and content_range == f"bytes */{start}":
                return
            if response.status == 206 and not content_range.startswith(f"bytes {start}-"):
                raise ZooError(f"{address} sent {printable(content_range[:100])!r} for the bytes from {start} on.")
            if response.status not in (200, 206):
                raise _refusal(response, address)
            skip, remaining = start if response.status == 200 else 0, response.length
            while remaining is None or remaining > 0:
                if response.fp:
                    response.fp.raw.restart()
                try:
                    block = response.read1(_BLOCK if remaining is None else min(_BLOCK, remaining))
                except (OSError, http.client.HTTPException, ValueError) as error:
                    raise _failure(error, address) from error
                if not block:
                    break
                remaining = None if remaining is None else remaining - len(block)
                if block[skip:]:
                    yield block[skip:]
                skip = max(0, skip - len(block))
            if remaining:
                raise Transient(f"{address} ended {remaining:,} bytes early.")

    def _request(self, address: str, start: int = 0) -> http.client.HTTPResponse:
        """Return the response after all redirects."""
        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        url, public_only = address, False
        for _ in range(MAX_REDIRECTS + 1):
            request = urllib.request.Request(url, headers=headers)
            request.public_only = public_only
            try:
                response = self._opener.open(request, timeout=self._timeout)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _failure(error, _shown(url)) from error
            if response.status in (301, 302, 303, 307, 308):
                public_only = public_only or is_public(response.peer)
                response.close()
                url = _redirected(url, response, address)
                continue
            if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
                response.close()
                raise ZooError(f"{address} is sent compressed. Turn compression off for this folder of the server.")
            return response
        raise ZooError(f"{address} exceeds the limit of {MAX_REDIRECTS} redirects, at {_shown(url)}.")


def is_public(address: str) -> bool:
    """Return True for an IP address of the internet, False for one of a local network or of this machine."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_global


class _Stream(io.RawIOBase):
    """The bytes of a connection; raises once the headers, or one block, have taken `STEP_S` seconds.

    The timeout of a socket bounds the wait for a byte only: a server could send one byte or `100 Continue` each second.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.restart()

    def restart(self) -> None:
        """Start to count the seconds again."""
        self._deadline = time.monotonic() + STEP_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise http.client.HTTPException(f"the server needed more than {STEP_S:g} s for headers or one block")
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.peer = sock.getpeername()[0]
        self.fp = io.BufferedReader(_Stream(self.fp.detach()))


def _connecting(request: urllib.request.Request, kind: type[http.client.HTTPConnection]) -> type:
    """Return a class of connections that refuses private addresses, after name resolution, if `request.public_only`."""

    class Connection(kind):
        response_class = _Response

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._create_connection = self._connected

        def _connected(self, *args: Any, **options: Any) -> socket.socket:
            connected = socket.create_connection(*args, **options)
            peer = connected.getpeername()[0]
            if request.public_only and not request.has_proxy() and not is_public(peer):
                connected.close()
                raise http.client.HTTPException(
                    f"a redirect from a public to the private address {peer} is not followed"
                )
            return connected

    return Connection


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connecting(request, http.client.HTTPConnection), request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connecting(request, http.client.HTTPSConnection), request)


def _shown(url: str) -> str:
    """Return an address without its query, which often is a signature."""
    parts = urlsplit(url)
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _redirected(url: str, response: http.client.HTTPResponse, address: str) -> str:
    location = quote(response.headers.get("Location", ""), safe="%/:=&?~#+!$,;'@()*[]", encoding="iso-8859-1")
    try:
        target = urlsplit(urljoin(url, location))
        valid = location and target.scheme in ("http", "https") and target.hostname and target.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ZooError(f"{address} redirects to something that is not a web address; this is not followed.")
    if urlsplit(url).scheme == "https" and target.scheme == "http":
        raise ZooError(f"{address} redirects from https to http, which is not secure; this is not followed.")
    return urlunsplit((target.scheme, target.netloc.rpartition("@")[2], target.path or "/", target.query, ""))


def _refusal(response: http.client.HTTPResponse, address: str) -> ZooError:
    """Return the error for a status without a file."""
    answer = f"{address} answered {response.status} {printable(response.reason[:100])}".rstrip()
    if response.status in (404, 410):
        return Missing(f"{answer}. Check the address.")
    if response.status in (408, 425, 429) or response.status >= 500:
        error = Transient(f"{answer}.")
        seconds = response.headers.get("Retry-After", "")
        error.retry_after = float(seconds) if re.fullmatch(r"\d{1,6}", seconds, re.ASCII) else 0.0
        return error
    if response.status == 416:
        return ZooError(f"{answer}: the file is shorter than the index lists. The zoo must be uploaded again.")
    return ZooError(f"{answer}. Check the address.")


def _failure(error: Exception, address: str) -> ZooError:
    """Return the error for a failed connection: `Transient` if a retry may help."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    cause = cause if isinstance(cause, Exception) else error
    text = printable(str(cause)[:200]) or type(cause).__name__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ZooError(f"{address}: invalid certificate ({cause.verify_message}). SSL_CERT_FILE names your own CA.")
    if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
        return ZooError(f"{address}: unknown host ({cause.strerror}). Check the address and the network.")
    is_tls = isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError)
    if isinstance(cause, OSError | http.client.IncompleteRead) and not is_tls:
        return Transient(f"{address}: {text}.")
    return ZooError(f"{address} cannot be read: {text}. Check the address and the proxy.")
