"""Places a zoo can be stored in: the `Store` contract, the registry of URL schemes, and `open_store`."""

import importlib
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.limits import limit, stated

__all__ = ["Draft", "Missing", "Store", "Transient", "open_store", "register_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_LOST_SLASH = re.compile(r"(file|gs|hf|https?|s3):/*", re.IGNORECASE)


class Missing(ZooError):
    """The file does not exist."""


class Transient(ZooError):
    """A failure that a retry may solve: a reset connection, a timeout, a busy server.

    Attributes:
        retry_after: seconds that the server asked to wait.
    """

    retry_after = 0.0


@dataclass(frozen=True)
class Draft:
    """An entry to publish.

    Attributes:
        base: its name without a version.
        folder: holds its files.
        complete: called with the final name; writes the files that depend on it, and returns the index record.
        once: return the existing entry if a version has the same weights, heads and configuration.
    """

    base: str
    folder: Path
    complete: Callable[[str], dict[str, Any]]
    once: bool = False


class Store(ABC):
    """Files below one location, by relative path with '/' (`"index.json"`, `"NAME/model.safetensors"`).

    Methods raise `ZooError` with the address, and `Transient` if a retry may help. They do not retry themselves.
    A store for a new URL scheme implements `read`, and `publish` and `remove` if it can be written to.

    Attributes:
        location: the address in messages, without credentials.
        writable: entries can be published to it.
    """

    location: str
    writable = False

    @abstractmethod
    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from byte `start` on; raise `Missing` if it does not exist."""

    def publish(self, draft: Draft) -> str:
        """Add an entry as `NAME`, or as `NAME@2`, `NAME@3`, ... if the name is taken, and return its name."""
        raise ZooError(
            f"{self.location} is read-only. Publish to a folder or to hf://USER/REPO. For a web server or a bucket, "
            "publish to a folder and upload it: entry folders first, index.json last."
        )

    def remove(self, name: str) -> None:
        """Remove an entry from the index and delete its files."""
        raise ZooError(f"{self.location} is read-only; nothing was removed.")

    def local_path(self, path: str) -> Path | None:
        """Return the file on this machine, for stores whose files need no copy."""
        return None

    def read_index(self, path: str) -> bytes | None:
        """Return an index file, None if it does not exist; raise `ZooError` above its limits of bytes and seconds."""
        content, start = bytearray(), time.monotonic()
        where = f"{self.location.rstrip('/')}/{path}"
        try:
            for block in self.read(path):
                content += block
                if (seconds := time.monotonic() - start) > limit("SECONDS"):
                    raise ZooError(f"{where} is not complete after {seconds:,.0f} s; {stated('SECONDS')}.")
                if len(content) > limit("INDEX_BYTES"):
                    raise ZooError(f"{where} has more bytes than an index may have; {stated('INDEX_BYTES')}.")
        except Missing:
            return None
        return bytes(content)


_STORES: dict[str, str | Callable[[str], Store]] = {
    "http": "bissl_zoo.zoo.stores.http:HttpStore",
    "https": "bissl_zoo.zoo.stores.http:HttpStore",
    "hf": "bissl_zoo.zoo.stores.huggingface:HuggingFaceStore",
}


def register_store(scheme: str, store: Callable[[str], Store]) -> None:
    """Open locations that start with `scheme://` by calling `store(location)`."""
    _STORES[scheme.lower()] = store


def open_store(location: str | os.PathLike[str]) -> Store:
    """Open the store at a folder path or an address such as `https://host/zoo`, `hf://user/repo` or `s3://bucket/zoo`.

    Nothing is read yet. Schemes without a registered store are opened with fsspec, for reading.

    Raises:
        ZooError: an unknown scheme, a missing library, or an invalid address.
    """
    from bissl_zoo.zoo.stores.folder import FolderStore

    text = os.fspath(location)
    match = _SCHEME.match(text)
    if match is None:
        if _LOST_SLASH.match(text) and not os.path.exists(text):
            raise ZooError(f"There is no folder '{text}'. An address begins with '//' after its scheme.")
        return FolderStore(text)
    scheme = match[1].lower()
    text = f"{scheme}://{text[match.end() :]}"
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ZooError(f"'{text}' is not a folder of this machine. Write file:///FOLDER or the path.")
        return FolderStore(url2pathname(parts.path))
    store = _STORES.get(scheme)
    if store is None:
        from fsspec import available_protocols

        from bissl_zoo.zoo.stores.fsspec import FsspecStore

        if scheme.partition("::")[0] not in available_protocols():
            known = sorted({"file", "s3", "gs", *_STORES})
            hint = did_you_mean(scheme, [*known, *available_protocols()])
            raise ZooError(
                f"Unknown scheme '{scheme}://'.{hint} A zoo is a folder, or an address that starts with "
                f"{', '.join(f'{name}://' for name in known)} or another scheme of fsspec. "
                "Register your own with bissl_zoo.zoo.stores.register_store."
            )
        return FsspecStore(text)
    if isinstance(store, str):
        module, _, name = store.partition(":")
        store = getattr(importlib.import_module(module), name)
    return store(text)
