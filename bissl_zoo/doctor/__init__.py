"""Whether an installation and a machine are fit for runs: versions, GPUs, folders, and pairs that are known to be bad.

Nothing here imports torch or its like at the top, so that the doctor works where these do not.
"""

from bissl_zoo.doctor.examination import CHECKS, examine
from bissl_zoo.doctor.finding import OK, PROBLEM, WARNING, Finding, worst
from bissl_zoo.doctor.page import page

__all__ = ["CHECKS", "OK", "PROBLEM", "WARNING", "Finding", "examine", "page", "worst"]
