"""Zoo entries by name: listed from an index, checked against its digests on every load, built as backbones."""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import safetensors.torch
import timm
from safetensors import SafetensorError
from torch import Tensor

from bissl_zoo.backbones import Backbone
from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.registry import BACKBONES, build_backbone

INDEX_FORMAT = 1
ENTRY_FORMAT = 1
WEIGHTS_FILE = "model.safetensors"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(@[1-9][0-9]{0,5})?", re.ASCII)


class Zoo:
    """A folder of entries. `index.json` holds what was published into it, `curated.json` what it came with.

    Every read sees the index as it is on disk at that moment, so a long-lived Zoo follows other publishers.

    Raises:
        ZooError: from every method, for an entry that is unknown, missing or damaged and for an unusable index.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if "://" in os.fspath(root):
            raise ZooError(f"A zoo is a folder on this machine; '{root}' is an address. Pass a folder's path.")
        self.root = Path(root).expanduser()

    def records(self) -> dict[str, dict[str, Any]]:
        """Index record of every entry by name, versions in order; `index.json` wins over `curated.json`."""
        merged = {**read_index(self.root / "curated.json"), **read_index(self.root / "index.json")}
        return {name: merged[name] for name in sorted(merged, key=split_version)}

    def versions(self, name: str) -> list[str]:
        """The entries that `name` may stand for, oldest first: `x@2` only that one, `x` all of its versions."""
        check_name(name)
        base, version = split_version(name)
        same_base = [known for known in self.records() if split_version(known)[0] == base]
        return [known for known in same_base if split_version(known)[1] == version] if "@" in name else same_base

    def resolve(self, name: str) -> str:
        """The one entry that `name` stands for: `x@2` is that version, `x@1` the first, plain `x` the newest."""
        versions = self.versions(name)
        if not versions:
            names = list(self.records())
            holding = f"It holds: {shorten(names)}." if names else "It holds no entries."
            raise ZooError(f"Unknown zoo entry '{name}' in {self.root}.{did_you_mean(name, names)} {holding}")
        return versions[-1]

    def path(self, name: str) -> Path:
        """Folder of the entry that `name` stands for."""
        return self.root / self.resolve(name)

    def entry(self, name: str) -> dict[str, Any]:
        """The verified `entry.json`: architecture, metrics with seeds, data sets, lineage, licence, versions, files."""
        return self.read_json(name, "entry.json")

    def read_json(self, name: str, file: str) -> dict[str, Any]:
        """A verified JSON file of an entry, for instance timm's `config.json`."""
        path = self.file(name, file)
        content = _load_json(path)
        if file == "entry.json":
            _check_format(path, content, ENTRY_FORMAT)
        return content

    def file(self, name: str, file: str) -> Path:
        """Path of one file of an entry, after its size and sha256 were compared with the index."""
        name = self.resolve(name)
        files = self.records()[name]["files"]
        if file not in files:
            raise ZooError(f"Zoo entry '{name}' has no file '{file}'. It has: {', '.join(sorted(files))}.")
        path = self.root / name / file
        verify_file(path, files[file]["sha256"], files[file]["size"])
        return path


ZooLike = Zoo | str | os.PathLike[str] | None  # a zoo, its folder, or None for default_zoo()


def default_zoo() -> Zoo:
    """The zoo used where none is named: $BISSL_ZOO, else a checkout's `model_zoo/`, else the user's data directory."""
    location = os.environ.get("BISSL_ZOO")
    if location:
        return Zoo(location)
    checkout = Path(__file__).resolve().parents[2] / "model_zoo"
    if (checkout / "curated.json").is_file():
        return Zoo(checkout)
    return Zoo(platformdirs.user_data_path("bissl_zoo", appauthor=False) / "model_zoo")


def as_zoo(zoo: ZooLike) -> Zoo:
    """The zoo meant by an argument: a Zoo itself, a folder's path, or None for the default one."""
    if zoo is None:
        return default_zoo()
    return zoo if isinstance(zoo, Zoo) else Zoo(zoo)


def list_backbones(filter: str = "*", zoo: ZooLike = None) -> list[str]:
    """Names of the zoo's entries that match a shell pattern such as `"*simclr*"`, every version of each."""
    return fnmatch.filter(as_zoo(zoo).records(), filter)


def get_entry(name: str, zoo: ZooLike = None) -> dict[str, Any]:
    """What an entry says of itself: metrics with seeds, data sets, lineage, licence, versions (see `Zoo.entry`)."""
    return as_zoo(zoo).entry(name)


def create_backbone(
    name: str, pretrained: bool = True, out_features: Iterable[str] | None = None, zoo: ZooLike = None, **kwargs: Any
) -> Backbone:
    """A zoo entry's backbone in eval mode, as timm's `create_model` would give it.

    Args:
        name: an entry; without a version its newest one. With `pretrained=False` a timm architecture as well.
        pretrained: load the entry's weights, after their sha256 and size were compared with the index. Otherwise the
            same architecture with random weights.
        out_features: the stages to return, by name; None for what `build_backbone` returns by default.
        zoo: a Zoo or its folder; None for `default_zoo()`.
        kwargs: passed on to `build_backbone`; they override what the entry says about its construction.
    Raises:
        ZooError: for an unknown entry, a file that is not the published one, or weights that do not fit.
    """
    zoo = as_zoo(zoo)
    if out_features is not None:
        kwargs["out_features"] = tuple(out_features)
    if name in BACKBONES and not zoo.versions(name):
        if pretrained:
            raise ZooError(
                f"{zoo.root} holds no entry '{name}', so there are no weights to load. '{name}' is an architecture: "
                f"pretrained=False builds it with random weights. Entries: {shorten(list(zoo.records())) or 'none'}."
            )
        return build_backbone(name=name, **kwargs).eval()
    entry = zoo.resolve(name)
    name = pin(entry)  # what follows must not move to a version published meanwhile
    architecture = zoo.records()[entry]["architecture"]
    if architecture not in BACKBONES:
        raise ZooError(
            f"Zoo entry '{name}' needs the architecture '{architecture}', which timm {timm.__version__} does not have. "
            f"It was published with timm {zoo.entry(name)['versions']['timm']}: install that version or a newer one."
        )
    model_args = zoo.read_json(name, "config.json").get("model_args", {})
    backbone = build_backbone(name=architecture, **{**model_args, **kwargs})
    if pretrained:
        weights = load_entry_weights(name, zoo=zoo)
        difference = state_difference(backbone.state_dict(), weights)
        if difference:
            raise ZooError(f"The weights of zoo entry '{name}' do not fit {architecture}: {difference}.")
        backbone.load_state_dict(weights)
    return backbone.eval()


def load_entry_weights(name: str, file: str = WEIGHTS_FILE, zoo: ZooLike = None) -> dict[str, Tensor]:
    """A verified state dict of an entry on the CPU: its backbone, or a head such as `pretext_head.safetensors`."""
    path = as_zoo(zoo).file(name, file)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} is as the index has it, but cannot be read as safetensors: {error}.") from error


def state_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How two state dicts differ in names and shapes, with counts; an empty string where they agree."""
    shared = [key for key in expected if key in found]
    reshaped = [key for key in shared if found[key].shape != expected[key].shape]
    parts = {
        "missing": [key for key in expected if key not in found],
        "unexpected": sorted(key for key in found if key not in expected),
        "of another shape": [f"{k} {tuple(found[k].shape)} instead of {tuple(expected[k].shape)}" for k in reshaped],
    }
    told = [f"{len(names)} {what}: {shorten(names)}" for what, names in parts.items() if names]
    return f"{len(shared) - len(reshaped)} of {len(expected)} tensors match; {'; '.join(told)}" if told else ""


def verify_file(path: Path, sha256: str, size: int) -> None:
    """Compare a file with its published size (bytes) and sha256 (64 hex digits).

    Raises:
        ZooError: naming the file, what was expected, what was found and what to do.
    """
    advice = "Copy the entry again from where it came, or publish it again; do not use this copy."
    if not path.is_file():
        raise ZooError(f"{path} is in the zoo's index but not on disk. {advice}")
    found_size = path.stat().st_size
    if found_size != size:
        raise ZooError(f"{path} is not what was published: expected {size} bytes, found {found_size}. {advice}")
    found = sha256_of(path)
    if found != sha256:
        raise ZooError(f"{path} is not what was published: expected sha256 {sha256}, found {found}. {advice}")


def is_sha256(text: Any) -> bool:
    """Whether a value is 64 lower-case hex digits."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes as they are on disk now, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_index(path: Path) -> dict[str, dict[str, Any]]:
    """Records of an index file by entry name; none where the file does not exist.

    Names and records are checked here, so that nothing in an index can point outside of the zoo.
    """
    if not path.exists():
        return {}
    content = _load_json(path)
    _check_format(path, content, INDEX_FORMAT)
    records = content.get("entries")
    if not isinstance(records, dict):
        raise ZooError(f"{path}: 'entries' is missing or not an object. Restore the file from a copy.")
    for name, record in records.items():
        check_name(name, where=f"{path}: ")
        problem = _record_problem(record)
        if problem:
            raise ZooError(f"{path}: the record of '{name}' {problem}. Restore the file from a copy.")
    return records


def check_name(name: str, where: str = "") -> None:
    """Raise `ZooError` for a name that is no entry's: such names could otherwise leave the zoo's folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ZooError(
            f"{where}{name!r} is not a name for a zoo entry. A name has up to 100 letters, digits and '.', '_', '-', "
            "begins with a letter or digit, and may end in a version such as '@2'."
        )


def split_version(name: str) -> tuple[str, int]:
    """`"x@2"` as `("x", 2)`; a name without a version is the first one."""
    base, _, version = name.partition("@")
    return base, int(version or 1)


def pin(entry: str) -> str:
    """The name that will mean this very version whatever is published later: `x@1` for an entry called `x`."""
    return entry if "@" in entry else f"{entry}@1"


def shorten(names: list[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _record_problem(record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("architecture"), str):
        return "has no 'architecture'"
    if not isinstance(record.get("files"), dict):
        return "has no 'files'"
    for file, facts in record["files"].items():
        if not _NAME.fullmatch(file):
            return f"lists the file {file!r}, which is not a plain file name"
        sha256, size = (facts.get("sha256"), facts.get("size")) if isinstance(facts, dict) else (None, None)
        if not is_sha256(sha256) or not isinstance(size, int):
            return f"has no usable sha256 and size for '{file}'"
    return ""


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZooError(f"{path} cannot be read as JSON: {error}. Restore the file from a copy.") from error
    if not isinstance(content, dict):
        raise ZooError(f"{path} holds {type(content).__name__}, not a JSON object. Restore the file from a copy.")
    return content


def _check_format(path: Path, content: Mapping[str, Any], newest: int) -> None:
    version = content.get("format")
    if isinstance(version, int) and version > newest:
        raise ZooError(f"{path} has format {version}; this bissl_zoo reads up to {newest}. Upgrade bissl_zoo.")
    if version != newest:
        raise ZooError(f"{path} has format {version!r}, where {newest} was expected. Restore the file from a copy.")
