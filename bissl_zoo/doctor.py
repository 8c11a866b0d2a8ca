"""Check an installation and a machine: versions, GPUs, folders, data sets and zoo, with advice for each problem.

torch and similar libraries are imported in the checks that need them, so that the doctor works if they do not.
"""

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
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bissl_zoo.errors import ConfigError, ZooError, did_you_mean

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PYTHON = ">=3.10,<3.14"
#: the pins of Detectron2, so that both can be installed together
PINS = {"omegaconf": ">=2.3,<2.4", "iopath": ">=0.1.7,<0.1.10", "fvcore": ">=0.1.5,<0.1.6"}
#: purpose and distributions of each optional part, as in `pip install "bissl_zoo[NAME]"`
EXTRAS = {
    "s3": ("zoos and shards on s3://", ["s3fs"]),
    "hub": ("zoos and weights on the Hugging Face Hub, hf://", ["huggingface_hub"]),
    "gs": ("zoos and shards on gs://", ["gcsfs"]),
    "onnx": ("export to ONNX", ["onnx", "onnxscript"]),
    "wandb": ("metrics to Weights & Biases", ["wandb"]),
    "search": ("searches over hyper-parameters", ["optuna"]),
    "ray": ("searches and comparisons on many machines", ["ray"]),
    "test": ("the tests", ["pytest", "hypothesis", "ruff"]),
    "docs": ("building the documentation", ["mkdocs-material", "mkdocstrings", "latex2mathml"]),
}
#: seconds that all checks may take; one that waits for a device or a network may hang
TIMEOUT = 60.0
#: bytes below which there is a warning: free disk for checkpoints, and shared memory for loader workers
FREE_DISK, SHARED_MEMORY = 5 << 30, 1 << 30
OPEN_FILES = 1024
RUNS_VARIABLE, DATASETS_VARIABLE = "BISSL_ZOO_DOCTOR_RUNS", "BISSL_ZOO_DATASETS"
_GIB = 1 << 30
_SAME_BUILD = (
    "torch and torchvision must be builds of one kind; a CPU-only torch does not work with torchvision for CUDA.\n"
    "pip uninstall -y torch torchvision && pip install torch torchvision        # both from the package index, or\n"
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu     # both without CUDA"
)


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
    """Make the named checks, or all, in another process, so that one that crashes or hangs does not stop the others.

    Args:
        runs: the folder for runs; by default `runs` in the working directory.
    Raises:
        ConfigError: there is no check of that name.
    """
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"No check '{name}'.{did_you_mean(name, CHECKS)} Checks: {', '.join(CHECKS)}.")
    remaining, findings = list(names or CHECKS), []
    environment = {**os.environ, **({RUNS_VARIABLE: runs} if runs else {})}
    while remaining:
        done, ending = _examine_in_process(remaining, environment, timeout)
        findings += [finding for results in done for finding in results]
        remaining = remaining[len(done) :]
        if remaining:  # the first of these has ended the process
            findings.append(Finding(PROBLEM, remaining.pop(0), ending, "Reinstall the library in which it ended."))
    return findings


def _examine_in_process(names: list[str], environment: dict, timeout: float) -> tuple[list[list[Finding]], str]:
    """Return the findings of each check that was completed, and how the process ended."""
    code = "import sys; from bissl_zoo.doctor import print_checks; print_checks(sys.argv[1:])"
    command = [sys.executable, "-X", "faulthandler", "-c", code, *names]
    try:
        ran = subprocess.run(command, capture_output=True, timeout=timeout, text=True, env=environment)
        output, errors = ran.stdout, ran.stderr.strip().splitlines() or ["no message"]
        ending = f"the process ended with status {ran.returncode} ({errors[-1]})"
        if ran.returncode < 0:
            place = next((line.strip() for line in errors if line.startswith("  File ")), errors[-1])
            ending = f"the process was killed by {signal.Signals(-ran.returncode).name} ({place})"
    except subprocess.TimeoutExpired as error:
        output, ending = (error.stdout or b"").decode(), f"no answer within {timeout:g} seconds"
    complete = output.rpartition("\n")[0].splitlines()  # the last line may be incomplete
    return [[Finding(**finding) for finding in json.loads(line)] for line in complete], ending


def print_checks(names: Sequence[str]) -> None:
    """Make the checks in this process and print a line of JSON for each; what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for name in names:
            try:
                findings = list(CHECKS[name]())
            except Exception as error:  # of any type, raised by a library
                message = " ".join(str(error).split()) or "no message"
                findings = [Finding(PROBLEM, name, f"{type(error).__name__}: {message}")]
            print(json.dumps([asdict(finding) for finding in findings]), file=out, flush=True)


def check_python() -> Iterator[Finding]:
    """Check the version of Python."""
    version = platform.python_version()
    if SpecifierSet(PYTHON).contains(version, prereleases=True):
        yield Finding(OK, "python", f"{version}, {sys.executable}")
    else:
        yield Finding(PROBLEM, "python", f"{version}, outside {PYTHON}", "Create an environment with Python 3.10-3.13.")


def check_packages() -> Iterator[Finding]:
    """Compare the installed versions with the requirements of this package, torchvision and Detectron2."""
    version = _version("bissl_zoo")
    missing = Finding(WARNING, "bissl_zoo", "on the path, but not installed", "pip install -e . in its checkout.")
    yield Finding(OK, "bissl_zoo", version) if version else missing
    wanted = _requirements("bissl_zoo") | {name: SpecifierSet(pin) for name, pin in PINS.items()}
    libraries = dict.fromkeys(["torch", "torchvision", "timm", "numpy"], SpecifierSet())
    for name, specifier in (libraries | wanted).items():
        version, install = _version(name), f'pip install "{name}{_text(specifier)}"'
        if version is None:
            yield Finding(PROBLEM, name, "not installed", install)
        elif specifier.contains(version, prereleases=True):
            if name in (*libraries, *PINS):
                yield Finding(OK, name, version)
        elif name in PINS:
            yield Finding(WARNING, name, f"{version}, outside {PINS[name]}, the pin of Detectron2", install)
        else:
            yield Finding(PROBLEM, name, f"{version}, but bissl_zoo needs {_text(specifier)}", install)
    torch, specifier = _version("torch"), _requirements("torchvision").get("torch", SpecifierSet())
    if torch and not specifier.contains(torch, prereleases=True):
        message = f"torchvision needs torch{_text(specifier)}, but {torch} is installed"
        yield Finding(PROBLEM, "torch", message, f'pip install --upgrade torchvision "torch{_text(specifier)}"')


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


def _text(specifier: SpecifierSet) -> str:
    return ",".join(sorted(map(str, specifier), reverse=True))


def check_extras() -> Iterator[Finding]:
    """List the optional parts."""
    for name, (purpose, distributions) in EXTRAS.items():
        versions = {each: _version(each) for each in distributions}
        text = ", ".join(f"{each} {version}" for each, version in versions.items())
        text = text if all(versions.values()) else f'not installed (pip install "bissl_zoo[{name}]")'
        yield Finding(OK, f"extra {name}", f"{purpose}: {text}")


def check_cpu() -> Iterator[Finding]:
    """Count the processors that this process may use, and compare OpenMP's settings with them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(OK, "cpu", f"{usable} of {os.cpu_count()} processors usable")
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if threads.isdigit() and int(threads) > usable:
        message = f"OMP_NUM_THREADS={threads}, more than the {usable} usable processors"
        yield Finding(WARNING, "openmp", message, f"export OMP_NUM_THREADS={usable}")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        message = "OMP_WAIT_POLICY=ACTIVE: idle threads occupy the cores that loader workers need"
        yield Finding(WARNING, "openmp", message, "export OMP_WAIT_POLICY=PASSIVE")


def check_shared_memory(folder: str = "/dev/shm", minimum: int = SHARED_MEMORY) -> Iterator[Finding]:
    """Check that loader workers can pass batches on."""
    if not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    if free >= minimum:
        yield Finding(OK, "shared memory", f"{folder}: {free / _GIB:.2f} GiB free")
    else:
        advice = "Start the container with --shm-size=8g or --ipc=host, or set num_workers=0 of every loader."
        message = f"{folder}: {free / _GIB:.2f} GiB free; loader workers end with a bus error"
        yield Finding(WARNING, "shared memory", message, advice)


def check_open_files(minimum: int = OPEN_FILES) -> Iterator[Finding]:
    """Check the limit of open files, which loaders with many workers reach."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= minimum:
        yield Finding(OK, "open files", f"limit {soft}")
    else:
        limit = minimum if hard == resource.RLIM_INFINITY else min(hard, 4 * minimum)
        yield Finding(WARNING, "open files", f"limit {soft}, too low for many loader workers", f"ulimit -n {limit}")


def check_run_folder() -> Iterator[Finding]:
    """Check that the folder for runs can be written and locked, and that files in it can be replaced in one step."""
    wanted = Path(os.environ.get(RUNS_VARIABLE) or "runs").absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    place = f"{wanted}" if folder == wanted else f"{wanted} (will be created in {folder})"
    advice = "Give another folder: train.output_dir=FOLDER/NAME."
    try:
        with tempfile.TemporaryDirectory(prefix=".bissl_zoo-", dir=folder) as probe:
            problems = [problem for problem in (_lock_problem(Path(probe)), _rename_problem(Path(probe))) if problem]
    except OSError as error:
        yield Finding(PROBLEM, "runs", f"{place}: cannot be written ({error.strerror})", advice)
        return
    for problem in problems:
        yield Finding(WARNING, "runs", f"{place}: {problem}", advice)
    free = shutil.disk_usage(folder).free
    if free < FREE_DISK:
        message = f"{place}: {free / _GIB:.1f} GiB free; checkpoints may not fit"
        yield Finding(WARNING, "runs", message, "Free space; bissl runs prune removes old checkpoints.")
    elif not problems:
        yield Finding(OK, "runs", f"{place}: writable, with locks, {free / _GIB:.0f} GiB free")


def _lock_problem(folder: Path) -> str:
    from bissl_zoo.errors import CheckpointError
    from bissl_zoo.runs.lock import run_lock

    try:
        with run_lock(folder):
            try:
                with run_lock(folder):
                    return "its file system ignores locks: two runs could write to one directory"
            except CheckpointError:
                return ""
    except ConfigError:
        return "its file system has no locks; runs need train.lock=False"


def _rename_problem(folder: Path) -> str:
    from bissl_zoo.files import write_atomically

    try:
        for content in ("old", "new"):
            write_atomically(folder / "file", content)
    except OSError as error:
        return f"its file system does not replace files in one step ({error.strerror}); checkpoints need that"
    return "" if (folder / "file").read_text() == "new" else "a replaced file still has its old content"


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
    """Check that torch imports and exchanges arrays with NumPy."""
    import numpy
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    yield Finding(OK, "torch", f"{torch.__version__}, {kind}")
    try:
        torch.from_numpy(numpy.ones(2)).numpy()
    except (RuntimeError, TypeError) as error:
        message = f"torch {torch.__version__} does not work with NumPy {numpy.__version__}: {error}"
        yield Finding(PROBLEM, "numpy", message, "pip install --upgrade torch numpy; their builds must match.")


def check_gpus() -> Iterator[Finding]:
    """Check that each GPU computes."""
    import torch
    from torch.utils import collect_env

    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if torch.cuda.is_available():
        yield from (_check_gpu(index, driver) for index in range(torch.cuda.device_count()))
    elif driver is None:
        yield Finding(OK, "gpu", "none; runs use the CPU")
    elif torch.version.cuda is None:
        advice = "Install torch and torchvision for CUDA: pip install torch torchvision."
        yield Finding(WARNING, "gpu", f"driver {driver}, but torch has no CUDA; runs use the CPU", advice)
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        advice = f"Upgrade the driver to one for CUDA {torch.version.cuda}, or check CUDA_VISIBLE_DEVICES ({visible})."
        yield Finding(WARNING, "gpu", f"driver {driver}, but CUDA does not start; runs use the CPU", advice)


def _check_gpu(index: int, driver: str | None) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    name = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB, driver {driver or 'unknown'}"
    try:
        correct = (torch.ones(1000, device=f"cuda:{index}") * 2).sum().item() == 2000
    except (RuntimeError, AssertionError) as error:
        advice = "Install a torch that was built for this GPU and driver: pip install --upgrade torch torchvision."
        reason = str(error).partition("\n")[0]
        return Finding(PROBLEM, f"gpu {index}", f"{name}: it does not compute ({reason})", advice)
    wrong = Finding(PROBLEM, f"gpu {index}", f"{name}: it computes wrong numbers", "Have this GPU repaired.")
    return Finding(OK, f"gpu {index}", name) if correct else wrong


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
        yield Finding(PROBLEM, "torchvision", f"its operators do not run: {reason}", _SAME_BUILD)
    else:
        yield Finding(OK, "torchvision", f"{torchvision.__version__}, its operators run")


def check_timm() -> Iterator[Finding]:
    """Check that timm imports."""
    import timm

    yield Finding(OK, "timm", f"{timm.__version__}, {len(timm.list_models()):,} architectures")


def check_detectron2() -> Iterator[Finding]:
    """Check that Detectron2, if installed, was compiled for this torch."""
    version = _version("detectron2")
    if version is None:
        yield Finding(OK, "detectron2", "not installed; only the task detectron2_faster_rcnn needs it")
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


def check_cache() -> Iterator[Finding]:
    """Check the cache of zoo entries."""
    from bissl_zoo.zoo.cache import default_cache

    root = default_cache().root
    existing = next(path for path in (root, *root.parents) if path.exists())
    size = sum(file.lstat().st_size for file in root.rglob("*") if file.is_file()) if root.is_dir() else 0
    free = shutil.disk_usage(existing).free
    message = f"{root}, {size / _GIB:.2f} GiB, {free / _GIB:.0f} GiB free"
    if not os.access(existing, os.W_OK):
        yield Finding(WARNING, "cache", f"{message}: not writable", "Set $BISSL_ZOO_CACHE to another folder.")
    elif free < _GIB:
        yield Finding(WARNING, "cache", f"{message}: nearly full", "Free space, or move $BISSL_ZOO_CACHE.")
    else:
        yield Finding(OK, "cache", message)


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": check_python,
    "packages": check_packages,
    "extras": check_extras,
    "cpu": check_cpu,
    "memory": check_shared_memory,
    "files": check_open_files,
    "runs": check_run_folder,
    "datasets": check_datasets,
    "torch": check_torch,
    "gpu": check_gpus,
    "torchvision": check_torchvision,
    "timm": check_timm,
    "detectron2": check_detectron2,
    "zoo": check_zoo,
    "cache": check_cache,
}
