"""Reports: one HTML file on a run."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

#: file name of the report in a run directory
REPORT_FILE = "report.html"
#: maximum number of images of a data set for predictions and maps of features
IMAGES = 500


def report_after(folder: Path) -> None:
    """Write the report of a run that has just finished; any error is a warning, since the run is complete."""
    from bissl_zoo.progress.display import doing
    from bissl_zoo.runs.directory import report_command

    try:
        from bissl_zoo.report.run import write_report  # imports matplotlib

        with doing("writing the report"):
            write_report(folder, folder / REPORT_FILE, ended=True)
        logger.info(f"report {folder / REPORT_FILE}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning(f"the report was not written: {reason}. Try {report_command(folder)}")
