#!/usr/bin/env python
"""Count the networks of a config, and measure the time and memory of its stages on this machine.

python tools/analyze_model.py --config-file configs/bissl/voc_det.py
python tools/analyze_model.py --config-file configs/bissl/voc_det.py --batch-scale 0.125 train.amp=bf16
python tools/analyze_model.py --config-file configs/bissl/voc_det.py --no-timing --json

Prints parameters and multiply-adds of each stage of the backbone and each part of both losses; then seconds and memory
of the steps of every stage and of one Hessian-vector product, and the duration of the run. No data set is needed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it at import
# slow imports are inside the functions, so that --help is instant


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; positional arguments are config overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a config of configs/, your own, or zoo:NAME"
    )
    parser.add_argument("--no-timing", action="store_true", help="count only")
    parser.add_argument(
        "--batch-scale", type=float, default=1.0, metavar="S", help="factor on the measured batch sizes (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config overrides")
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> int:
    """Analyse the config and print the result."""
    from bissl_zoo.analysis.model import analyse, report

    analysis = analyse(args.config_file, args.overrides, not args.no_timing, args.batch_scale)
    if args.json:
        durations = [{**asdict(item), "seconds": item.seconds} for item in analysis.durations]
        print(json.dumps({**asdict(analysis), "durations": durations}, indent=2))
    else:
        print(report(analysis))
    return 0


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.engine.launch import launch

    return launch(main, 1, args)


if __name__ == "__main__":
    sys.exit(cli())
