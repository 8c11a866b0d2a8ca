"""What a checkpoint of the BiSSL stage costs: both levels of a ResNet-50, their optimizers and random states.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --folder /scratch --rounds 7

    save     Checkpointer.save: serialised, hashed, forced to disk, renamed
    write    the same bytes written to a file and forced to disk
    verify   compared with the digests, as a resume does
    read     the state read back

The share is that of a run with a checkpoint every five minutes.
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

from bissl_zoo.engine.randomness import random_state
from bissl_zoo.registry import build_backbone, build_pretext
from bissl_zoo.runs.checkpoint import Checkpointer, verify
from bissl_zoo.runs.state_files import read_state

PERIOD = 300.0


def trained_state(architecture: str) -> dict:
    """The state of both levels after a step, SGD with momentum in both."""
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
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write_plainly(source: Path, target: Path) -> None:
    """A copy of a file that is on disk when this returns."""
    content = source.read_bytes()
    with open(target, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write; the system's folder for temporary files")
    args = parser.parse_args()
    state = trained_state(args.architecture)
    seconds: dict[str, list[float]] = {name: [] for name in ("save", "write", "verify", "read")}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpointer = Checkpointer(Path(folder), keep=1)
        for number in range(args.rounds):
            shutil.rmtree(folder, ignore_errors=True)
            seconds["save"].append(timed(lambda n=number: checkpointer.save("bissl", n, 9, args.architecture, state)))
            path = checkpointer.newest("bissl")
            tensors = path / "state.safetensors"
            seconds["write"].append(timed(lambda t=tensors: write_plainly(t, t.with_name("copy"))))
            seconds["verify"].append(timed(lambda p=path: verify(p)))
            seconds["read"].append(timed(lambda p=path: read_state(p)))
        size = tensors.stat().st_size
    print(f"{args.architecture}, both levels, {size / 2**20:.0f} MiB")
    rows = [
        [name, statistics.median(s), min(s), max(s), size / 2**20 / statistics.median(s)] for name, s in seconds.items()
    ]
    print(tabulate(rows, ["s", "median", "min", "max", "MiB/s"], floatfmt=".2f"))
    print(f"share of a run with one every {PERIOD:.0f} s: {statistics.median(seconds['save']) / PERIOD:.2%} (aim 2 %)")


if __name__ == "__main__":
    main()
