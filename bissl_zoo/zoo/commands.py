"""The commands of `bissl zoo`: each takes the parsed arguments and a zoo, and returns the exit status."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import yaml
from tabulate import tabulate

from bissl_zoo.errors import ZooError, printable
from bissl_zoo.zoo.cache import retrying
from bissl_zoo.zoo.card import format_metric, split_metric
from bissl_zoo.zoo.hub import Entry, Zoo, list_backbones
from bissl_zoo.zoo.index import INDEX_FILE, parse_index, pin
from bissl_zoo.zoo.stores import Store


def list_entries(args: Namespace, zoo: Zoo) -> int:
    """Print a table per location: a line per entry with backbone, size, methods and one metric; `show` has them all."""
    patterns = {key: getattr(args, key) for key in ("pretext", "task", "architecture", "metric")}
    entries = zoo.entries()
    names = list_backbones(args.filter, zoo=zoo, **patterns)
    chosen = {name: entries[name] for name in names if name in entries}  # some may be new
    if args.json:
        return print_json({name: {**entry.record, "location": entry.location} for name, entry in chosen.items()})
    if not chosen:
        print(f"{zoo} has {f'{len(entries)} entries, but none matches' if entries else 'no entries'}.")
        return 0
    for store in zoo.stores:
        if rows := [_row(entry) for entry in chosen.values() if entry.store is store]:
            print(f"{printable(store.location)}\n\n{_table(rows)}\n")
    return 0


def _row(entry: Entry) -> list[str]:
    record = entry.record
    size = sum(file["size"] for file in record["files"].values()) / 1e6
    methods = ", ".join(_line(record[key]) for key in ("pretext", "task", "solver") if record.get(key))
    return [
        entry.name,
        _line(record["architecture"]),
        f"{size:.1f}",
        methods or "-",
        _metric(record.get("metrics", {})),
    ]


def _metric(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the first metric, and in brackets what BiSSL added to it if the entry has the model without it."""
    if not metrics:
        return "-"
    first, _ = split_metric(next(iter(metrics)))
    values = {split_metric(name)[1]: metric for name, metric in metrics.items() if split_metric(name)[0] == first}
    *_, metric = values.values()
    means = [values[start].get("mean") for start in ("pretrained", "bissl") if start in values]
    known = len(means) == 2 and all(isinstance(mean, (int, float)) for mean in means)
    return _line(f"{first} {format_metric(metric, seeds=False)}" + (f" ({means[1] - means[0]:+.4f})" if known else ""))


def _line(text: str) -> str:
    return " ".join(printable(text).split())


def _table(rows: list[list[str]]) -> str:
    headers = ["entry", "backbone", "MB", "made by", "metric (gain by BiSSL)"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def show(args: Namespace, zoo: Zoo) -> int:
    """Print the metadata of an entry."""
    entry = zoo.find(args.name)
    metadata = {**entry.metadata(), "location": entry.location}
    if args.json:
        return print_json(metadata)
    print(printable(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=100)), end="")
    return 0


def card(args: Namespace, zoo: Zoo) -> int:
    """Print the card of an entry."""
    print(printable(zoo.find(args.name).text_file("README.md").read_text(encoding="utf-8", errors="replace")), end="")
    return 0


def fetch(args: Namespace, zoo: Zoo) -> int:
    """Download an entry to the cache, or copy it to a folder."""
    entry = zoo.find(args.name)
    if args.to:
        folder = entry.copy_to(args.to)
        result: dict[str, Any] = {"name": entry.name, "folder": str(folder)}
        text = f"{entry.name} is in {folder}\n    timm.create_model('local-dir:{folder}', pretrained=True)"
    else:
        result = {"name": entry.name, "files": {file: str(entry.file(file)) for file in entry.record["files"]}}
        text = (
            f"{entry.name}: {len(result['files'])} files, verified\n"
            f'    bissl_zoo.create_backbone("{pin(entry.name)}", pretrained=True)'
        )
    return print_json(result) if args.json else print(text) or 0


def verify_entries(args: Namespace, zoo: Zoo) -> int:
    """Compare every file with the index; return 1 if one differs."""
    rows = [
        {"zoo": store.location, "file": file, "problem": problem}
        for store in zoo.stores
        for file, problem in verify(store)
    ]
    if args.json:
        print_json(rows)
    else:
        for row in rows:
            print(printable(f"{row['zoo']}: {row['file']} {row['problem']}: copy the entry again, or remove it"))
        print(f"{len(zoo.entries())} entries, {len(rows)} files differ")
    return int(bool(rows))


def verify(store: Store) -> Iterator[tuple[str, str]]:
    """Compare every file of a store with its index; yield files that differ, and how.

    Raises:
        ZooError: the index is invalid, or the store cannot be reached.
    """
    content = retrying(lambda: store.read_index(INDEX_FILE))
    for name, record in parse_index(content, f"{store.location.rstrip('/')}/{INDEX_FILE}").records.items():
        for file, expected in record["files"].items():
            if problem := _difference(store, f"{name}/{file}", expected):
                yield f"{name}/{file}", problem


def _difference(store: Store, path: str, expected: Mapping[str, Any]) -> str:
    """Return how a file differs from its record; empty if it does not."""

    def measure() -> tuple[int, str]:
        size, digest = 0, sha256()
        for block in store.read(path):
            size += len(block)
            digest.update(block)
            if size > expected["size"]:
                break
        return size, digest.hexdigest()

    try:
        size, digest = retrying(measure)
    except ZooError as error:
        return f"cannot be read: {error}"
    if size != expected["size"]:
        return f"has {size} bytes, expected {expected['size']}"
    return "" if digest == expected["sha256"] else f"has sha256 {digest}, expected {expected['sha256']}"


def remove(args: Namespace, zoo: Zoo) -> int:
    """Remove one version from the first zoo, after a question."""
    entry = Zoo(zoo.stores[0].location).find(args.name)
    if pin(entry.name) != pin(args.name):
        raise ZooError(f"'{args.name}' has several versions. Name one, for example '{pin(entry.name)}'.")
    if not args.yes:
        # not input(), which fails without a terminal and writes into the output of --json
        question = f"Remove {entry.location} permanently? [y/N] "
        print(question, end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was removed.", file=sys.stderr)
            return 1
    entry.store.remove(entry.name)
    return print_json({"removed": entry.name}) if args.json else print(f"removed {entry.location}") or 0


def print_json(content: Any) -> int:
    """Print JSON and return 0."""
    print(printable(json.dumps(content, indent=2, ensure_ascii=False)))
    return 0


#: `publish` is in `bissl zoo`, since it reads a run
COMMANDS: dict[str, Callable[[Namespace, Zoo], int]] = {
    "list": list_entries,
    "show": show,
    "card": card,
    "fetch": fetch,
    "verify": verify_entries,
    "remove": remove,
}
