"""Check an installation and a machine: versions, GPUs, folders, data sets and zoo, with advice for each problem.

Versions of everything else are in the output of `python -m torch.utils.collect_env`. torch and similar libraries are
imported in the checks that need them, so that the doctor works if they do not.
"""

import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.pool import ThreadPool
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bissl_zoo.errors import CheckpointError, ConfigError, ZooError, did_you_mean

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PYTHON = ">=3.10,<3.14"
#: the pins of Detectron2, so that both can be installed together
PINS = {"omegaconf": ">=2.3,<2.4", "iopath": ">=0.1.9,<0.1.10", "fvcore": ">=0.1.5.post20221221,<0.1.6"}
#: seconds that a check may take; one that waits for a device or a network may hang
TIMEOUT = 60.0
#: bytes below which there is a warning: free disk for checkpoints, and shared memory for loader workers
FREE_DISK, SHARED_MEMORY = 5 << 30, 1 << 30
OPEN_FILES = 1024
RUNS_VARIABLE, DATASETS_VARIABLE = "BISSL_ZOO_DOCTOR_RUNS", "BISSL_ZOO_DATASETS"
_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        status: `ok`, `warning` (runs work, but not all or not well), or `problem` (fix it first).
        advice: what to do; empty if nothing.
    """

    status: str
    subject: str
    message: str
    advice: str = ""


def worst(findings: Sequence[Finding]) -> str:
    """Return the most serious status."""
    return max((finding.status for finding in findings), key=(OK, WARNING, PROBLEM).index, default=OK)


def page(findings: Sequence[Finding]) -> str:
    """Return the findings as text: one line each with its advice below, and the number of problems and warnings."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<9}{finding.subject:<{width}}  {finding.message}")
        lines += [f"{'':<9}{'':<{width}}  -> {line}" for line in finding.advice.splitlines()]
    counts = Counter(finding.status for finding in findings)
    totals = [f"{counts[s]} {s}{'s' if counts[s] > 1 else ''}" for s in (PROBLEM, WARNING) if counts[s]]
    return "\n".join([*lines, "", ", ".join(totals) or "all is well"])


def examine(names: Sequence[str] = (), runs: str | None = None, timeout: float = TIMEOUT) -> list[Finding]:
    """Make the named checks, or all, each in its own process, so that one may crash or hang.

    Args:
        runs: the folder for runs; by default `runs` in the working directory.
    Raises:
        ConfigError: there is no check of that name.
    """
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"No check '{name}'.{did_you_mean(name, CHECKS)} Checks: {', '.join(CHECKS)}.")
    environment = {**os.environ, **({RUNS_VARIABLE: runs} if runs else {})}

    def findings_of(name: str) -> list[Finding]:
        command = [sys.executable, "-c", f"from bissl_zoo.doctor import print_check; print_check({name!r})"]
        try:
            ran = subprocess.run(command, capture_output=True, timeout=timeout, text=True, env=environment)
        except subprocess.TimeoutExpired:
            problem = f"no answer within {timeout:g} seconds"
        else:
            status, lines = ran.returncode, ran.stderr.strip().splitlines() or ["no message"]
            if status == 0:  # a library may have printed before
                return [Finding(**finding) for finding in json.loads(ran.stdout.splitlines()[-1])]
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            problem = f"the process {how} ({lines[-1]})"
        return [Finding(PROBLEM, name, problem, "Reinstall the library of that name.")]

    with ThreadPool(os.cpu_count()) as pool:
        return [finding for findings in pool.map(findings_of, names or CHECKS) for finding in findings]


def print_check(name: str) -> None:
    """Make a check in this process and print its findings as a line of JSON."""
    findings: list[Finding] = []
    try:
        findings.extend(CHECKS[name]())
    except Exception as error:  # of any type, raised by a library
        message = " ".join(str(error).split()) or "no message"
        findings.append(Finding(PROBLEM, name, f"{type(error).__name__}: {message}"))
    print("\n" + json.dumps([asdict(finding) for finding in findings]))


def check_packages() -> Iterator[Finding]:
    """Compare the versions of Python and of the libraries with the requirements of this package and of Detectron2."""
    python = platform.python_version()
    if SpecifierSet(PYTHON).contains(python, prereleases=True):
        yield Finding(OK, "python", f"{python}, {sys.executable}")
    else:
        yield Finding(PROBLEM, "python", f"{python}, outside {PYTHON}", "Create an environment with Python 3.10-3.13.")
    wanted = dict.fromkeys(["torch", "torchvision", "timm", "numpy"], SpecifierSet()) | _requirements("bissl_zoo")
    for name, specifier in (wanted | {name: SpecifierSet(pin) for name, pin in PINS.items()}).items():
        version, text = _version(name), ",".join(sorted(map(str, specifier), reverse=True))
        if version is None:
            yield Finding(PROBLEM, name, "not installed", f'pip install "{name}{text}"')
        elif not specifier.contains(version, prereleases=True):
            status, why = (WARNING, ", the pin of Detectron2") if name in PINS else (PROBLEM, "")
            yield Finding(status, name, f"{version}, outside {text}{why}", f'pip install "{name}{text}"')
    torch, specifier = _version("torch"), _requirements("torchvision").get("torch", SpecifierSet())
    if torch and not specifier.contains(torch, prereleases=True):
        message = f"torchvision needs torch{specifier}, but {torch} is installed"
        yield Finding(PROBLEM, "torch", message, f'pip install --upgrade torchvision "torch{specifier}"')


def _requirements(package: str) -> dict[str, SpecifierSet]:
    """Return what an installed package requires, without extras."""
    try:
        requirements = [Requirement(line) for line in metadata.requires(package) or []]
    except metadata.PackageNotFoundError:
        return {}
    return {r.name: r.specifier for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_machine() -> Iterator[Finding]:
    """Check the limits that loaders reach: OpenMP's threads, shared memory, and open files."""
    import resource

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(OK, "cpu", f"{usable} of {os.cpu_count()} processors usable")
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if threads.isdigit() and int(threads) > usable:
        message = f"OMP_NUM_THREADS={threads}, more than the {usable} usable processors"
        yield Finding(WARNING, "openmp", message, f"export OMP_NUM_THREADS={usable}")
    if os.path.isdir("/dev/shm") and (free := shutil.disk_usage("/dev/shm").free) < SHARED_MEMORY:
        advice = "Start the container with --shm-size=8g or --ipc=host, or set num_workers=0 of every loader."
        message = f"/dev/shm: {free / _GIB:.2f} GiB free; loader workers end with a bus error"
        yield Finding(WARNING, "shared memory", message, advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < OPEN_FILES:
        limit = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 4 * OPEN_FILES)
        yield Finding(WARNING, "open files", f"limit {soft}, too low for many loader workers", f"ulimit -n {limit}")


def check_run_folder() -> Iterator[Finding]:
    """Check that the folder for runs can be written and locked and has room."""
    from bissl_zoo.runs.lock import run_lock

    wanted = Path(os.environ.get(RUNS_VARIABLE) or "runs").absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    place = f"{wanted}" if folder == wanted else f"{wanted} (will be created in {folder})"
    advice = "Give another folder: train.output_dir=FOLDER/NAME."
    problem = ""
    try:
        with tempfile.TemporaryDirectory(prefix=".bissl_zoo-", dir=folder) as probe, run_lock(Path(probe)):
            with contextlib.suppress(CheckpointError), run_lock(Path(probe)):  # a second lock must be refused
                problem = "its file system ignores locks: two runs could write to one directory"
    except OSError as error:
        yield Finding(PROBLEM, "runs", f"{place}: cannot be written ({error.strerror})", advice)
        return
    except ConfigError:
        problem = "its file system has no locks; runs need train.lock=False"
    free = shutil.disk_usage(folder).free
    if problem:
        yield Finding(WARNING, "runs", f"{place}: {problem}", advice)
    elif free < FREE_DISK:
        message = f"{place}: {free / _GIB:.1f} GiB free; checkpoints may not fit"
        yield Finding(WARNING, "runs", message, "Free space, for example by removing old checkpoints of runs.")
    else:
        yield Finding(OK, "runs", f"{place}: writable, with locks, {free / _GIB:.0f} GiB free")


def check_datasets() -> Iterator[Finding]:
    """List the data sets in $BISSL_ZOO_DATASETS."""
    value = os.environ.get(DATASETS_VARIABLE)
    root = Path(value or "datasets").expanduser().absolute()
    place = f"{root} (${DATASETS_VARIABLE}{'' if value else ' is not set'})"
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if names:
        yield Finding(OK, "data sets", f"{place}: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}")
    else:
        message = f"{place} {'contains no folders' if root.is_dir() else 'does not exist'}"
        yield Finding(WARNING, "data sets", message, f"export {DATASETS_VARIABLE}=FOLDER, the one with your data sets.")


def check_torch() -> Iterator[Finding]:
    """Check that torch imports, exchanges arrays with NumPy, and computes on each GPU."""
    import numpy
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    yield Finding(OK, "torch", f"{torch.__version__}, {kind}")
    try:
        torch.from_numpy(numpy.ones(2)).numpy()
    except (RuntimeError, TypeError) as error:
        message = f"torch {torch.__version__} does not work with NumPy {numpy.__version__}: {error}"
        yield Finding(PROBLEM, "numpy", message, "pip install --upgrade torch numpy; their builds must match.")
    from torch.utils import collect_env

    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if torch.cuda.is_available():
        yield from (_check_gpu(index, driver) for index in range(torch.cuda.device_count()))
    elif driver is not None:
        advice = f"Install a torch for CUDA and a driver that fits it, or check CUDA_VISIBLE_DEVICES; torch is {kind}."
        yield Finding(WARNING, "gpu", f"driver {driver}, but CUDA does not start; runs use the CPU", advice)


def _check_gpu(index: int, driver: str | None) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    name = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB, driver {driver or 'unknown'}"
    try:
        result = (torch.ones(1000, device=f"cuda:{index}") * 2).sum().item()
        problem = "" if result == 2000 else "it computes wrong numbers"
    except (RuntimeError, AssertionError) as error:
        problem = f"it does not compute ({str(error).partition(chr(10))[0]})"
    if problem:
        advice = "Install a torch that was built for this GPU and driver: pip install --upgrade torch torchvision."
        return Finding(PROBLEM, f"gpu {index}", f"{name}: {problem}", advice)
    return Finding(OK, f"gpu {index}", name)


def check_torchvision() -> Iterator[Finding]:
    """Check that torchvision's own operators run."""
    import torch

    try:
        import torchvision

        boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]])
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            torchvision.ops.nms(boxes.to(device), torch.ones(2, device=device), 0.5)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        advice = (
            "torch and torchvision must both be builds with CUDA or both without.\n"
            "pip uninstall -y torch torchvision && pip install torch torchvision        # both from the package index\n"
            "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu     # both without CUDA"
        )
        yield Finding(PROBLEM, "torchvision", f"its operators do not run: {reason}", advice)
    else:
        yield Finding(OK, "torchvision", f"{torchvision.__version__}, its operators run")


def check_detectron2() -> Iterator[Finding]:
    """Check that Detectron2, if installed, was compiled for this torch."""
    version = _version("detectron2")
    if version is None:
        return
    try:
        importlib.import_module("detectron2._C")
        yield Finding(OK, "detectron2", f"{version}, its operators load")
    except ImportError as error:
        advice = (
            "Compile it again for the installed torch:\npip install --no-build-isolation --force-reinstall --no-deps "
            "git+https://github.com/facebookresearch/detectron2"
        )
        yield Finding(PROBLEM, "detectron2", f"{version} does not import: {error}", advice)


def check_zoo() -> Iterator[Finding]:
    """Check that the zoos in which names are looked up can be read."""
    from bissl_zoo.zoo import Zoo, default_zoo

    for store in default_zoo().stores:
        try:
            count = len(Zoo(store.location).entries())
            yield Finding(OK, "zoo", f"{store.location}, {count} {'entry' if count == 1 else 'entries'}")
        except ZooError as error:
            advice = "Repair that zoo, or set $BISSL_ZOO to another; BISSL_ZOO_OFFLINE=1 uses cached entries only."
            yield Finding(PROBLEM, "zoo", f"{store.location} cannot be read: {error}", advice)


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "packages": check_packages,
    "machine": check_machine,
    "runs": check_run_folder,
    "datasets": check_datasets,
    "torch": check_torch,
    "torchvision": check_torchvision,
    "detectron2": check_detectron2,
    "zoo": check_zoo,
}
