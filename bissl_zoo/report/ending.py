"""The report of a run that has just ended."""

import logging
from pathlib import Path

from bissl_zoo.progress.display import doing
from bissl_zoo.report import REPORT_FILE
from bissl_zoo.runs.directory import report_command

logger = logging.getLogger(__name__)

#: images that a report may look at when a run ends, few enough for a CPU
IMAGES = 200


def report_after(folder: Path) -> None:
    """Write the report of a run that has come to its end; whatever goes wrong with it is a warning."""
    try:
        # drawing takes a second to import, which a run need not wait for when it starts
        from bissl_zoo.report.write import write_report

        with doing("writing the report"):
            write_report([folder], folder / REPORT_FILE, images=IMAGES, ended=True)
        logger.info(f"report {folder / REPORT_FILE}")
    except Exception as error:  # the run is complete, and nothing that a report comes to may change that
        logger.warning(f"there is no report: {type(error).__name__}: {error}. Try {report_command(folder)}")
