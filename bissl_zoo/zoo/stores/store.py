"""What a zoo needs of the place it is kept in."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bissl_zoo.errors import ZooError


class Transient(ZooError):
    """A failure that the next attempt may not have: a reset, a timeout, a server that is busy."""


class Conflict(ZooError):
    """Somebody else has written this file meanwhile."""


@dataclass(frozen=True)
class Content:
    """A small file as it was at one moment.

    Attributes:
        content: its bytes.
        tag: what :meth:`WritableStore.replace` compares.
    """

    content: bytes
    tag: str


@dataclass(frozen=True)
class Body:
    """The bytes of a file on their way.

    Attributes:
        start: position of the first byte, which is 0 where the place cannot begin in the middle.
        blocks: what follows; raises `Transient` where it breaks off.
    """

    start: int
    blocks: Iterator[bytes]


class Store(ABC):
    """Files below one location, by relative path with '/' (`"index.json"`, `"NAME/model.safetensors"`).

    Every method raises `ZooError` with the address and what to do where the location refuses, and `Transient` where
    trying again may help. None of them tries again by itself.

    Attributes:
        location: as messages show it, without credentials.
    """

    location: str

    @abstractmethod
    def read(self, path: str, limit: int) -> Content | None:
        """A whole small file; None where there is none; `ZooError` for more than `limit` bytes."""

    @abstractmethod
    def open(self, path: str, offset: int = 0) -> AbstractContextManager[Body]:
        """A file's bytes from `offset` on."""

    def local_path(self, path: str) -> Path | None:
        """Where the file lies on this machine, for stores that need no copy of it."""
        return None


class WritableStore(Store):
    """A store that entries can be published to."""

    @abstractmethod
    def create(self, path: str, source: Path | bytes) -> None:
        """Write a new file.

        Raises:
            Conflict: there is one of that name already.
        """

    @abstractmethod
    def replace(self, path: str, content: bytes, tag: str | None) -> None:
        """Put `content` in the place of a file at once, if it is still what `read` gave with `tag`.

        Args:
            tag: None for a file that did not exist.
        Raises:
            Conflict: it is not; nothing was changed.
        """

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders there are, those of entries that no index lists included."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Remove a folder and the files in it."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove one file, where it is there."""
