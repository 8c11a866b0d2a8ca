"""The machine: processors, threads, shared memory and open files."""

import os
import shutil
from pathlib import Path

from bissl_zoo.doctor.finding import OK, WARNING, Finding

#: below this, loaders with workers fail on batches of the papers' sizes
SHARED_MEMORY = 1 << 30
#: below this, loaders with many workers run out of files
OPEN_FILES = 1024
_GIB = 1 << 30


def check_cpu() -> list[Finding]:
    """How many processors this process may use, and whether the settings of OpenMP fit them."""
    usable, installed = usable_cpus(), os.cpu_count() or 1
    found = f"{usable:g} of {installed} processors" if usable < installed else f"{installed} processors"
    findings = [Finding(OK, "cpu", found)]
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > usable:
        told = f"OMP_NUM_THREADS={asked}, more than the {usable:g} processors there are for this process"
        findings.append(Finding(WARNING, "openmp", told, f"export OMP_NUM_THREADS={max(1, int(usable))}"))
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        told = "OMP_WAIT_POLICY=ACTIVE: threads spin where they wait, on the cores that loader workers want"
        findings.append(Finding(WARNING, "openmp", told, "export OMP_WAIT_POLICY=PASSIVE"))
    return findings


def usable_cpus() -> float:
    """Processors that the scheduler and the container leave to this process."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return min(allowed, int(quota[0]) / int(quota[1]))
    return allowed


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def check_shared_memory(folder: str = "/dev/shm", least: int = SHARED_MEMORY) -> list[Finding]:
    """Whether workers can hand their batches over."""
    if not os.path.isdir(folder):
        return [Finding(OK, "shared memory", f"this system has no {folder}")]
    size, _, free = shutil.disk_usage(folder)
    found = f"{folder} has {size / _GIB:.2f} GiB, {free / _GIB:.2f} free"
    if free >= least:
        return [Finding(OK, "shared memory", found)]
    remedy = "Start the container with --shm-size=8g or --ipc=host, or set num_workers=0 of every loader."
    return [Finding(WARNING, "shared memory", f"{found}: loader workers end with a bus error", remedy)]


def check_open_files(least: int = OPEN_FILES) -> list[Finding]:
    """Whether workers can have their batches and files open."""
    import resource  # not on every system, which is this check's affair alone

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    found = "no limit" if unlimited else f"{soft} at most"
    if unlimited or soft >= least:
        return [Finding(OK, "open files", found)]
    remedy = f"ulimit -n {least if hard == resource.RLIM_INFINITY else min(hard, 4 * least)}"
    return [Finding(WARNING, "open files", f"{found}: loaders with many workers need more", remedy)]
