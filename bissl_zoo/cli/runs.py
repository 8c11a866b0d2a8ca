"""List runs, and show what a run holds.

bissl runs list runs
bissl runs show runs/quickstart --verify

A run is running, finished, interrupted (it can be resumed from a checkpoint), or has no checkpoint. Nothing
is changed, and no command waits.
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

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=help)
        command.add_argument("--json", action="store_true", help="print JSON")
        return command

    command = add("list", "one line per run")
    command.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="contains the runs (default: runs)")
    command = add("show", "stages, checkpoints and results of a run, and the command that resumes it")
    command.add_argument("run", type=Path, help="the run directory")
    command.add_argument("--verify", action="store_true", help="compare the files of all checkpoints with their sha256")
    return parser.parse_args(argv)


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
    run = look_at(args.run, args.verify)
    print_json({**asdict(run), "resume": resume_command(run)}) if args.json else print(run_page(run))


def print_json(content: Any) -> None:
    """Print JSON with control characters escaped."""
    print(printable(json.dumps(content, indent=2, ensure_ascii=False, default=str)))


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    list_runs(args) if args.command == "list" else show(args)
