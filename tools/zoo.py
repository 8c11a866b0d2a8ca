#!/usr/bin/env python
"""The model zoo from the command line.

python tools/zoo.py list                                   # of $BISSL_ZOO, the checkout's model_zoo/, or the user's
python tools/zoo.py list "*simclr*" --metric "AP50*" --zoo https://zoo.example.org
python tools/zoo.py fetch resnet18.simclr_bissl_digit_scenes --to backbones
python tools/zoo.py publish runs/quickstart --zoo s3://bucket/zoo
python tools/zoo.py verify --repair
python tools/zoo.py serve
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.progress.console import exit_status

# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, json: bool = True) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=help)
        command.add_argument(
            "--zoo", action="append", metavar="LOCATION", help="folder or address; several: the first wins"
        )
        if json:
            command.add_argument("--json", action="store_true", help="print JSON, for programs")
        return command

    command = add("list", "what a zoo holds")
    command.add_argument("filter", nargs="?", default="*", help="shell pattern of names")
    for key in ("pretext", "task", "architecture", "metric"):
        command.add_argument(f"--{key}", metavar="PATTERN", help=f"only entries with this {key}")
    add("show", "what an entry says of itself").add_argument("name")
    add("card", "the card (README.md) of an entry", json=False).add_argument("name")
    command = add("fetch", "bring an entry to this machine")
    command.add_argument("name")
    command.add_argument("--to", type=Path, metavar="FOLDER", help="copy it there, where timm loads it by local-dir:")
    command = add("verify", "compare every file with the index, and find what interrupted publishers left")
    command.add_argument("--repair", action="store_true", help="remove what is left over and write MODEL_ZOO.md anew")
    command = add("publish", "publish what a finished run left")
    command.add_argument("run", type=Path, help="the run directory")
    command.add_argument("--name", help="of the entry; the one in the run's configuration by default")
    command = add("remove", "take an entry out of a zoo")
    command.add_argument("name", help="with its version: x@1 for the first")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command = add("serve", "offer a zoo folder over HTTP, to this machine or a lab network", json=False)
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0 offers it to other machines")
    command.add_argument("--port", type=int, default=8000)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    from bissl_zoo.zoo import Zoo, default_zoo
    from bissl_zoo.zoo.commands import COMMANDS

    if args.command == "publish":
        return publish(args)
    return COMMANDS[args.command](args, Zoo(*args.zoo) if args.zoo else default_zoo())


def publish(args: argparse.Namespace) -> int:
    """Publish what a finished run left."""
    from bissl_zoo.engine.publishing import publish_run
    from bissl_zoo.zoo import Zoo
    from bissl_zoo.zoo.commands import print_json

    entry = publish_run(args.run, name=args.name, zoo=Zoo(*args.zoo) if args.zoo else None)
    told = {"name": entry.name, "location": entry.location, "sha256": entry.sha256}
    return print_json(told) if args.json else print(f"published {entry.name} at {entry.location}") or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("bissl_zoo").setLevel(logging.INFO)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
