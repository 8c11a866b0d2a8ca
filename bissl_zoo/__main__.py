"""`python -m bissl_zoo doctor`: check the installation and this machine, with advice for each problem."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from bissl_zoo.doctor import CHECKS, PROBLEM, examine, page, worst
from bissl_zoo.errors import printable
from bissl_zoo.progress.console import exit_status


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bissl_zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    help = "check versions, GPUs, data sets, zoo and folders; exit status 1 if there is a problem"
    doctor = commands.add_parser("doctor", help=help, description=help)
    doctor.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--runs", metavar="FOLDER", help="where runs are written (default: runs)")
    return parser.parse_args(argv)


def run_doctor(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if there is a problem."""
    findings = examine(args.checks, args.runs)
    status = worst(findings)
    if args.json:
        content = {"status": status, "findings": [asdict(finding) for finding in findings]}
        print(printable(json.dumps(content, indent=2, ensure_ascii=False)))
    else:
        print(printable(page(findings)))
    return 1 if status == PROBLEM else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    return exit_status(lambda: run_doctor(args))


if __name__ == "__main__":
    sys.exit(main())
