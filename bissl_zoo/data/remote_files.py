"""Files at any address that a handler of iopath or an implementation of fsspec opens; zoos and data sets share it."""

from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import fsspec
from fsspec.core import url_to_fs
from iopath.common.file_io import PathManager

from bissl_zoo.errors import BisslZooError

#: our extras that bring what fsspec needs, by scheme
EXTRAS = {"gs": "gs", "gcs": "gs", "s3": "shards"}
_TIMEOUT = 60  # seconds without a byte


class ZooPathManager(PathManager):
    """iopath's path manager, which can tell what it knows."""

    def prefixes(self) -> list[str]:
        """What locations begin with that a registered handler is for."""
        return list(self._path_handlers)


#: for handlers of one's own: `PATH_MANAGER.register_handler(MyHandler())`, then `open_store("my://zoo")`
PATH_MANAGER = ZooPathManager()
PATH_MANAGER.set_logging(False)


class AddressError(BisslZooError):
    """Nothing opens such an address, or what would is not installed."""


class UnknownScheme(AddressError):
    """An address begins with what neither a handler nor fsspec is for."""

    def __init__(self, scheme: str, shown: str) -> None:
        super().__init__(
            f"'{scheme}://' of '{shown}' is not known. Accepted are paths, http://, https://, s3://, gs://, what else "
            "fsspec knows (fsspec.available_protocols()), and handlers of your own on bissl_zoo.data.remote_files."
            "PATH_MANAGER."
        )
        self.scheme = scheme


def opener(
    base: str, shown: str, manager: ZooPathManager = PATH_MANAGER
) -> tuple[Callable[[str], IO[bytes]], Callable[[], None]]:
    """What opens a file below the location `base`, and what makes it look again at what there is.

    Args:
        base: as a handler or fsspec takes it; ends with "/" unless it is a bare scheme.
        shown: the location in messages.
    Raises:
        AddressError: an unknown scheme, or a library that is missing or refuses the location.
    """
    if any(base.startswith(prefix) for prefix in manager.prefixes()):
        return lambda path: manager.open(base + path, "rb"), lambda: None
    scheme = base.partition("://")[0]
    if scheme.partition("::")[0] not in fsspec.available_protocols():
        raise UnknownScheme(scheme, shown)
    try:
        files, root = url_to_fs(base)
    except ImportError as error:
        install = f'pip install "bissl_zoo[{EXTRAS[scheme]}]"' if scheme in EXTRAS else str(error)
        raise AddressError(f"{shown} needs a library that is not installed ({error}): {install}") from error
    except Exception as error:  # an implementation raises what its library raises
        raise AddressError(f"{shown} cannot be opened: {type(error).__name__}: {error}.") from error
    return lambda path: files.open(f"{root.rstrip('/')}/{path}", "rb"), files.invalidate_cache


def is_remote(address: str) -> bool:
    """Whether an address is neither a path nor the `file://` of one."""
    return "://" in address and not address.startswith("file://")


def local_path(address: str) -> Path:
    """The path that an address which is not remote stands for."""
    return Path(url2pathname(urlsplit(address).path) if address.startswith("file://") else address).expanduser()


def open_file(address: str) -> IO[bytes]:
    """Open a file at a path or an address for reading; what is remote need not be seekable.

    Over http one response is read from front to end: fsspec's asks for ranges, which not every server knows, and gives
    up what takes longer than five minutes in all.

    Raises:
        AddressError: see :func:`opener`.
        OSError, or what the library of the scheme raises: the file is missing or cannot be read.
    """
    if not is_remote(address):
        return open(local_path(address), "rb")
    own = any(address.startswith(prefix) for prefix in PATH_MANAGER.prefixes())
    if address.startswith(("http://", "https://")) and not own:
        return _open_http(address)
    base, _, name = address.rpartition("/")
    return opener(f"{base}/", address)[0](name)


def _open_http(address: str) -> IO[bytes]:
    try:
        return urlopen(address, timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(f"{address}: {error.code} {error.reason}") from error
        raise
