"""Hostile input for fuzz tests: valid files that are damaged, and a check of what the reader of a file does."""

import contextlib
import copy
import json
import os
import signal
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

#: stand-ins for values that `json.dumps` cannot write: nesting beyond any recursion limit, a number of 5000 digits
_WRITTEN = {f"@deep {depth}@": "[" * depth + "]" * depth for depth in (150, 330, 600, 20_000)} | {
    "@digits@": "9" * 5000
}

NAMES = ("../../x", "/etc/passwd", "a/b", "..", "", "a\0b", "\ud800", "x" * 3000, "~", "c:\\x", "state.json")
TEXTS = (*NAMES, "0", "nan", "1e999", "-1", "9" * 5000, "\x1b[2J", "\u202e", "${a}", "${oc.env:HOME}", "Infinity")
NUMBERS = (-1, 0, 1, 3.5, 1e308, float("nan"), float("inf"), 10**400, 1 << 62, True)
CONTAINERS = ([], {}, [[]], {"a": {}}, [1, "a"], {"$tuple": 1}, {"$tensor": "x"}, {"$tensor": []}, {"$dict": [[[], 1]]})
VALUES = st.sampled_from([None, *_WRITTEN, *TEXTS, *NUMBERS, *CONTAINERS])


@st.composite
def damaged(draw: Any, valid: Sequence[bytes]) -> bytes:
    """Return one of `valid` after up to three cuts, flips, repetitions and insertions."""
    content = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        piece = content[start:end]
        kinds = [b"", bytes(byte ^ 255 for byte in piece), piece * 3, draw(st.binary(max_size=8)) + piece]
        content = content[:start] + draw(st.sampled_from(kinds)) + content[end:]
        if draw(st.integers(0, 9)) == 9:
            content = content[:start]
    return content


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """A JSON document in which up to three values were exchanged, removed, renamed or repeated."""
    document = {"root": copy.deepcopy(document)}
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(document))
        node, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["exchange", "exchange", "remove", "rename", "repeat"]))
        if kind == "exchange" or node is document:
            node[key] = copy.deepcopy(draw(VALUES))
        elif kind == "remove":
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from(TEXTS))] = node.pop(key)
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
    return document["root"]


def as_json(document: Any) -> bytes:
    """Return a document of `changed` as the bytes of a JSON file."""
    text = json.dumps(document)
    for stand_in, written in _WRITTEN.items():
        text = text.replace(f'"{stand_in}"', written)
    return text.encode()


def json_files(document: Any) -> st.SearchStrategy[bytes]:
    """JSON files of `document` with other values or damaged bytes, or random bytes."""
    return changed(document).map(as_json) | damaged([as_json(document)]) | st.binary(max_size=60)


def safetensors_of(header: bytes, body: bytes, claimed: int | None = None) -> bytes:
    """Return a safetensors file; `claimed` is the stated length of the header, None for the true one."""
    return (len(header) if claimed is None else claimed).to_bytes(8, "little") + header + body


def safetensors_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Files like `valid` with another header, a wrong length or damaged bytes, or random bytes."""
    length = int.from_bytes(valid[:8], "little")
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    dtypes = st.sampled_from("BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F4 F6_E2M3 C64 U16 U32 U64 BF16 F64 F1".split())
    first = next(name for name in header if name != "__metadata__")
    retyped = dtypes.map(lambda dtype: header | {first: {**header[first], "dtype": dtype}})
    headers = changed(header).map(as_json) | retyped.map(as_json)
    claims = st.sampled_from([None] * 9 + [0, length - 1, 10 << 30, (1 << 64) - 1])
    made = st.builds(safetensors_of, headers, st.just(body) | st.binary(max_size=40), claims)
    return made | damaged([valid]) | st.binary(max_size=60)


def png_of(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """Return a PNG file with valid checksums and any header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


_RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class"}
_MOVES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
_watch: dict[str, Any] = {"folder": None, "port": None, "seen": []}


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _watch["folder"]
    if folder is None:
        return
    beside = event in _MOVES and isinstance(arguments[-1], int) and arguments[-1] >= 0  # of a folder that was opened
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    paths = (
        [path for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike))]
        if event in _MOVES and not beside
        else []
    )
    paths += [arguments[0]] if writes and not isinstance(arguments[0], int) else []
    if event == "socket.connect" and arguments[1] == ("127.0.0.1", _watch["port"]):
        return
    outside = [path for path in paths if not os.path.abspath(os.fsdecode(path)).startswith(folder)]
    if event in _RUNS or outside:
        _watch["seen"].append((event, arguments))


sys.addaudithook(_notice)  # a hook cannot be removed; `_watch["folder"]` turns it on and off


@contextlib.contextmanager
def watched(folder: Path, port: int | None = None) -> Iterator[None]:
    """Fail if the block starts a program, unpickles a name, writes outside `folder`, or connects except to `port`."""
    _watch.update(folder=os.path.abspath(folder), port=port, seen=[])
    try:
        yield
    finally:
        _watch["folder"] = None
    assert not _watch["seen"], str(_watch["seen"][:3])[:500]


#: makes something in place of a regular file, which must not be opened
SPECIAL_FILES = {"pipe": os.mkfifo, "device": lambda path: os.symlink("/dev/zero", path), "folder": os.mkdir}


@contextlib.contextmanager
def time_limit(seconds=30):
    """Fail if the block does not end, as when it reads from a pipe."""

    def give_up(number, frame):
        raise AssertionError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
