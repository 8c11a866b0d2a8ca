#!/usr/bin/env python
"""The runs below a folder: how far each is, what it holds, and what of it may go.

python tools/runs.py list runs
python tools/runs.py show runs/quickstart --verify
python tools/runs.py prune runs/quickstart                 # what would go; --yes removes it

A run is running, finished, interrupted (there is a checkpoint to go on from), or has no checkpoint. `list` and `show`
wait for nobody and change nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bissl_zoo.errors import CheckpointError
from bissl_zoo.progress.console import exit_status, printable

# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, json: bool = True) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=help)
        if json:
            command.add_argument("--json", action="store_true", help="print JSON, for programs")
        return command

    command = add("list", "a line per run")
    command.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="that holds runs; 'runs'")
    command = add("show", "what a run holds, and the command that resumes it")
    command.add_argument("run", type=Path, help="the run directory")
    command.add_argument("--verify", action="store_true", help="compare the files of every checkpoint with its digests")
    command = add("prune", "free disk: leave the last checkpoint of each stage, verified first", json=False)
    command.add_argument("run", type=Path, help="the run directory")
    command.add_argument("--keep", type=int, metavar="N", help="newest of a stage that stay: 1; of an unfinished run 2")
    command.add_argument("--damaged", action="store_true", help="also remove those that were set aside as damaged")
    command.add_argument("--yes", action="store_true", help="remove it; without this, only say what would go")
    args = parser.parse_args(argv)
    if args.command == "prune" and args.keep is not None and args.keep < 1:
        parser.error("--keep must be 1 or more")
    return args


def list_runs(args: argparse.Namespace) -> None:
    """A line per run."""
    from bissl_zoo.runs.commands import resume_command, runs_table
    from bissl_zoo.runs.listing import find_runs, look_at

    runs = [look_at(folder) for folder in find_runs(args.folder)]
    if args.json:
        print_json([{**asdict(run), "resume": resume_command(run)} for run in runs])
    else:
        print(runs_table(runs) if runs else f"There are no runs in {args.folder}.")


def show(args: argparse.Namespace) -> None:
    """What a run holds."""
    from bissl_zoo.runs.commands import resume_command, run_page
    from bissl_zoo.runs.listing import is_run, look_at

    if not is_run(args.run):
        raise CheckpointError(f"There is no run in {args.run} (no config.yaml). Give the directory of a run.")
    run = look_at(args.run, whole=True, verified=args.verify)
    if args.json:
        print_json({**asdict(run), "resume": resume_command(run)})
    else:
        print(run_page(run))


def prune_run(args: argparse.Namespace) -> None:
    """Say what would go, or remove it."""
    from bissl_zoo.runs.commands import pruning_page
    from bissl_zoo.runs.pruning import plan, prune

    print(pruning_page((prune if args.yes else plan)(args.run, args.keep, args.damaged), removed=args.yes))


def print_json(content: Any) -> None:
    """For programs."""
    print(printable(json.dumps(content, indent=2, ensure_ascii=False, default=str)))


COMMANDS = {"list": list_runs, "show": show, "prune": prune_run}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    return exit_status(lambda: COMMANDS[args.command](args))


if __name__ == "__main__":
    sys.exit(main())
