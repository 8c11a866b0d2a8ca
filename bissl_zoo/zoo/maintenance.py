"""Looking a zoo over: is every file what the index lists, and did an interrupted publisher leave something?"""

import functools
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.download import retrying
from bissl_zoo.zoo.index import INDEX_FILE, INDEX_LIMIT, parse_index
from bissl_zoo.zoo.page import PAGE_FILE, render_page
from bissl_zoo.zoo.stores import Store, WritableStore
from bissl_zoo.zoo.transactions import CLAIM_FILE, read_claim, read_index, write_page

#: a claim of another machine that is older belongs to nobody
CLAIM_LIFETIME = timedelta(hours=24)


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        where: the entry, or the file of the zoo.
        what: is wrong with it.
        advice: what a person can do; empty where `repair` can do it.
        repair: mends it, None where that takes a person.
    """

    where: str
    what: str
    advice: str = ""
    repair: Callable[[], None] | None = None


def verify(store: Store, tell: Callable[[str], None] = lambda name: None) -> Iterator[Finding]:
    """Compare every file with the index and, where one can publish, look for what interrupted publishers left.

    Args:
        tell: called with the name of each entry before it is read.
    Raises:
        ZooError: the index itself cannot be used, or the store not be reached.
    """
    present = retrying(lambda: store.read(INDEX_FILE, INDEX_LIMIT))
    index = parse_index(present.content if present else None, f"{store.location.rstrip('/')}/{INDEX_FILE}")
    for name, record in index.records.items():
        tell(name)
        for file, facts in record["files"].items():
            what = _difference(store, f"{name}/{file}", facts)
            if what:
                yield Finding(
                    f"{name}/{file}", what, "copy the entry again from where it came, or remove it and publish it again"
                )
    if isinstance(store, WritableStore):
        yield from _leftovers(store)
        index, _ = read_index(store)
        page = store.read(PAGE_FILE, INDEX_LIMIT)
        if (page.content if page else None) != render_page(index).encode() and (page or index.records):
            yield Finding(PAGE_FILE, "is not what the index says", repair=lambda: write_page(store))


def _difference(store: Store, path: str, facts: dict[str, Any]) -> str:
    """How a file differs from its record, an empty string where it does not."""

    def measure() -> tuple[int, str]:
        size, digest = 0, hashlib.sha256()
        with store.open(path) as body:
            for block in body.blocks:
                size += len(block)
                if size > facts["size"]:
                    break
                digest.update(block)
        return size, digest.hexdigest()

    try:
        size, sha256 = retrying(measure)
    except ZooError as error:
        return f"cannot be read: {error}"
    if size != facts["size"]:
        return f"has {'more than ' if size > facts['size'] else ''}{min(size, facts['size'])} of {facts['size']} bytes"
    return "" if sha256 == facts["sha256"] else f"has sha256 {sha256}, and not {facts['sha256']}"


def _leftovers(store: WritableStore) -> Iterator[Finding]:
    claims = {}
    for name in retrying(store.folders):
        try:
            claims[name] = retrying(functools.partial(store.read, f"{name}/{CLAIM_FILE}", INDEX_LIMIT))
        except ZooError as error:
            yield Finding(name, f"cannot be read: {error}", "look at it, and move it elsewhere")
    # after the claims: what their publishers have listed before they died, or finished, is in this index
    index, _ = read_index(store)
    for name, claim in claims.items():
        owner = _living_owner(read_claim(claim.content)) if claim else ""
        if owner:
            yield Finding(name, f"is being published by {owner}", "wait for it, or end it")
        elif name in index.records:
            if claim:  # the publisher was killed after its last but one step
                path = f"{name}/{CLAIM_FILE}"
                yield Finding(path, "is left over; the entry is complete", repair=lambda path=path: store.remove(path))
        elif claim or name in index.removed:
            what = "is left over from a removal" if name in index.removed else "is left over from a killed publisher"
            yield Finding(name, what, repair=lambda name=name: store.remove_folder(name))
        else:
            yield Finding(name, "is a folder that the index does not list", "look at it, and move it elsewhere")


def _living_owner(claim: dict[str, Any]) -> str:
    """Who holds a claim, an empty string where nobody does."""
    try:
        host, pid = str(claim["host"]), int(claim["pid"])
        age = datetime.now(timezone.utc) - datetime.fromisoformat(claim["time"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return ""  # cut short by the kill
    if age > CLAIM_LIFETIME or (host == socket.gethostname() and not _lives(pid)):
        return ""
    return f"process {pid} on {host} since {claim['time']}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
