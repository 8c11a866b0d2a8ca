"""Where a zoo can be kept: a folder, a web server, S3, the Hugging Face hub, and whatever iopath or fsspec open."""

import os
import re
from urllib.parse import urlsplit
from urllib.request import url2pathname

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.store import Store, WritableStore

__all__ = ["Store", "WritableStore", "open_store", "writable"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_LOST_SLASH = re.compile(r"(file|gs|hf|https?|s3):/*", re.IGNORECASE)


def open_store(location: str | os.PathLike[str]) -> Store:
    """The store at a folder's path or an address such as `s3://bucket/zoo`, `hf://user/repo` or `https://host/zoo`.

    Nothing is asked of the place yet, and libraries are imported for the schemes that need them only.

    Raises:
        ZooError: for a scheme that is not known, one whose library is not installed, or an address it does not take.
    """
    text = os.fspath(location)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _folder(text)
    # the case of a scheme means nothing, and handlers compare prefixes
    name = scheme[1].lower()
    text = f"{name}://{text[scheme.end() :]}"
    if name == "file":
        return _folder(_path_of(text))
    if name in ("http", "https"):
        from bissl_zoo.zoo.stores.http import HttpStore

        return HttpStore(text)
    if name == "s3":
        from bissl_zoo.zoo.stores.s3 import S3Store

        return S3Store(text)
    if name == "hf":
        from bissl_zoo.zoo.stores.huggingface import HubStore

        return HubStore(text)
    from bissl_zoo.zoo.stores.remote import RemoteStore

    return RemoteStore(text)


def writable(store: Store) -> WritableStore:
    """The same store, if entries can be published to it.

    Raises:
        ZooError: it can only be read from.
    """
    if isinstance(store, WritableStore):
        return store
    raise ZooError(
        f"{store.location} can be read from, but not published to. Publish to a folder, s3://BUCKET/FOLDER or "
        "hf://USER/REPO; or publish to a folder and copy it there, entry folders first and index.json last, so that no "
        "index lists what has not arrived."
    )


def _folder(path: str) -> Store:
    from bissl_zoo.zoo.stores.folder import FolderStore

    slip = _LOST_SLASH.match(path)
    if slip and not os.path.exists(path):
        scheme = slip[1].lower()
        meant = f"{scheme}:{'///' if scheme == 'file' else '//'}{path[slip.end() :]}"
        raise ZooError(f"There is no folder '{path}'. Did you mean '{meant}'?")
    return FolderStore(path)


def _path_of(address: str) -> str:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ZooError(f"'{address}' is not the address of a folder of this machine: write file:///FOLDER or its path.")
    return url2pathname(parts.path)
