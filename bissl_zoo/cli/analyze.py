"""Count the networks of a config, and measure the time and memory of its stages on this machine.

bissl analyze --config-file configs/bissl/voc_det.py
bissl analyze --config-file configs/bissl/voc_det.py train.amp=bf16
bissl analyze --config-file configs/bissl/voc_det.py --no-timing --json

Prints parameters and multiply-adds of each stage of the backbone and both losses; then seconds and memory
of the steps of every stage and of one Hessian-vector product, and the duration of the run. No data set is needed.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from bissl_zoo.cli import add_config


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; positional arguments are config overrides."""
    add_config(parser)
    parser.add_argument("--no-timing", action="store_true", help="count only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    """Analyse the config and print the result."""
    from bissl_zoo.analysis.model import analyse, report

    analysis = analyse(args.config_file, args.overrides, not args.no_timing)
    if args.json:
        durations = [{**asdict(item), "seconds": item.seconds} for item in analysis.durations]
        print(json.dumps({**asdict(analysis), "durations": durations}, indent=2))
    else:
        print(report(analysis))
    return 0
