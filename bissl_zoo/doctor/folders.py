"""The folders that runs read and write: data sets, zoo, cache and runs."""

import os
import shutil
import tempfile
from pathlib import Path

from bissl_zoo.doctor.finding import OK, PROBLEM, WARNING, Finding

#: tells the process that makes the checks of a folder for runs
RUNS_VARIABLE = "BISSL_ZOO_DOCTOR_RUNS"
DATASETS_VARIABLE = "BISSL_ZOO_DATASETS"
#: below this, a checkpoint of a large network may not fit
FREE_SPACE = 5 << 30
_GIB = 1 << 30
_SHOWN = 12


def check_run_folder() -> list[Finding]:
    """Whether a run can write where it would, lock its directory, and put a complete file in the place of another."""
    asked = Path(os.environ.get(RUNS_VARIABLE) or "runs").absolute()
    folder = next(one for one in (asked, *asked.parents) if one.exists())
    where = f"{asked}" if folder == asked else f"{asked}, to be made in {folder}"
    remedy = "Give another folder: train.output_dir=FOLDER/NAME."
    try:
        with tempfile.TemporaryDirectory(prefix=".bissl_zoo-", dir=folder) as probe:
            wrong = [_lock_problem(Path(probe)), _rename_problem(Path(probe))]
    except OSError as error:
        return [Finding(PROBLEM, "runs", f"{where}: cannot be written ({error.strerror})", remedy)]
    free = shutil.disk_usage(folder).free
    findings = [Finding(WARNING, "runs", f"{where}: {problem}", remedy) for problem in wrong if problem]
    if free < FREE_SPACE:
        told = f"{where}: only {free / _GIB:.1f} GiB free; checkpoints may not fit"
        findings.append(Finding(WARNING, "runs", told, "Make room; tools/runs.py prune removes old checkpoints."))
    return findings or [Finding(OK, "runs", f"{where}: writable, with locks, {free / _GIB:.0f} GiB free")]


def _lock_problem(folder: Path) -> str:
    """What is wrong with locks in a folder."""
    import portalocker

    first, second = os.open(folder, os.O_RDONLY), os.open(folder, os.O_RDONLY)
    exclusively = portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING
    try:
        portalocker.lock(first, exclusively)
        try:
            portalocker.lock(second, exclusively)
        except portalocker.LockException:
            return ""
        return "its file system does not keep locks: two runs could write to one directory"
    except portalocker.LockException as error:
        return f"its file system has no locks, so two runs could write to one directory ({error})"
    finally:
        os.close(first)
        os.close(second)


def _rename_problem(folder: Path) -> str:
    """What is wrong with replacing files and folders in one step."""
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    with open(new, "w") as stream:
        stream.write("new")
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.replace(new, old)
        (folder / "made").mkdir()
        os.rename(folder / "made", folder / "renamed")
    except OSError as error:
        return f"its file system does not replace files in one step ({error.strerror}); checkpoints need that"
    return (
        "" if old.read_text() == "new" else "a file that was replaced still has its old content; checkpoints need that"
    )


def check_datasets() -> list[Finding]:
    """What lies where data sets are looked for."""
    value = os.environ.get(DATASETS_VARIABLE)
    root = Path(value or "datasets").expanduser().absolute()
    where = f"{root} (${DATASETS_VARIABLE})" if value else f"{root} (${DATASETS_VARIABLE} is not set)"
    remedy = f"export {DATASETS_VARIABLE}=FOLDER, the one that holds your data sets."
    if not root.is_dir():
        return [Finding(WARNING, "data sets", f"there is no folder {where}", remedy)]
    names = sorted(one.name for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not names:
        return [Finding(WARNING, "data sets", f"{where} holds no folders", remedy)]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [Finding(OK, "data sets", f"{where}: {', '.join(names[:_SHOWN])}{more}")]


def check_known_datasets() -> list[Finding]:
    """Which of the data sets that are known by name are there; whether they are whole, tools/prepare_data.py tells."""
    from bissl_zoo.data.prepare.check import folder_of, known_sets

    there = [name for name in known_sets() if folder_of(name).is_dir()]
    missing = len(known_sets()) - len(there)
    return [Finding(OK, "known sets", f"{', '.join(there) or 'none'} ({missing} known by name are not there)")]


def check_zoo() -> list[Finding]:
    """Whether the zoos that names are looked up in can be read, and how much they hold."""
    from bissl_zoo.errors import ZooError
    from bissl_zoo.zoo import Zoo, default_zoo
    from bissl_zoo.zoo.cache import Cache, default_cache

    impatient = Cache(default_cache().root, sleep=lambda seconds: None)
    findings = []
    for store in default_zoo().stores:
        local = store.local_path("index.json")
        try:
            number = len(Zoo(store.location, cache=impatient).entries())
        except ZooError as error:
            remedy = (
                "Mend or wait for that zoo, or let $BISSL_ZOO name another; BISSL_ZOO_OFFLINE=1 takes what is cached."
            )
            findings.append(Finding(PROBLEM, "zoo", f"{store.location} cannot be read: {error}", remedy))
            continue
        if local is not None and not local.parent.is_dir():
            remedy = "Publishing makes it. If entries should be there, let $BISSL_ZOO name the right folder."
            findings.append(Finding(WARNING, "zoo", f"there is no folder {local.parent} yet", remedy))
        else:
            findings.append(Finding(OK, "zoo", f"{store.location}, {number} {'entry' if number == 1 else 'entries'}"))
    return findings


def check_cache() -> list[Finding]:
    """How much the cache of fetched entries holds, and how much room there is."""
    from bissl_zoo.zoo.cache import default_cache

    root = default_cache().root
    existing = next(one for one in (root, *root.parents) if one.exists())
    size = sum(file.lstat().st_size for file in root.rglob("*") if file.is_file()) if root.is_dir() else 0
    free = shutil.disk_usage(existing).free
    found = f"{root}, {size / _GIB:.2f} GiB, {free / _GIB:.0f} GiB free"
    if not os.access(existing, os.W_OK):
        return [Finding(WARNING, "cache", f"{found}: not writable", "Let $BISSL_ZOO_CACHE name another folder.")]
    if free < _GIB:
        return [
            Finding(WARNING, "cache", f"{found}: nearly full", "tools/zoo.py tells of it; or move $BISSL_ZOO_CACHE.")
        ]
    return [Finding(OK, "cache", found)]
