"""Whether the large libraries import and do something; these checks may take seconds, or the process with them."""

import importlib
import os
from importlib import metadata
from pathlib import Path

from bissl_zoo.doctor.finding import OK, PROBLEM, WARNING, Finding
from bissl_zoo.doctor.machine import usable_cpus

_SAME_BUILD = (
    "torch and torchvision must be builds of one kind: a CPU-only torch does not go with the index's torchvision.\n"
    "pip uninstall -y torch torchvision && pip install torch torchvision        # both from the package index, or\n"
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu     # both without CUDA"
)
_NUMPY = "pip install --upgrade torch numpy; a torch that was built for another NumPy cannot exchange arrays with it."
_DRIVER = "/proc/driver/nvidia/version"
_GIB = 1 << 30


def check_torch() -> list[Finding]:
    """Whether torch imports, and shares memory with NumPy."""
    import numpy
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only" if not torch.version.hip else "ROCm"
    findings = [Finding(OK, "torch", f"{torch.__version__}, {kind}")]
    try:
        same = torch.from_numpy(numpy.ones(2)).numpy().sum() == 2
    except (RuntimeError, TypeError) as error:
        found = f"torch {torch.__version__} does not work with NumPy {numpy.__version__}: {error}"
        return [*findings, Finding(PROBLEM, "numpy", found, _NUMPY)]
    return findings if same else [*findings, Finding(PROBLEM, "numpy", "torch reads arrays wrongly", _NUMPY)]


def check_threads() -> list[Finding]:
    """Whether torch starts about as many threads as there are processors."""
    import torch

    threads, usable = torch.get_num_threads(), usable_cpus()
    if threads <= max(1, usable):
        return [Finding(OK, "threads", f"{threads} of torch")]
    found = f"{threads} of torch on {usable:g} processors, where they wait for each other"
    return [Finding(WARNING, "threads", found, f"export OMP_NUM_THREADS={max(1, int(usable))}")]


def check_gpus() -> list[Finding]:
    """The GPUs, and whether each of them computes."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding(OK, "gpu", "none; runs take the CPU")]
        why = "this torch has no CUDA" if torch.version.cuda is None else "CUDA does not start"
        remedy = (
            "Install the index's torch and torchvision, as in pip install torch torchvision."
            if torch.version.cuda is None
            else f"Upgrade the driver to one for CUDA {torch.version.cuda}, or look at CUDA_VISIBLE_DEVICES "
            f"(it is {os.environ.get('CUDA_VISIBLE_DEVICES')!r})."
        )
        return [Finding(WARNING, "gpu", f"driver {driver} is here, but {why}; runs take the CPU", remedy)]
    return [_gpu(index, driver) for index in range(torch.cuda.device_count())]


def _gpu(index: int, driver: str | None) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(index)
    found = f"{facts.name}, {facts.total_memory / _GIB:.0f} GiB, driver {driver or 'unknown'}"
    try:
        sums = bool((torch.ones(1000, device=f"cuda:{index}") * 2).sum().item() == 2000)
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        remedy = "Take a torch that was built for this GPU and driver: pip install --upgrade torch torchvision."
        return Finding(PROBLEM, f"gpu {index}", f"{found}: it does not compute ({said})", remedy)
    if not sums:
        return Finding(PROBLEM, f"gpu {index}", f"{found}: it computes wrong numbers", "Have this GPU looked at.")
    return Finding(OK, f"gpu {index}", found)


def _driver() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    try:
        words = Path(_DRIVER).read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def check_torchvision() -> list[Finding]:
    """Whether torchvision imports and its own operators are there."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        return [Finding(PROBLEM, "torchvision", f"it does not import: {error}", _SAME_BUILD)]
    import torch

    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]])
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        try:
            kept = torchvision.ops.nms(boxes.to(device), torch.ones(2, device=device), 0.5)
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            return [Finding(PROBLEM, "torchvision", f"its operators do not run on {device}: {said}", _SAME_BUILD)]
        if len(kept) != 1:
            return [Finding(PROBLEM, "torchvision", f"non-maximum suppression is wrong on {device}", _SAME_BUILD)]
    return [Finding(OK, "torchvision", f"{torchvision.__version__}, its operators run")]


def check_timm() -> list[Finding]:
    """Whether timm imports."""
    import timm

    return [Finding(OK, "timm", f"{timm.__version__}, {len(timm.list_models()):,} architectures")]


def check_detectron2() -> list[Finding]:
    """Whether Detectron2, where it is installed, was compiled for this torch."""
    try:
        version = metadata.version("detectron2")
    except metadata.PackageNotFoundError:
        return [Finding(OK, "detectron2", "not installed; only the task detectron2_faster_rcnn needs it")]
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:
        remedy = (
            "Compile it again for the installed torch:\n"
            "pip install --no-build-isolation --force-reinstall --no-deps "
            "git+https://github.com/facebookresearch/detectron2"
        )
        return [Finding(PROBLEM, "detectron2", f"{version} does not import: {error}", remedy)]
    return [Finding(OK, "detectron2", f"{version}, its operators load")]
