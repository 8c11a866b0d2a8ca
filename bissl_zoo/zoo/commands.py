"""What `tools/zoo.py` does, command by command: each takes the parsed arguments and a zoo, returns the exit status."""

import json
import sys
from argparse import Namespace
from typing import Any

import yaml
from tabulate import tabulate

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.hub import Zoo, list_backbones
from bissl_zoo.zoo.maintenance import verify
from bissl_zoo.zoo.names import pin
from bissl_zoo.zoo.page import format_metric
from bissl_zoo.zoo.serve import serve
from bissl_zoo.zoo.stores import writable
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.transactions import remove_entry


def list_entries(args: Namespace, zoo: Zoo) -> int:
    """One line per entry."""
    wanted = {key: getattr(args, key) for key in ("pretext", "task", "architecture", "metric")}
    entries = zoo.entries()
    chosen = {name: entries[name] for name in list_backbones(args.filter, zoo=zoo, **wanted)}
    if args.json:
        return print_json({name: {**entry.record, "location": entry.location} for name, entry in chosen.items()})
    if not chosen:
        print(f"{zoo} holds {f'{len(entries)} entries, and none of them matches' if entries else 'no entries'}.")
        return 0
    rows = []
    for name, entry in chosen.items():
        record = entry.record
        metrics = "  ".join(f"{metric} {format_metric(values)}" for metric, values in record["metrics"].items())
        size = sum(facts["size"] for facts in record["files"].values()) / 1e6
        about = [record.get(key) or "-" for key in ("pretext", "task", "solver")]
        rows.append([name, record["architecture"], *about, metrics or "-", f"{size:.1f} MB", entry.store.location])
    header = ["entry", "architecture", "pretext", "task", "solver", "metrics", "size", "zoo"]
    print(tabulate(rows, headers=header, maxcolwidths=[None] * 5 + [40, None, None]))
    return 0


def show(args: Namespace, zoo: Zoo) -> int:
    """What an entry says of itself."""
    entry = zoo.find(args.name)
    facts = {**entry.facts(), "location": entry.location}
    if args.json:
        return print_json(facts)
    print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), end="")
    return 0


def card(args: Namespace, zoo: Zoo) -> int:
    """The card of an entry."""
    print(zoo.find(args.name).file("README.md").read_text(encoding="utf-8"), end="")
    return 0


def fetch(args: Namespace, zoo: Zoo) -> int:
    """Bring an entry to this machine."""
    entry = zoo.find(args.name)
    if args.to:
        place = entry.copy_to(args.to)
        told = {"name": entry.name, "folder": str(place)}
        lines = f"{entry.name} is in {place}\n    timm.create_model('local-dir:{place}', pretrained=True)"
    else:
        paths = {file: str(entry.file(file)) for file in entry.record["files"]}
        told = {"name": entry.name, "files": paths}
        lines = (
            f"{entry.name}: {len(paths)} files, verified\n"
            f'    bissl_zoo.create_backbone("{pin(entry.name)}", pretrained=True)'
        )
    return print_json(told) if args.json else print(lines) or 0


def verify_entries(args: Namespace, zoo: Zoo) -> int:
    """Exit status 1 where something is left to do."""
    told, unsolved = [], 0
    for store in zoo.stores:
        for finding in verify(store, lambda name: args.json or print(f"{name} ...", file=sys.stderr)):
            repaired = args.repair and finding.repair is not None
            if repaired:
                finding.repair()
            unsolved += not repaired
            advice = "repaired" if repaired else finding.advice or "--repair mends it"
            told.append({"zoo": store.location, "where": finding.where, "what": finding.what, "advice": advice})
    if args.json:
        print_json(told)
    else:
        for one in told:
            print(f"{one['zoo']}: {one['where']} {one['what']}: {one['advice']}")
        print(f"{len(zoo.entries())} entries, {len(told)} findings, {unsolved} left to do")
    return int(unsolved > 0)


def remove(args: Namespace, zoo: Zoo) -> int:
    """Take one version out of the first zoo."""
    entry = Zoo(zoo.stores[0].location).find(args.name)
    if pin(entry.name) != pin(args.name):
        raise ZooError(f"'{args.name}' has several versions; say which, as in '{pin(entry.name)}'.")
    if not args.yes and input(f"Remove {entry.location} for good? Whoever uses it loses it. [y/N] ").lower() != "y":
        return 1
    remove_entry(writable(entry.store), entry.name)
    return print_json({"removed": entry.name}) if args.json else print(f"removed {entry.location}") or 0


def serve_folder(args: Namespace, zoo: Zoo) -> int:
    """Serve until Ctrl-C."""
    store = zoo.stores[0]
    if not isinstance(store, FolderStore):
        raise ZooError(f"{store.location} is not a folder on this machine; only such a zoo is served.")
    serve(store.root, args.host, args.port)
    return 0


def print_json(content: Any) -> int:
    """For programs."""
    print(json.dumps(content, indent=2, ensure_ascii=False))
    return 0
