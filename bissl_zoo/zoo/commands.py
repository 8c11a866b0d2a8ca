"""What `tools/zoo.py` does, command by command: each takes the parsed arguments and a zoo, returns the exit status."""

import json
import shutil
import sys
import textwrap
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import yaml
from tabulate import tabulate

from bissl_zoo.errors import ZooError
from bissl_zoo.progress.console import printable
from bissl_zoo.zoo.hub import Entry, Zoo, list_backbones
from bissl_zoo.zoo.maintenance import Finding, verify
from bissl_zoo.zoo.names import pin
from bissl_zoo.zoo.page import format_metric, split_metric
from bissl_zoo.zoo.serve import serve
from bissl_zoo.zoo.stores import writable
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.transactions import remove_entry

_HANGING = {"subsequent_indent": "  ", "break_on_hyphens": False}


def list_entries(args: Namespace, zoo: Zoo) -> int:
    """A table per location: what each entry is, came from and measures."""
    wanted = {key: getattr(args, key) for key in ("pretext", "task", "architecture", "metric")}
    entries = zoo.entries()
    names = list_backbones(args.filter, zoo=zoo, **wanted)
    chosen = {name: entries[name] for name in names if name in entries}  # some may have come since
    if args.json:
        return print_json({name: {**entry.record, "location": entry.location} for name, entry in chosen.items()})
    if not chosen:
        print(f"{zoo} holds {f'{len(entries)} entries, and none of them matches' if entries else 'no entries'}.")
        return 0
    for store in zoo.stores:
        rows = [_row(entry) for entry in chosen.values() if entry.store is store]
        if rows:
            print(f"{printable(store.location)}\n\n{_table(rows)}\n")
    return 0


def _row(entry: Entry) -> list[list[str]]:
    """The lines of each cell."""
    record = entry.record
    size = sum(facts["size"] for facts in record["files"].values()) / 1e6
    made_by = [_line(record[key]) for key in ("pretext", "task", "solver") if record.get(key)]
    backbone = [_line(record["architecture"]), f"{size:.1f} MB"]
    return [[entry.name], backbone, made_by or ["-"], _metrics(record.get("metrics", {})) or ["-"]]


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A small table: a line per metric, a column per what the model was fine-tuned from."""
    values: dict[str, dict[str, str]] = {}
    for name, metric in metrics.items():
        base, start = split_metric(name)
        values.setdefault(base, {})[start] = format_metric(metric, seeds=False)
    starts = list(dict.fromkeys(start for row in values.values() for start in row))
    header = ["from", *map(_line, starts)] if any(starts) else ()
    rows = [[_line(base), *(row.get(start, "-") for start in starts)] for base, row in values.items()]
    return tabulate(rows, header, tablefmt="plain", disable_numparse=True).splitlines()


def _line(text: str) -> str:
    return " ".join(printable(text).split())


def _table(rows: list[list[list[str]]]) -> str:
    """The rows as wide as the terminal, if that leaves the metrics some room."""
    taken = sum(max(len(line) for row in rows for line in row[column]) + 2 for column in range(3))
    room = max(shutil.get_terminal_size((100, 24)).columns - taken, 24)
    wrapped = [[*row[:3], [part for line in row[3] for part in textwrap.wrap(line, room, **_HANGING)]] for row in rows]
    cells = [["\n".join(cell) for cell in row] for row in wrapped]
    return tabulate(cells, headers=["entry", "backbone", "made by", "metrics"], disable_numparse=True)


def show(args: Namespace, zoo: Zoo) -> int:
    """What an entry says of itself."""
    entry = zoo.find(args.name)
    facts = {**entry.facts(), "location": entry.location}
    if args.json:
        return print_json(facts)
    print(printable(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=100)), end="")
    return 0


def card(args: Namespace, zoo: Zoo) -> int:
    """The card of an entry."""
    print(printable(zoo.find(args.name).file("README.md").read_text(encoding="utf-8", errors="replace")), end="")
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
            repaired, advice = _repair(finding) if args.repair else (False, finding.advice or "--repair mends it")
            unsolved += not repaired
            told.append({"zoo": store.location, "where": finding.where, "what": finding.what, "advice": advice})
    if args.json:
        print_json(told)
    else:
        for one in told:
            print(printable(f"{one['zoo']}: {one['where']} {one['what']}: {one['advice']}"))
        print(f"{len(zoo.entries())} entries, {len(told)} findings, {unsolved} left to do")
    return int(unsolved > 0)


def _repair(finding: Finding) -> tuple[bool, str]:
    """Whether it is mended, and what is left to say of it."""
    if finding.repair is None:
        return False, finding.advice
    try:
        finding.repair()
    except ZooError as error:
        return False, str(error)
    return True, "repaired"


def remove(args: Namespace, zoo: Zoo) -> int:
    """Take one version out of the first zoo."""
    entry = Zoo(zoo.stores[0].location).find(args.name)
    if pin(entry.name) != pin(args.name):
        raise ZooError(f"'{args.name}' has several versions; say which, as in '{pin(entry.name)}'.")
    if not args.yes:
        # not by input(), whose question would be part of what --json prints, and which fails where nobody can answer
        question = f"Remove {entry.location} for good? Whoever uses it loses it. [y/N] "
        print(question, end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was removed.", file=sys.stderr)
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
    print(printable(json.dumps(content, indent=2, ensure_ascii=False)))
    return 0


#: what each command does; `publish` is the tool's own, since runs are not known here
COMMANDS = {
    "list": list_entries,
    "show": show,
    "card": card,
    "fetch": fetch,
    "verify": verify_entries,
    "remove": remove,
    "serve": serve_folder,
}
