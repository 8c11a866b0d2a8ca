"""Compare downloading and verifying a file of a zoo over loopback with curl and sha256sum, interleaved.

    python benchmarks/zoo_fetch.py
    python benchmarks/zoo_fetch.py --mib 500 --rounds 7 --folder /dev/shm

    fetch      Cache.fetch into an empty cache: received, hashed, written, synced
    load       Cache.fetch again, which reads and hashes the copy
    curl       curl of the same address into a file, neither verified nor synced
    sha256sum  of the served file

The server is `python -m http.server`. The ratio is the throughput of fetch over that of the slower of the two tools,
which together do what fetch does.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.stores.http import HttpStore

FILE = "name/model.safetensors"


class CountingStore(HttpStore):
    """Count the requests made and the bytes received."""

    requests = received = 0

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        self.requests += 1
        for block in super().read(path, start):
            self.received += len(block)
            yield block


def write_zoo(folder: Path, mib: int) -> str:
    """Write a zoo with one random file; return its sha256."""
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
    """Serve a folder in another process and yield its address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(folder: Path, address: str, sha256: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round after a warm-up round."""
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
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        copy.unlink(missing_ok=True)
        os.sync()  # no delayed writes in the time of the next call
        for name, call in calls.items():
            took = seconds(call)
            if name == "curl":
                os.sync()
            if number:
                times[name].append(took)
    return times


def traffic(folder: Path, address: str, sha256: str) -> dict[str, int]:
    """Return requests and bytes of an index and a file downloaded into an empty cache, and of a second download."""
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
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        sha256 = write_zoo(folder / "zoo", args.mib)
        with served(folder / "zoo") as address:
            times = measure(folder, address, sha256, args.rounds)
            counts = traffic(folder, address, sha256)
    medians = {name: statistics.median(values) for name, values in times.items()}
    slower = max(medians["curl"], medians["sha256sum"])
    print("| | s (median) | s (least to most) | MiB/s |\n|---|---|---|---|")
    for name, values in times.items():
        rate = args.mib / medians[name]
        print(f"| {name} | {medians[name]:.2f} | {min(values):.2f} to {max(values):.2f} | {rate:.0f} |")
    print(f"\nfetch over the slower of curl and sha256sum: {slower / medians['fetch']:.2f}")
    print(", ".join(f"{what.replace('_', ' ')}: {count:,}" for what, count in counts.items()))
    if args.output:
        args.output.write_text(json.dumps({"medians": medians, "times": times, **counts}, indent=2))


if __name__ == "__main__":
    main()
