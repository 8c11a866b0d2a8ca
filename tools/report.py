#!/usr/bin/env python
"""One HTML file on a run, on several runs side by side, or on a zoo: no network, no server, also for phones and paper.

python tools/report.py runs/a                              # runs/a/report.html, of an unfinished or failed run, too
python tools/report.py runs/a runs/b --output both.html    # side by side
python tools/report.py received/run --files-only           # of a stranger: nothing that its config names is built
python tools/report.py --html zoo --output zoo.html        # the model zoo: sorted and filtered in the browser

Samples, predictions and maps of features need the run's data sets, as $BISSL_ZOO_DATASETS names them, and its
checkpoints. What cannot be made says why in its place, and in a warning.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.report import IMAGES, REPORT_FILE

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="directory of a run; several: side by side")
    parser.add_argument("--html", choices=["zoo"], help="instead of runs, the entries of the model zoo")
    parser.add_argument(
        "--zoo", action="append", metavar="LOCATION", help="of --html zoo: folder or address; several: the first wins"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: {REPORT_FILE}, of one run in its directory"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"most looked at of a set ({IMAGES})")
    what.add_argument("--files-only", action="store_true", help="read the run's files alone: no data, no model")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.html):
        parser.error("give the directory of a run, several of them, or --html zoo")
    if args.zoo and not args.html:
        parser.error("--zoo goes with --html zoo")
    if args.images < 1:
        parser.error("--images must be 1 or more; --files-only looks at none")
    return args


def main(args: argparse.Namespace) -> int:
    """Write the page, say where."""
    from bissl_zoo.progress.display import console
    from bissl_zoo.report.write import write_report
    from bissl_zoo.report.zoo import write_zoo_page
    from bissl_zoo.zoo import Zoo, default_zoo

    with console():
        if args.html:
            output = args.output or Path("zoo.html")
            write_zoo_page(Zoo(*args.zoo) if args.zoo else default_zoo(), output)
        else:
            output = args.output or (args.runs[0] / REPORT_FILE if len(args.runs) == 1 else Path(REPORT_FILE))
            write_report(args.runs, output, 0 if args.files_only else args.images)
    print(f"report {output}")
    return 0


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.engine.launch import launch

    return launch(main, 1, args)


if __name__ == "__main__":
    sys.exit(cli())
