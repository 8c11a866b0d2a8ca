"""A zoo at any address that fsspec opens, for reading: s3://, gs://, memory:// and so on."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from fsspec.core import url_to_fs

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores import Missing, Store, Transient

#: the extra of this package that installs what fsspec needs, by scheme
EXTRAS = {"gs": "gs", "gcs": "gs", "s3": "s3", "hf": "hub"}
_BLOCK = 1 << 20


class FsspecStore(Store):
    """Files below an address of fsspec.

    There is no `publish`: fsspec has no conditional write with which two publishers could replace an index safely.
    """

    def __init__(self, location: str) -> None:
        self.location = re.sub(r"//[^/@]*:[^/@]*@", "//", location).rstrip("/")
        scheme = location.partition("://")[0]
        try:
            self.files, self.root = url_to_fs(location, use_listings_cache=False)
        except ImportError as error:
            install = f'pip install "bissl_zoo[{EXTRAS[scheme]}]"' if scheme in EXTRAS else "install it"
            raise ZooError(f"{self.location} needs a library that is not installed ({error}): {install}.") from error
        except Exception as error:  # any error of the file system's library
            raise ZooError(f"{self.location} cannot be opened: {type(error).__name__}: {error}.") from error

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See :class:`Store`."""
        with self._errors(path):
            self.files.invalidate_cache()
            stream = self._open(f"{self.root.rstrip('/')}/{path}", start)
        with contextlib.closing(stream):
            while True:
                with self._errors(path):
                    block = stream.read(_BLOCK)
                if not block:
                    return
                yield block

    def _open(self, path: str, start: int) -> Any:
        stream = self.files.open(path, "rb")
        stream.seek(start)
        return stream

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any error of the file system's library
            raise self._error(error, f"{self.location}/{path}") from error

    def _error(self, error: Exception, address: str) -> ZooError:
        """Return the error to raise for an error of the file system's library."""
        if isinstance(error, FileNotFoundError):
            return Missing(f"{address} does not exist.")
        status = next((v for k in ("status", "code", "http_status") if isinstance(v := getattr(error, k, 0), int)), 0)
        kind = (
            Transient if isinstance(error, ConnectionError | TimeoutError) or status == 429 or status >= 500 else None
        )
        return (kind or ZooError)(f"{address} cannot be read: {type(error).__name__}: {error}.")
