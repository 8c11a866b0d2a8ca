"""A zoo that a web server hands out, read over HTTP or HTTPS."""

import base64
import contextlib
import errno
import hashlib
import http.client
import re
import socket
import ssl
import string
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from bissl_zoo.errors import ZooError
from bissl_zoo.progress.console import printable
from bissl_zoo.zoo.stores.store import Body, Content, Store, Transient

TIMEOUT_S = 20.0
MAX_REDIRECTS = 5
_BLOCK = 1 << 18
_REDIRECTS = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429)
_ABSENT = (404, 410)
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ETIMEDOUT, errno.EPIPE)


class Busy(Transient):
    """A server that answers that it cannot do it now.

    Attributes:
        retry_after: seconds that it asks to be left alone, 0 where it does not say.
    """

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class HttpStore(Store):
    """Files below an address, by GET and, to begin in the middle, Range (RFC 9110, section 14).

    The proxies of the environment (`https_proxy`, `no_proxy`) are used. Redirects are followed a few times, never from
    https to http nor to another scheme, and neither the password nor `headers` go along to another host.

    Args:
        location: `https://HOST/FOLDER`, or `https://USER:PASSWORD@HOST/FOLDER` for basic authentication.
        headers: sent with each request, for instance `{"Authorization": "Bearer ..."}`.
        timeout: seconds that a connection may stay silent.
    Raises:
        ZooError: for anything that is not such an address or header.
    """

    def __init__(self, location: str, headers: Mapping[str, str] | None = None, timeout: float = TIMEOUT_S) -> None:
        parts = _split(location)
        self.location = _shown(urlunsplit(parts)).rstrip("/")
        self._private = {**_basic_authentication(parts), **_checked(headers or {})}
        self._timeout = timeout
        # only these two schemes, and every status comes back as an answer
        self._opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
            self._opener.add_handler(handler())

    def read(self, path: str, limit: int) -> Content | None:
        """See :class:`Store`."""
        address = self._address(path)
        with self._get(address) as response:
            if response.status in _ABSENT:
                return None
            if response.status != 200:
                raise _refusal(response, address)
            content, told = bytearray(), response.length or 0
            if told <= limit:
                for block in _blocks(response, address):
                    content += block
                    if len(content) > limit:
                        break
            if max(told, len(content)) > limit:
                raise ZooError(f"{address} has more than {limit:,} bytes, which is too much for what it should be.")
        return Content(bytes(content), hashlib.sha256(content).hexdigest())

    @contextlib.contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[Body]:
        """See :class:`Store`. The body starts at 0 where the server knows no ranges."""
        address = self._address(path)
        with self._get(address, offset) as response:
            start = _start(response, address, offset)
            at_end = response.status == 416
            yield Body(start, iter(()) if at_end else _blocks(response, address))

    def _address(self, path: str) -> str:
        return f"{self.location}/{quote(path, safe='/@')}"

    def _get(self, address: str, offset: int = 0) -> http.client.HTTPResponse:
        """The answer at the end of all redirects, its body not yet read."""
        from bissl_zoo import __version__

        headers = {"User-Agent": f"bissl_zoo/{__version__}", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        url, private = address, self._private
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(url, {**private, **headers})
            if response.status not in _REDIRECTS:
                _refuse_encoding(response, address)
                return response
            with response:
                target = _redirected(url, response, address)
            if _origin(target) != _origin(url):
                private = {}
            url = target
        raise ZooError(
            f"{address} is redirected more than {MAX_REDIRECTS} times, at last to {_shown(url)}. "
            "Ask for the address at which the files themselves are, and use that."
        )

    def _send(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, headers=dict(headers))
        try:
            return self._opener.open(request, timeout=self._timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failure(error, _shown(url)) from error


def _split(location: str) -> SplitResult:
    try:
        parts = urlsplit(location)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        without_password = re.sub("//.*@", "//", location)
        raise ZooError(
            f"'{without_password}' is not the address of a zoo on a web server. Write http:// or https://, the host "
            "and the folder, without '?' and '#'; a token is passed as a header."
        )
    return parts


def _basic_authentication(parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _checked(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9-]+", name) or not value.isascii() or not value.isprintable():
            raise ZooError(f"The header {name!r} cannot be sent: its name or value has characters that headers cannot.")
    return {name.capitalize(): value for name, value in headers.items()}


def _shown(url: str) -> str:
    """An address without user, password and query, which often is a signature, with what must be quoted quoted."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, quote(parts.path, safe="/%:@!$&'()*+,;=~"), "", ""))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


def _redirected(url: str, response: http.client.HTTPResponse, address: str) -> str:
    """The address that an answer sends to, if it may."""
    # headers come as latin-1; what was UTF-8 or a space on the way must be quoted
    told = quote(response.headers.get("Location", ""), safe=string.punctuation, encoding="iso-8859-1")
    try:
        target = urlsplit(urljoin(url, told))
        usable = told and target.scheme in ("http", "https") and target.hostname and target.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ZooError(f"{address} redirects to no address of a web server ({_scheme(told)}); that is not followed.")
    if urlsplit(url).scheme == "https" and target.scheme == "http":
        raise ZooError(f"{address} redirects from https to http, where anyone could exchange it; that is not followed.")
    return urlunsplit((target.scheme, target.netloc.rpartition("@")[2], target.path or "/", target.query, ""))


def _scheme(told: str) -> str:
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", told)
    return found[0] if found else "no usable Location"


def _refuse_encoding(response: http.client.HTTPResponse, address: str) -> None:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        response.close()
        raise ZooError(
            f"{address} came encoded as {encoding!r}, which was not asked for. Switch compression off in the web "
            "server for this folder."
        )


def _start(response: http.client.HTTPResponse, address: str, offset: int) -> int:
    """Position of the first byte of an answer to a request for the bytes from `offset` on."""
    told = response.headers.get("Content-Range", "")
    if response.status == 200:
        return 0
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told, re.ASCII)
        if found and int(found[1]) == offset:
            return offset
        raise ZooError(f"{address} was asked for the bytes from {offset} on and sent {told!r} instead.")
    if response.status == 416:
        if offset and told == f"bytes */{offset}":
            return offset
        raise ZooError(
            f"{address} has no byte {offset} ({told or 'of an unknown number'}): it is shorter than what was published "
            "there. Ask whoever keeps this zoo to copy the file again."
        )
    raise _refusal(response, address)


def _blocks(response: http.client.HTTPResponse, address: str) -> Iterator[bytes]:
    """The body in pieces, counted: http.client does not tell of a body that ends early when it is read so."""
    left = response.length
    while left is None or left > 0:
        try:
            block = response.read1(_BLOCK if left is None else min(_BLOCK, left))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failure(error, address) from error
        if not block:
            break
        if left is not None:
            left -= len(block)
        yield block
    if left:
        raise Transient(f"{address} broke off {left:,} bytes before its end.")


def _refusal(response: http.client.HTTPResponse, address: str) -> ZooError:
    """The error for a status that brings no file."""
    answer = f"{address} answered {response.status} {_told(response.reason)}".rstrip()
    if response.status in _LATER or response.status >= 500:
        seconds = response.headers.get("Retry-After", "")
        return Busy(f"{answer}.", float(seconds) if re.fullmatch(r"\d{1,6}", seconds, re.ASCII) else 0.0)
    if response.status in (401, 403):
        return ZooError(
            f"{answer}: it wants other credentials. Write https://USER:PASSWORD@HOST/..., or pass a header."
        )
    if response.status in _ABSENT:
        return ZooError(f"{answer}. Check the address, or ask whoever keeps this zoo to copy the file again.")
    return ZooError(f"{answer}, which is no file. Check the address.")


def _failure(error: Exception, address: str) -> ZooError:
    """The error for a connection that failed: transient where the next attempt may not."""
    cause = getattr(error, "reason", error)
    cause = cause if isinstance(cause, Exception) else error
    told = _told(str(cause)) or type(cause).__name__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ZooError(
            f"{address}: the certificate is not accepted ({cause.verify_message}). Check the host's name and this "
            "machine's clock; the certificate of an authority of your own is named with SSL_CERT_FILE."
        )
    if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
        return ZooError(f"{address}: no host has this name ({cause.strerror}). Check the address and the network.")
    passing = (TimeoutError, ConnectionError, http.client.IncompleteRead, socket.gaierror, ssl.SSLEOFError)
    if isinstance(cause, passing) or getattr(cause, "errno", None) in _UNREACHABLE:
        return Transient(f"{address}: {told}.")
    return ZooError(f"{address} cannot be read: {told}. Check the address and the proxy.")


def _told(text: str) -> str:
    """What a server says, for a message: its first words, and nothing that a terminal would obey."""
    return printable(text[:100]) + (" ..." if len(text) > 100 else "")
