"""Write one self-contained HTML file on a run, on several runs side by side, or on a zoo.

bissl report runs/a                              # runs/a/report.html; also of unfinished or failed runs
bissl report runs/a runs/b --output both.html    # side by side
bissl report received/run --files-only           # untrusted: builds nothing that its config names
bissl report --html zoo --output zoo.html        # the model zoo, sorted and filtered in the browser

Samples, predictions and feature maps need the run's data sets ($BISSL_ZOO_DATASETS) and its checkpoints. A part that
cannot be made is replaced by the reason, which is also logged as a warning.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.report import IMAGES, REPORT_FILE


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directory; several: side by side")
    parser.add_argument("--html", choices=["zoo"], help="the entries of the model zoo instead of runs")
    parser.add_argument(
        "--zoo", action="append", metavar="LOCATION", help="with --html zoo: folder or URL; several: the first wins"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"output file; default: {REPORT_FILE}, for one run in its directory"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help=f"maximum images of a data set ({IMAGES})"
    )
    what.add_argument("--files-only", action="store_true", help="read only files of the run: no data, no model")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.html):
        parser.error("give the directory of a run, several of them, or --html zoo")
    if args.zoo and not args.html:
        parser.error("--zoo goes with --html zoo")
    if args.images < 1:
        parser.error("--images must be 1 or more; use --files-only for none")
    return args


def run(args: argparse.Namespace) -> int:
    """Write the page."""
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
