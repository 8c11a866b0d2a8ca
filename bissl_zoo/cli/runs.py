"""List runs, show what a run holds, and remove old checkpoints.

bissl runs list runs
bissl runs show runs/quickstart --verify
bissl runs prune runs/quickstart                 # prints what would be removed; --yes removes it

A run is running, finished, interrupted (it can be resumed from a checkpoint), or has no checkpoint. `list` and `show`
never wait and change nothing.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bissl_zoo.errors import CheckpointError, printable


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, json: bool = True) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=help)
        if json:
            command.add_argument("--json", action="store_true", help="print JSON")
        return command

    command = add("list", "one line per run")
    command.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="contains the runs (default: runs)")
    command = add("show", "stages, checkpoints and results of a run, and the command that resumes it")
    command.add_argument("run", type=Path, help="the run directory")
    command.add_argument("--verify", action="store_true", help="compare the files of all checkpoints with their sha256")
    command = add("prune", "free disk space: keep the last checkpoint of each stage, verified first", json=False)
    command.add_argument("run", type=Path, help="the run directory")
    command.add_argument(
        "--keep", type=int, metavar="N", help="newest checkpoints of a stage to keep (default: 1; 2 if not finished)"
    )
    command.add_argument("--damaged", action="store_true", help="also remove those that were set aside as damaged")
    command.add_argument("--yes", action="store_true", help="remove; without this, only print what would be removed")
    args = parser.parse_args(argv)
    if args.command == "prune" and args.keep is not None and args.keep < 1:
        parser.error("--keep must be 1 or more")
    return args


def list_runs(args: argparse.Namespace) -> None:
    """Print one line per run."""
    from bissl_zoo.runs.listing import find_runs, look_at, resume_command, runs_table

    runs = [look_at(folder) for folder in find_runs(args.folder)]
    if args.json:
        print_json([{**asdict(run), "resume": resume_command(run)} for run in runs])
    else:
        print(runs_table(runs) if runs else f"There are no runs in {args.folder}.")


def show(args: argparse.Namespace) -> None:
    """Print what a run holds."""
    from bissl_zoo.runs.listing import is_run, look_at, resume_command, run_page

    if not is_run(args.run):
        raise CheckpointError(f"There is no run in {args.run} (no config.yaml). Give the directory of a run.")
    run = look_at(args.run, whole=True, verified=args.verify)
    print_json({**asdict(run), "resume": resume_command(run)}) if args.json else print(run_page(run))


def prune_run(args: argparse.Namespace) -> None:
    """Remove old checkpoints, or print which."""
    from bissl_zoo.runs.listing import prune

    print(prune(args.run, args.keep, args.damaged, dry_run=not args.yes).page(removed=args.yes))


def print_json(content: Any) -> None:
    """Print JSON with control characters escaped."""
    print(printable(json.dumps(content, indent=2, ensure_ascii=False, default=str)))


COMMANDS = {"list": list_runs, "show": show, "prune": prune_run}


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    COMMANDS[args.command](args)
