"""What a run does about its report when it ends: it writes it, or says how to look at what there is."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from bissl_zoo.distributed import is_main_process
from bissl_zoo.engine.display import doing, say

REPORT_FILE = "report.html"
#: images that a report may look at when a run ends, few enough for a CPU
IMAGES = 200


def report_after(folder: Path) -> None:
    """Write the report of a run that has come to its end; whatever goes wrong with it is a warning."""
    try:
        # drawing takes a second to import, which a run need not wait for when it starts
        from bissl_zoo.engine.report import write_report

        with doing("writing the report"):
            write_report([folder], folder / REPORT_FILE, images=IMAGES, ended=True)
        say(f"report {folder / REPORT_FILE}")
    except Exception as error:  # the run is complete, and nothing that a report comes to may change that
        say(f"warning: there is no report: {type(error).__name__}: {error}. Try {_command(folder)}")


@contextlib.contextmanager
def pointing_to_report(folder: Path) -> Iterator[None]:
    """Where the block ends before its time, say how to look at what there is of the run."""
    try:
        yield
    except Exception:
        if is_main_process():
            say(f"look at it with {_command(folder)}")
        raise


def _command(folder: Path) -> str:
    return f"python tools/report.py {folder}"
