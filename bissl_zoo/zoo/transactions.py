"""Adding entries to a zoo and taking them away, so that every reader sees a whole one or none.

An entry is visible once the index lists it, and the index is only ever exchanged whole, against the version that was
read (compare and swap). Before that a publisher claims the name by a file in its folder. One that is killed leaves a
folder that no reader looks at, and its claim says whose it was.
"""

import contextlib
import functools
import json
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.download import retrying
from bissl_zoo.zoo.index import INDEX_FILE, INDEX_LIMIT, Index, parse_index
from bissl_zoo.zoo.names import split_version
from bissl_zoo.zoo.page import PAGE_FILE, render_page
from bissl_zoo.zoo.stores import WritableStore
from bissl_zoo.zoo.stores.store import Conflict

CLAIM_FILE = ".publishing"
_ATTEMPTS = 200
_REPAIR = "`tools/zoo.py verify --repair` mends that."

_log = logging.getLogger(__name__)


class Taken(Exception):
    """Another publisher was faster; the name is theirs."""


def read_index(store: WritableStore) -> tuple[Index, str | None]:
    """The index as it is now, and the tag that replacing it asks for."""
    present = retrying(lambda: store.read(INDEX_FILE, INDEX_LIMIT))
    index = parse_index(present.content if present else None, f"{store.location.rstrip('/')}/{INDEX_FILE}")
    return index, present.tag if present else None


def add_entry(
    store: WritableStore, base: str, complete: Callable[[str], tuple[Mapping[str, Path], Mapping[str, Any]]]
) -> str:
    """Add an entry under `base`, or `base@2`, `base@3`, ... where that is taken.

    Args:
        complete: from the name that the entry gets, its files by file name and its index record.
    Returns:
        The name it got.
    Raises:
        ZooError: the store refused; it is as it was then.
    """
    while True:
        with contextlib.suppress(Taken), _claimed(store, base) as name:
            files, record = complete(name)
            for file, path in files.items():
                retrying(functools.partial(store.create, f"{name}/{file}", path))
            _change_index(store, functools.partial(_with, name=name, record=dict(record)))
            break
    _refresh_page(store)
    return name


def remove_entry(store: WritableStore, name: str) -> None:
    """Take an entry out of the index, then its files away. Its name is not used again."""
    if name not in read_index(store)[0].records:
        raise ZooError(f"{store.location} lists no entry '{name}', so there is nothing to remove.")
    _change_index(store, functools.partial(_without, name=name))
    try:
        retrying(lambda: store.remove_folder(name))
    except ZooError as error:
        raise ZooError(f"'{name}' is not listed any more, but its files are left: {error} {_REPAIR}") from error
    finally:
        _refresh_page(store)


def write_page(store: WritableStore) -> None:
    """Write MODEL_ZOO.md anew from the index."""
    for attempt in range(_ATTEMPTS):
        # the page before the index: whoever lists an entry in between replaces the page as well
        present = retrying(lambda: store.read(PAGE_FILE, INDEX_LIMIT))
        index, _ = read_index(store)
        content = render_page(index).encode()
        if present and present.content == content:
            return
        with contextlib.suppress(Conflict):
            return retrying(functools.partial(store.replace, PAGE_FILE, content, present.tag if present else None))
        _wait(attempt)
    raise ZooError(f"{store.location}: {PAGE_FILE} was changed by others {_ATTEMPTS} times in a row; try again later.")


def read_claim(content: bytes) -> dict[str, Any]:
    """Host, process and time of a claim; empty where it was cut short."""
    with contextlib.suppress(ValueError, RecursionError):
        claim = json.loads(content)
        if isinstance(claim, dict):
            return claim
    return {}


def _with(index: Index, *, name: str, record: dict[str, Any]) -> Index:
    if name in index.removed or index.records.get(name, record) != record:
        raise Taken
    return Index({**index.records, name: record}, index.removed)


def _without(index: Index, *, name: str) -> Index:
    kept = {known: record for known, record in index.records.items() if known != name}
    return Index(kept, index.removed if name in index.removed else (*index.removed, name))


def _change_index(store: WritableStore, change: Callable[[Index], Index]) -> None:
    """Replace the index by what `change` makes of it, which made twice is as if made once."""
    for number in range(_ATTEMPTS):
        index, tag = read_index(store)
        changed = change(index)
        if changed == index:  # an earlier attempt did it whose answer was lost
            return
        with contextlib.suppress(Conflict):
            return retrying(functools.partial(store.replace, INDEX_FILE, changed.to_bytes(), tag))
        _wait(number)
    raise ZooError(f"{store.location}: the index was changed by others {_ATTEMPTS} times in a row; try again later.")


def _refresh_page(store: WritableStore) -> None:
    """Write the page, which is not worth failing for: the index has changed already."""
    try:
        write_page(store)
    except ZooError as error:
        _log.warning("%s is not up to date (%s). %s", PAGE_FILE, error, _REPAIR)


@contextlib.contextmanager
def _claimed(store: WritableStore, base: str) -> Iterator[str]:
    """A name that nobody else gets; where the block fails, its folder is removed."""
    claim = json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "attempt": secrets.token_hex(8),
        }
    ).encode()
    version, name, ours = 0, "", False
    try:
        while not ours:
            version = _free_version(store, base, version)
            name = base if version == 1 else f"{base}@{version}"
            ours = _claim(store, name, claim)
        yield name
    except BaseException:
        _give_up(store, name, claim, ours)
        raise
    _give_up(store, name, claim, ours)


def _free_version(store: WritableStore, base: str, above: int) -> int:
    index, _ = read_index(store)
    known = {*index.records, *index.removed, *retrying(store.folders)}
    return max([above, *(split_version(name)[1] for name in known if split_version(name)[0] == base)]) + 1


def _claim(store: WritableStore, name: str, claim: bytes) -> bool:
    """Whether the name is this publisher's now."""
    try:
        retrying(lambda: store.create(f"{name}/{CLAIM_FILE}", claim))
    except Conflict:
        if not _holds(store, name, claim):  # else only the answer to an earlier attempt was lost
            return False
    # who had claimed it before may have finished since the index was read
    if name not in read_index(store)[0].records:
        return True
    retrying(lambda: store.remove(f"{name}/{CLAIM_FILE}"))
    return False


def _holds(store: WritableStore, name: str, claim: bytes) -> bool:
    present = retrying(lambda: store.read(f"{name}/{CLAIM_FILE}", INDEX_LIMIT))
    return present is not None and present.content == claim


def _give_up(store: WritableStore, name: str, claim: bytes, ours: bool) -> None:
    """Let go of a name: of the claim alone where the entry is listed, else of all that was written."""
    try:
        if not name or not (ours or _holds(store, name, claim)):
            return
        if name in read_index(store)[0].records:
            retrying(lambda: store.remove(f"{name}/{CLAIM_FILE}"))
        else:
            retrying(lambda: store.remove_folder(name))
    except ZooError as error:
        _log.warning("%s may hold something left over from this attempt (%s). %s", name, error, _REPAIR)


def _wait(attempt: int) -> None:
    """Step aside for the others, longer each time up to a second, and not in step with them."""
    time.sleep(random.Random().uniform(0.0, min(1.0, 0.01 * 2 ** min(attempt, 8))))
