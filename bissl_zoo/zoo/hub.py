"""Find entries in one or more zoos, and read their files, which are verified against the index on every load."""

import fnmatch
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import load_config, with_defaults
from bissl_zoo.errors import ZooError, did_you_mean, shorten
from bissl_zoo.files import is_sha256
from bissl_zoo.limits import limit, stated
from bissl_zoo.registry import BACKBONES
from bissl_zoo.zoo.cache import Cache, default_cache
from bissl_zoo.zoo.index import (
    CURATED_FILE,
    ENTRY_FORMAT,
    INDEX_FILE,
    check_format,
    check_name,
    parse_index,
    parse_json,
    split_version,
)
from bissl_zoo.zoo.policy import restrict
from bissl_zoo.zoo.stores import Store, open_store

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "train_config.yaml"


@dataclass(frozen=True)
class Entry:
    """A published entry.

    Attributes:
        name: as listed in the index.
        record: its index record: architecture, methods, metrics, and size and sha256 of every file.
        store: the store with its files.
    """

    name: str
    record: Mapping[str, Any]
    store: Store
    cache: Cache

    @property
    def location(self) -> str:
        """Path or address of its folder, for messages."""
        return f"{self.store.location.rstrip('/')}/{self.name}"

    def file(self, file: str) -> Path:
        """Return one of its files on this machine, verified by size and sha256; download it if necessary."""
        files = self.record["files"]
        if file not in files:
            raise ZooError(f"Zoo entry '{self.name}' has no file '{file}'. It has: {', '.join(sorted(files))}.")
        return self.cache.fetch(self.store, f"{self.name}/{file}", files[file]["sha256"], files[file]["size"])

    def text_file(self, file: str) -> Path:
        """Return one of its files that is read into memory; raise `ZooError` above `limits.TEXT_BYTES`."""
        size = self.record["files"].get(file, {}).get("size", 0)
        if size > limit("TEXT_BYTES"):
            raise ZooError(f"{file} of zoo entry '{self.name}' has {size:,} bytes; {stated('TEXT_BYTES')}.")
        return self.file(file)

    def read_json(self, file: str) -> dict[str, Any]:
        """Return the content of one of its JSON files, for example timm's `config.json`."""
        path = self.text_file(file)
        content = parse_json(path.read_bytes(), str(path))
        if file == "entry.json":
            check_format(str(path), content, ENTRY_FORMAT)
        return content

    def metadata(self) -> dict[str, Any]:
        """Return its `entry.json`: architecture, metrics with seeds, data sets, lineage, licence, versions, files."""
        return self.read_json("entry.json")

    def parents(self) -> list[dict[str, str]]:
        """Return name, sha256 and licence of the weights it started from, of those they started from, and so on."""
        lineage = self.metadata().get("lineage")
        # entries of version 0.1 have another key
        parents = lineage.get("parents", lineage.get("ancestors", [])) if isinstance(lineage, dict) else None
        if not isinstance(parents, list) or not all(
            isinstance(p, dict) and is_sha256(p.get("sha256")) for p in parents
        ):
            raise ZooError(f"The entry.json of zoo entry '{self.name}' has an invalid lineage.")
        return [
            {"name": str(p.get("name", "unnamed")), "sha256": p["sha256"], "licence": str(p.get("licence", "unknown"))}
            for p in parents
        ]

    def weights(self, file: str = WEIGHTS_FILE) -> "dict[str, Tensor]":
        """Return a state dict on the CPU: the backbone, or a head such as `pretext_head.safetensors`."""
        import safetensors.torch

        path = self.file(file)
        try:
            state = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ZooError(f"{path} matches the index, but is not valid safetensors: {error}.") from error
        floats = {key: value.float() for key, value in state.items() if value.is_floating_point()}
        if bad := [key for key, value in floats.items() if not value.isfinite().all()]:
            raise ZooError(f"{path} matches the index, but contains NaN or Inf in {shorten(bad)}: do not use it.")
        return state

    def copy_to(self, folder: Path) -> Path:
        """Copy all files to `folder`/NAME, which plain timm loads (`local-dir:`), and return that folder."""
        target = folder / self.name
        if target.exists():
            raise ZooError(f"{target} exists. Remove it, or copy to another folder.")
        paths = {file: self.file(file) for file in self.record["files"]}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.name}-", dir=folder) as temporary:
            complete = Path(temporary) / self.name
            complete.mkdir()
            for file, path in paths.items():
                shutil.copyfile(path, complete / file)
            os.rename(complete, target)
        return target


class Zoo:
    """The entries of one or more locations; for a name that several have, the first location wins.

    Every read uses the current index. In a folder, `index.json` lists entries published there, and `curated.json`
    entries that came with the folder.

    Args:
        locations: folders and addresses, see `bissl_zoo.zoo.stores.open_store`.
        cache: for files of remote locations.
    Raises:
        ZooError: from every method, for an unknown or damaged entry and an invalid index.
    """

    def __init__(self, *locations: str | os.PathLike[str], cache: Cache | None = None) -> None:
        self.stores = [open_store(location) for location in locations]
        self.cache = cache or default_cache()

    def __str__(self) -> str:
        return ", ".join(store.location for store in self.stores)

    def entries(self) -> dict[str, Entry]:
        """Return all entries by name, sorted by name and version."""
        entries: dict[str, Entry] = {}
        for store in self.stores:
            taken = {split_version(name)[0] for name in entries}
            for name, record in self._records(store).items():
                if split_version(name)[0] not in taken:
                    entries[name] = Entry(name, record, store, self.cache)
        return {name: entries[name] for name in sorted(entries, key=split_version)}

    def versions(self, name: str) -> list[Entry]:
        """Return the entries that match a name, oldest first: one for `x@2`, all versions for `x`."""
        check_name(name)
        base, version = split_version(name)
        matches = [entry for known, entry in self.entries().items() if split_version(known)[0] == base]
        return [entry for entry in matches if split_version(entry.name)[1] == version] if "@" in name else matches

    def find(self, name: str) -> Entry:
        """Return one entry: version 2 for `x@2`, the newest for `x`."""
        if versions := self.versions(name):
            return versions[-1]
        names = list(self.entries())
        content = f"It has: {shorten(names)}." if names else "It has no entries."
        raise ZooError(f"Unknown zoo entry '{name}' in {self}.{did_you_mean(name, names)} {content}")

    def _records(self, store: Store) -> dict[str, Any]:
        records: dict[str, Any] = {}
        for file in (CURATED_FILE, INDEX_FILE) if store.local_path(INDEX_FILE) else (INDEX_FILE,):
            content = self.cache.read_index(store, file)
            records |= parse_index(content, f"{store.location.rstrip('/')}/{file}").records
        return records


ZooLike = Zoo | str | os.PathLike[str] | None  # a zoo, its location, or None for default_zoo()


def default_zoo() -> Zoo:
    """Return the zoo in $BISSL_ZOO (locations separated by commas), a checkout's `model_zoo/`, or the user's zoo."""
    locations = [location.strip() for location in os.environ.get("BISSL_ZOO", "").split(",") if location.strip()]
    if locations:
        return Zoo(*locations)
    checkout = Path(__file__).resolve().parents[2] / "model_zoo"
    if (checkout / CURATED_FILE).is_file():
        return Zoo(checkout)
    return Zoo(platformdirs.user_data_path("bissl_zoo", appauthor=False) / "model_zoo")


def as_zoo(zoo: ZooLike) -> Zoo:
    """Return the zoo of an argument: a Zoo, a location, or None for the default one."""
    if zoo is None:
        return default_zoo()
    return zoo if isinstance(zoo, Zoo) else Zoo(zoo)


def list_backbones(
    filter: str | Sequence[str] = "*",
    *,
    pretrained: bool = True,
    exclude_filters: str | Sequence[str] = (),
    pretext: str | None = None,
    task: str | None = None,
    architecture: str | None = None,
    metric: str | None = None,
    zoo: ZooLike = None,
) -> list[str]:
    """Return the names of matching entries, every version of each.

    Args:
        filter: shell pattern of the name, such as `"*simclr*voc*"`, or several of which one must match.
        pretrained: entries; False for the architectures that `create_backbone` builds with random weights.
        exclude_filters: one or more patterns of names to leave out.
        pretext, task, architecture: shell patterns of the methods and the architecture of an entry.
        metric: shell pattern of a metric that the entry reports, such as `"AP50*"`.
    """
    patterns = {"pretext": pretext, "task": task, "architecture": architecture}

    def matches(entry: Entry) -> bool:
        fields = all(fnmatch.fnmatch(entry.record.get(k) or "", p) for k, p in patterns.items() if p is not None)
        return fields and (metric is None or bool(fnmatch.filter(entry.record.get("metrics", {}), metric)))

    wanted, unwanted = ([text] if isinstance(text, str) else list(text) for text in (filter, exclude_filters))
    entries = as_zoo(zoo).entries() if pretrained else {}
    return [
        name
        for name in (entries or ([] if pretrained else BACKBONES.list()))
        if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in unwanted)
        and (not pretrained or matches(entries[name]))
    ]


def get_entry(name: str, zoo: ZooLike = None) -> dict[str, Any]:
    """Return the metadata of an entry: metrics with seeds, data sets, lineage, licence, versions."""
    return as_zoo(zoo).find(name).metadata()


def get_config(name: str, zoo: ZooLike = None) -> DictConfig:
    """Return the config of the run that an entry came from, with its locations at their defaults.

    Raises:
        ZooError: the config sets something that is not listed in `bissl_zoo.config.arguments`.
    """
    return restricted_config(name, zoo)[0]


def restricted_config(name: str, zoo: ZooLike = None) -> tuple[DictConfig, list[str]]:
    """Return the config of an entry as :func:`get_config` does, and the keys that are left to the user.

    Raises:
        ZooError: the config sets something that is not listed in `bissl_zoo.config.arguments`.
    """
    entry = as_zoo(zoo).find(name)
    with tempfile.TemporaryDirectory(prefix="bissl_zoo-") as folder:
        # cached files are named by digest, and the reader needs the suffix
        cfg = with_defaults(load_config(shutil.copyfile(entry.text_file(CONFIG_FILE), Path(folder) / CONFIG_FILE)))
    reference = OmegaConf.to_container(load_config("common/train.py"))
    taken, left = restrict(OmegaConf.to_container(cfg, resolve=False), reference, f"zoo entry '{entry.name}'")
    return OmegaConf.create(taken), left


def load_entry_weights(name: str, file: str = WEIGHTS_FILE, zoo: ZooLike = None) -> "dict[str, Tensor]":
    """Return a verified state dict of an entry: its backbone, or a head such as `pretext_head.safetensors`."""
    return as_zoo(zoo).find(name).weights(file)
