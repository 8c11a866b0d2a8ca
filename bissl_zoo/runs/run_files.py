"""Single files of a run directory, read while somebody may be writing them, or after they were damaged."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from bissl_zoo.runs.lock import HEARTBEAT, MISSED, read_lock, started_at

#: bytes at the end of metrics.jsonl that tell what was last
TAIL = 1 << 18


def last_figures(path: Path, whole: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By stage the last `step` in `metrics.jsonl` and the last value of each figure; and what cannot be read.

    Args:
        whole: read all of it, rather than its end.
    """
    found: dict[str, dict[str, Any]] = {}
    unread = 0
    if not os.path.isfile(path):
        return found, []
    try:
        with open(path, "rb") as file:
            if not whole and path.stat().st_size > TAIL:
                file.seek(-TAIL, os.SEEK_END)
                file.readline()  # entered in the middle
            for line in file:
                record = _record(line)
                if record:
                    stage = record.pop("stage")
                    found[stage] = {**found.get(stage, {}), **record}
                elif line.endswith(b"\n"):  # else it is being written, or a resumed run drops it
                    unread += 1
    except OSError as error:
        return found, [f"{path.name} cannot be read: {error.strerror}"]
    return found, [f"{path.name}: {unread} lines cannot be read"] if unread else []


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    # it becomes the name of a folder
    return record if re.fullmatch(r"\w{1,64}", str(record.get("stage")), re.ASCII) else None


def writer_of(lock: Path) -> str | None:
    """The process that holds a run's lock, if it lives; of another machine's, if its last sign of life is recent."""
    try:
        holder = read_lock(lock)
    except RecursionError:
        return None
    if type(holder.get("pid")) is not int:
        return None
    who = f"process {holder['pid']} on {holder['host']}"
    if holder["host"] == socket.gethostname():
        return who if holder["started"] is not None and started_at(holder["pid"]) == holder["started"] else None
    age = time.time() - modified(lock)
    return f"{who}, heard of {max(age, 0):.0f} s ago" if age < HEARTBEAT * MISSED else None


def modified(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def size_of(folder: Path) -> int:
    """Bytes of all files in and below `folder`; those that go meanwhile are not counted."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
