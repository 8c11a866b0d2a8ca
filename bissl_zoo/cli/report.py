"""Write one self-contained HTML file on a run.

bissl report runs/a                              # runs/a/report.html; also of unfinished or failed runs
bissl report received/run --files-only           # untrusted: builds nothing that its config names

Samples, predictions and feature maps need the run's data sets ($BISSL_ZOO_DATASETS) and its checkpoints. A part that
cannot be made is replaced by the reason, which is also logged as a warning.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.report import IMAGES, REPORT_FILE


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"output file; default: {REPORT_FILE} in the run directory"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help=f"maximum images of a data set ({IMAGES})"
    )
    what.add_argument("--files-only", action="store_true", help="read only files of the run: no data, no model")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error("--images must be 1 or more; use --files-only for none")
    return args


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from bissl_zoo.progress.display import console
    from bissl_zoo.report.run import write_report

    output = args.output or args.run / REPORT_FILE
    with console():
        write_report(args.run, output, 0 if args.files_only else args.images)
    print(f"report {output}")
    return 0
