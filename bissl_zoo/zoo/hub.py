"""Zoo entries by name: found in one or more zoos, and checked against the index on every load."""

import fnmatch
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import safetensors.torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import Tensor

from bissl_zoo.config import load_config
from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.zoo.cache import Cache, default_cache
from bissl_zoo.zoo.index import (
    CURATED_FILE,
    ENTRY_FORMAT,
    INDEX_FILE,
    INDEX_LIMIT,
    check_format,
    parse_index,
    parse_json,
)
from bissl_zoo.zoo.names import check_name, is_sha256, shorten, split_version
from bissl_zoo.zoo.stores import Store, open_store

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "train_config.yaml"

#: bytes of a file of an entry that is read as a whole, far above what any has
_FILE_LIMIT = 4 << 20

#: what the configuration of an entry may call
_CALLS = re.compile(
    r"bissl_zoo\.(registry\.build_[a-z]+|data\.loaders\.build_[a-z_]+|data\.views\.[a-z_]+|optim\.LRMultiplier)"
    r"|(torch|timm)\.optim\.([a-z_]+\.)?[A-Z]\w*|fvcore\.common\.param_scheduler\.[A-Z]\w*",
    re.ASCII,
)
#: a reference to another value; omegaconf's `${function:arguments}` may make a call out of text
_REFERENCE = re.compile(r"\$\{[\w.]+\}")


@dataclass(frozen=True)
class Entry:
    """One published entry; what is read of it is compared with its record first.

    Attributes:
        name: as the index has it.
        record: of the index: architecture, methods, metrics, and size and sha256 of every file.
        store: where its files are.
    """

    name: str
    record: Mapping[str, Any]
    store: Store
    cache: Cache

    @property
    def location(self) -> str:
        """Where its folder is, as a person would write it."""
        return f"{self.store.location.rstrip('/')}/{self.name}"

    def file(self, file: str) -> Path:
        """One of its files on this machine, fetched where it is not, after its size and sha256 were compared."""
        files = self.record["files"]
        if file not in files:
            raise ZooError(f"Zoo entry '{self.name}' has no file '{file}'. It has: {', '.join(sorted(files))}.")
        return self.cache.fetch(self.store, f"{self.name}/{file}", files[file]["sha256"], files[file]["size"])

    def small_file(self, file: str) -> Path:
        """One of its files that is read as a whole; `ZooError` for one that would fill the memory."""
        size = self.record["files"][file]["size"] if file in self.record["files"] else 0
        if size > _FILE_LIMIT:
            raise ZooError(
                f"{file} of zoo entry '{self.name}' has {size:,} bytes, more than the {_FILE_LIMIT:,} that it may have."
            )
        return self.file(file)

    def read_json(self, file: str) -> dict[str, Any]:
        """One of its JSON files, for instance timm's `config.json`."""
        path = self.small_file(file)
        content = parse_json(path.read_bytes(), str(path))
        if file == "entry.json":
            check_format(str(path), content, ENTRY_FORMAT)
        return content

    def facts(self) -> dict[str, Any]:
        """Its `entry.json`: architecture, metrics with seeds, data sets, lineage, licence, versions, files."""
        return self.read_json("entry.json")

    def ancestors(self) -> list[dict[str, str]]:
        """Name and sha256 of the weights it started from, of those that these started from, and so on."""
        lineage = self.facts().get("lineage")
        found = lineage.get("ancestors", []) if isinstance(lineage, dict) else None
        if not isinstance(found, list) or not all(
            isinstance(one, dict) and is_sha256(one.get("sha256")) for one in found
        ):
            raise ZooError(f"The entry.json of zoo entry '{self.name}' has a lineage that no entry has.")
        return [{"name": str(one.get("name", "unnamed")), "sha256": one["sha256"]} for one in found]

    def weights(self, file: str = WEIGHTS_FILE) -> dict[str, Tensor]:
        """A state dict on the CPU: of its backbone, or of a head such as `pretext_head.safetensors`."""
        path = self.file(file)
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise ZooError(f"{path} is as the index has it, but cannot be read as safetensors: {error}.") from error

    def copy_to(self, folder: Path) -> Path:
        """Copy all files into `folder`/NAME, which plain timm loads (`local-dir:`); returns that folder."""
        target = folder / self.name
        if target.exists():
            raise ZooError(f"{target} exists already; remove it, or copy to another folder.")
        paths = [self.file(file) for file in self.record["files"]]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.name}-", dir=folder) as pending:
            complete = Path(pending) / self.name
            complete.mkdir()
            for file, path in zip(self.record["files"], paths, strict=True):
                shutil.copyfile(path, complete / file)
            os.rename(complete, target)
        return target


class Zoo:
    """The entries of one or more locations; where two have a name, the first one's entries are meant.

    Every read sees the index as it is at that moment, so a long-lived Zoo follows other publishers. Of a folder,
    `index.json` holds what was published into it, `curated.json` what it came with.

    Args:
        locations: folders and addresses, see `bissl_zoo.zoo.stores.open_store`.
        cache: of what was fetched from addresses.
    Raises:
        ZooError: from every method, for an entry that is unknown, missing or damaged and for an unusable index.
    """

    def __init__(self, *locations: str | os.PathLike[str], cache: Cache | None = None) -> None:
        self.stores = [open_store(location) for location in locations]
        self.cache = cache or default_cache()

    def __str__(self) -> str:
        return ", ".join(store.location for store in self.stores)

    def entries(self) -> dict[str, Entry]:
        """Every entry by name, versions in order."""
        found: dict[str, Entry] = {}
        for store in self.stores:
            taken = {split_version(name)[0] for name in found}
            for name, record in self._records(store).items():
                if split_version(name)[0] not in taken:
                    found[name] = Entry(name, record, store, self.cache)
        return {name: found[name] for name in sorted(found, key=split_version)}

    def versions(self, name: str) -> list[Entry]:
        """The entries that `name` may stand for, oldest first: `x@2` only that one, `x` all of its versions."""
        check_name(name)
        base, version = split_version(name)
        same_base = [entry for known, entry in self.entries().items() if split_version(known)[0] == base]
        return [entry for entry in same_base if split_version(entry.name)[1] == version] if "@" in name else same_base

    def find(self, name: str) -> Entry:
        """The one entry that `name` stands for: `x@2` is that version, `x@1` the first, plain `x` the newest."""
        versions = self.versions(name)
        if not versions:
            names = list(self.entries())
            holding = f"It holds: {shorten(names)}." if names else "It holds no entries."
            raise ZooError(f"Unknown zoo entry '{name}' in {self}.{did_you_mean(name, names)} {holding}")
        return versions[-1]

    def _records(self, store: Store) -> dict[str, Any]:
        files = (CURATED_FILE, INDEX_FILE) if store.local_path(INDEX_FILE) else (INDEX_FILE,)
        records: dict[str, Any] = {}
        for file in files:
            present = self.cache.read_index(store, file, INDEX_LIMIT)
            where = f"{store.location.rstrip('/')}/{file}"
            records |= parse_index(present.content if present else None, where).records
        return records


ZooLike = Zoo | str | os.PathLike[str] | None  # a zoo, its location, or None for default_zoo()


def default_zoo() -> Zoo:
    """The zoo used where none is named: $BISSL_ZOO, else a checkout's `model_zoo/`, else the user's data directory.

    $BISSL_ZOO holds one location, or several with commas between them.
    """
    locations = [location.strip() for location in os.environ.get("BISSL_ZOO", "").split(",") if location.strip()]
    if locations:
        return Zoo(*locations)
    checkout = Path(__file__).resolve().parents[2] / "model_zoo"
    if (checkout / CURATED_FILE).is_file():
        return Zoo(checkout)
    return Zoo(platformdirs.user_data_path("bissl_zoo", appauthor=False) / "model_zoo")


def as_zoo(zoo: ZooLike) -> Zoo:
    """The zoo meant by an argument: a Zoo itself, a location, or None for the default one."""
    if zoo is None:
        return default_zoo()
    return zoo if isinstance(zoo, Zoo) else Zoo(zoo)


def list_backbones(
    filter: str = "*",
    *,
    pretext: str | None = None,
    task: str | None = None,
    architecture: str | None = None,
    metric: str | None = None,
    zoo: ZooLike = None,
) -> list[str]:
    """Names of the entries that match, every version of each.

    Args:
        filter: shell pattern of the name, such as `"*simclr*voc*"`.
        pretext, task, architecture: what the entry was made with; shell patterns as well.
        metric: shell pattern of a metric that it reports, such as `"AP50*"`.
    """
    wanted = {"pretext": pretext, "task": task, "architecture": architecture}

    def matches(entry: Entry) -> bool:
        fields = all(fnmatch.fnmatch(entry.record.get(key) or "", p) for key, p in wanted.items() if p is not None)
        return fields and (metric is None or bool(fnmatch.filter(entry.record.get("metrics", {}), metric)))

    entries = as_zoo(zoo).entries()
    return [name for name in fnmatch.filter(entries, filter) if matches(entries[name])]


def get_entry(name: str, zoo: ZooLike = None) -> dict[str, Any]:
    """What an entry says of itself: metrics with seeds, data sets, lineage, licence, versions (see `Entry.facts`)."""
    return as_zoo(zoo).find(name).facts()


def get_config(name: str, zoo: ZooLike = None) -> DictConfig:
    """The resolved config of the run that an entry came from.

    Raises:
        ZooError: it calls something else than parts of a run, which a config does when it is instantiated.
    """
    entry = as_zoo(zoo).find(name)
    with tempfile.TemporaryDirectory(prefix="bissl_zoo-") as folder:
        # what was fetched is called by its digest, and a config's ending says what it is
        cfg = load_config(shutil.copyfile(entry.small_file(CONFIG_FILE), Path(folder) / CONFIG_FILE))
    _check_calls(OmegaConf.to_container(cfg), f"zoo entry '{entry.name}'")
    return cfg


def load_entry_weights(name: str, file: str = WEIGHTS_FILE, zoo: ZooLike = None) -> dict[str, Tensor]:
    """A verified state dict of an entry on the CPU: its backbone, or a head such as `pretext_head.safetensors`."""
    return as_zoo(zoo).find(name).weights(file)


def _check_calls(node: Any, where: str) -> None:
    """Raise `ZooError` where a config from a zoo would call anything but a part of a run."""
    if isinstance(node, dict):
        target = node.get("_target_", "")
        if target and not (isinstance(target, str) and _CALLS.fullmatch(target)):
            raise ZooError(
                f"The configuration of {where} calls {target!r:.100}, which is no part that bissl_zoo knows, so it is "
                "not handed out: a zoo is data, and that is code. `tools/zoo.py fetch` brings the file to look at."
            )
        node = list(node.values())
    if isinstance(node, str) and "${" in _REFERENCE.sub("", node):
        raise ZooError(
            f"The configuration of {where} computes a value ({node!r:.100}), which could be a call in disguise, so it "
            "is not handed out. `tools/zoo.py fetch` brings the file to look at."
        )
    if isinstance(node, list):
        for one in node:
            _check_calls(one, where)
