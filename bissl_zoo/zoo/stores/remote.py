"""A zoo to read from any place that iopath or fsspec can open files in."""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

import fsspec

from bissl_zoo.data.remote_files import PATH_MANAGER, AddressError, UnknownScheme, ZooPathManager, opener
from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.zoo.stores.store import Body, Content, Store, Transient

__all__ = ["BUILT_IN", "PATH_MANAGER", "RemoteStore", "ZooPathManager"]

#: schemes that have a store of their own
BUILT_IN = ("file", "hf", "http", "https", "s3")
_BLOCK = 1 << 20


class RemoteStore(Store):
    """Files below an address of a registered iopath handler, else of a scheme that fsspec has an implementation for.

    Neither can replace an index only if nobody else has, so nothing is published to such a place directly: publish to a
    folder and copy it there, entry folders first, `index.json` last.
    """

    def __init__(self, location: str) -> None:
        base = location if location.endswith("://") else location.rstrip("/") + "/"
        self.location = re.sub(r"//[^/@]*@", "//", base.removesuffix("/"))
        self._open, self._forget = _opener(base, self.location)

    def read(self, path: str, limit: int) -> Content | None:
        """See :class:`Store`."""
        self._forget()
        address = f"{self.location}/{path}"
        try:
            with _telling(address), self._open(path) as stream:
                content = stream.read(limit + 1)
        except _Missing:
            return None
        if len(content) > limit:
            raise ZooError(f"{address} has more than {limit:,} bytes, which is too much for what it should be.")
        return Content(content, hashlib.sha256(content).hexdigest())

    @contextlib.contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[Body]:
        """See :class:`Store`."""
        address = f"{self.location}/{path}"
        with contextlib.ExitStack() as stack:
            with _telling(address):
                stream = stack.enter_context(self._open(path))
                start = offset if offset and stream.seekable() else 0
                if start:
                    stream.seek(start)
            yield Body(start, _blocks(stream, address))


class _Missing(ZooError):
    """There is no such file."""


def _opener(base: str, shown: str) -> tuple[Callable[[str], IO[bytes]], Callable[[], None]]:
    """What opens a file below a location, and what makes it look again at what there is."""
    try:
        return opener(base, shown, PATH_MANAGER)
    except UnknownScheme as error:
        raise ZooError(_unknown(error.scheme, shown)) from error
    except AddressError as error:
        raise ZooError(str(error)) from error


def _unknown(scheme: str, shown: str) -> str:
    own = [prefix.partition("://")[0] for prefix in PATH_MANAGER.prefixes()]
    known = sorted({*BUILT_IN, *own})
    near = did_you_mean(scheme, [*known, *fsspec.available_protocols()])
    return (
        f"'{scheme}://' of '{shown}' is not known.{near} A zoo is a folder's path or begins with "
        f"{', '.join(f'{name}://' for name in known)}, or what fsspec knows (fsspec.available_protocols()). "
        "Handlers of your own: bissl_zoo.zoo.stores.remote.PATH_MANAGER."
    )


def _blocks(stream: IO[bytes], address: str) -> Iterator[bytes]:
    with _telling(address):
        while block := stream.read(_BLOCK):
            yield block


@contextlib.contextmanager
def _telling(address: str) -> Iterator[None]:
    """Raise what a library raises inside as an error for people."""
    try:
        yield
    except FileNotFoundError as error:
        raise _Missing(f"{address} does not exist.") from error
    except Exception as error:  # handlers and implementations raise what their libraries raise
        kind = Transient if _may_pass(error) else ZooError
        raise kind(f"{address} cannot be read: {type(error).__name__}: {error}.") from error


def _may_pass(error: Any) -> bool:
    status = next((value for name in ("status", "code") if isinstance(value := getattr(error, name, None), int)), 0)
    return isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError)) or status == 429 or status >= 500
