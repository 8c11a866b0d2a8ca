"""Check versions, GPUs, data sets, zoo and folders, with advice for each problem.

bissl doctor
bissl doctor packages --json

Exit status 1 if there is a problem.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from bissl_zoo.doctor import CHECKS, PROBLEM, examine, page, worst
from bissl_zoo.errors import printable


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--runs", metavar="FOLDER", help="where runs are written (default: runs)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if there is a problem."""
    findings = examine(args.checks, args.runs)
    status = worst(findings)
    if args.json:
        content = {"status": status, "findings": [asdict(finding) for finding in findings]}
        print(printable(json.dumps(content, indent=2, ensure_ascii=False)))
    else:
        print(printable(page(findings)))
    return 1 if status == PROBLEM else 0
