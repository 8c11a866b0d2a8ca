"""Measure the cost of a checkpoint of the BiSSL stage: both levels of a ResNet-50, optimizers and random states.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --folder /scratch --rounds 7

    save     Checkpointer.save: serialise, hash, flush to disk, rename
    write    write the same bytes to a file and flush it to disk
    verify   compare the files with their digests, as a resume does
    read     read the state back

The printed share of the run time assumes a checkpoint every five minutes.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

from bissl_zoo.engine.resume import random_state
from bissl_zoo.registry import build_backbone, build_pretext
from bissl_zoo.runs.checkpoint import STATE_FILE, Checkpointer, read_state, verify

PERIOD = 300.0


def trained_state(architecture: str) -> dict:
    """Return the state of both levels after one step of SGD with momentum."""
    levels = {}
    for name in ("lower", "upper"):
        trunk, tail = build_backbone(name=architecture).split("c4")
        head = build_pretext(name="simclr", backbone=trunk, tail=tail)
        parameters = [*trunk.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parts = {"backbone": trunk, "head": head, "optimizer": optimizer}
        levels[name] = {**{part: module.state_dict() for part, module in parts.items()}, "step": 1}
    return {"step": 1, "levels": levels, "random": [random_state(torch.device("cpu"))]}


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write_file(source: Path, target: Path) -> None:
    """Copy a file and flush the copy to disk."""
    content = source.read_bytes()
    with open(target, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    state = trained_state(args.architecture)
    seconds: dict[str, list[float]] = {name: [] for name in ("save", "write", "verify", "read")}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpointer = Checkpointer(Path(folder), keep=1)
        for number in range(args.rounds):
            shutil.rmtree(folder, ignore_errors=True)
            seconds["save"].append(timed(lambda n=number: checkpointer.save("bissl", n, 9, args.architecture, state)))
            path = checkpointer.newest("bissl")
            tensors = path / STATE_FILE
            seconds["write"].append(timed(lambda t=tensors: write_file(t, t.with_name("copy"))))
            seconds["verify"].append(timed(lambda p=path: verify(p)))
            seconds["read"].append(timed(lambda p=path: read_state(p)))
        size = tensors.stat().st_size
    print(f"{args.architecture}, both levels, {size / 2**20:.0f} MiB")
    rows = [
        [name, statistics.median(s), min(s), max(s), size / 2**20 / statistics.median(s)] for name, s in seconds.items()
    ]
    print(tabulate(rows, ["s", "median", "min", "max", "MiB/s"], floatfmt=".2f"))
    share = statistics.median(seconds["save"]) / PERIOD
    print(f"share of the run time with a checkpoint every {PERIOD:.0f} s: {share:.2%} (target 2 %)")


if __name__ == "__main__":
    main()
