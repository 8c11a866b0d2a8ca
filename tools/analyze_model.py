#!/usr/bin/env python
"""What a config's networks have and do, and what its stages cost on this machine.

python tools/analyze_model.py --config-file configs/bissl/voc_det.py
python tools/analyze_model.py --config-file configs/bissl/voc_det.py --batch-scale 0.125 train.amp=bf16
python tools/analyze_model.py --config-file configs/bissl/voc_det.py --no-timing --json

Parameters, FLOPs and activations of each stage of the backbone and each part of both losses; then seconds and memory of
the steps of every stage, of one product with the Hessian, and how long the run takes. The data sets need not be there.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as of train_net.py; read once, when torch is imported
# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is no option is an override."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a config of configs/, your own, or zoo:NAME"
    )
    parser.add_argument("--no-timing", action="store_true", help="count only, in seconds")
    parser.add_argument(
        "--batch-scale", type=float, default=1.0, metavar="S", help="measure with batches of S times the config's; 1"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of train_net.py")
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> int:
    """What one process does."""
    from bissl_zoo.analysis.model import analyse, report

    found = analyse(args.config_file, args.overrides, not args.no_timing, args.batch_scale)
    if args.json:
        durations = [{**asdict(one), "seconds": one.seconds} for one in found.durations]
        print(json.dumps({**asdict(found), "durations": durations}, indent=2))
    else:
        print(report(found))
    return 0


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.engine.launch import launch

    return launch(main, 1, args)


if __name__ == "__main__":
    sys.exit(cli())
