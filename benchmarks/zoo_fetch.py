"""Fetching and checking a file of a zoo over loopback beside curl and sha256sum, interleaved on the same file.

    python benchmarks/zoo_fetch.py
    python benchmarks/zoo_fetch.py --mib 500 --rounds 7 --folder /dev/shm

    fetch      Cache.fetch into an empty cache from `bissl_zoo.zoo.serve`: received, hashed, written, synced
    load       Cache.fetch again, which reads and hashes the copy
    curl       curl of the same address into a file, neither checked nor synced
    sha256sum  of the served file

The ratio is the throughput of fetch over that of the slower of the two tools; both do in turn what fetch does at once.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.stores.http import HttpStore
from bissl_zoo.zoo.stores.store import Body, Content

FILE = "name/model.safetensors"


class CountingStore(HttpStore):
    """Counts the requests made and the bytes received."""

    requests = received = 0

    def read(self, path: str, limit: int) -> Content | None:
        self.requests += 1
        found = super().read(path, limit)
        self.received += len(found.content) if found else 0
        return found

    @contextlib.contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[Body]:
        self.requests += 1
        with super().open(path, offset) as body:
            yield Body(body.start, self._counted(body.blocks))

    def _counted(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.received += len(block)
            yield block


def write_zoo(folder: Path, mib: int) -> str:
    """A zoo with one random file; its sha256."""
    (folder / FILE).parent.mkdir(parents=True)
    (folder / "index.json").write_text("{}")
    generator, digest = random.Random(0), hashlib.sha256()
    with open(folder / FILE, "wb") as stream:
        for _ in range(mib):
            block = generator.randbytes(1 << 20)
            digest.update(block)
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which another process serves a folder."""
    program = "import sys; from bissl_zoo.zoo.serve import serve; serve(sys.argv[1], port=0)"
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield next(line.partition("=")[2].strip() for line in process.stdout if "export" in line)
        finally:
            process.kill()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(folder: Path, address: str, sha256: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round after one that warms up."""
    source, copy, store = folder / "zoo" / FILE, folder / "copy", HttpStore(address)
    size = source.stat().st_size

    def fetch() -> None:
        Cache(folder / "cache").fetch(store, FILE, sha256, size)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    calls = {
        "fetch": fetch,
        "load": fetch,
        "curl": lambda: run("curl", "--silent", "--fail", "--output", str(copy), f"{address}/{FILE}"),
        "sha256sum": lambda: run("sha256sum", str(source)),
    }
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        copy.unlink(missing_ok=True)
        os.sync()  # what one wrote is not written during another's time
        for name, call in calls.items():
            took = seconds(call)
            if name == "curl":
                os.sync()
            if number:
                figures[name].append(took)
    return figures


def traffic(folder: Path, address: str, sha256: str) -> dict[str, int]:
    """Requests and bytes of an index and a file fetched into an empty cache, and of both once more."""
    size = (folder / "zoo" / FILE).stat().st_size
    cache, counts = Cache(folder / "counted"), {}
    for name in ("first", "second"):
        store = CountingStore(address)
        cache.read_index(store, "index.json", 1 << 20)
        cache.fetch(store, FILE, sha256, size)
        counts |= {f"requests_{name}": store.requests, f"bytes_{name}": store.received}
    return {**counts, "bytes_of_the_file": size, "bytes_of_the_index": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder by default")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        sha256 = write_zoo(folder / "zoo", args.mib)
        with served(folder / "zoo") as address:
            figures = measure(folder, address, sha256, args.rounds)
            counts = traffic(folder, address, sha256)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    slower = max(medians["curl"], medians["sha256sum"])
    print("| | s (median) | s (least to most) | MiB/s |\n|---|---|---|---|")
    for name, values in figures.items():
        rate = args.mib / medians[name]
        print(f"| {name} | {medians[name]:.2f} | {min(values):.2f} to {max(values):.2f} | {rate:.0f} |")
    print(f"\nfetch over the slower of curl and sha256sum: {slower / medians['fetch']:.2f}")
    print(", ".join(f"{what.replace('_', ' ')}: {count:,}" for what, count in counts.items()))
    if args.output:
        args.output.write_text(json.dumps({"medians": medians, "figures": figures, **counts}, indent=2))


if __name__ == "__main__":
    main()
