"""Errors a person can act on. The tools print their message, without a traceback."""

import difflib
import re
from collections.abc import Iterable, Sequence

#: control characters except tab and newline, and characters that change the writing direction
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class BisslZooError(Exception):
    """Base of every error that the user caused or can mend; its message says what, where and what to do."""


class ConfigError(BisslZooError):
    """A configuration file, an override, or a value in them."""


class RegistryError(BisslZooError):
    """A name that is not registered, registered twice, or built with arguments it does not take."""


class DatasetError(BisslZooError):
    """A data set that is missing, empty, or holds a file that cannot be used."""


class CheckpointError(BisslZooError):
    """A checkpoint or run directory that is missing, damaged, or belongs to something else."""


class ZooError(BisslZooError):
    """A zoo entry that is missing, damaged, or cannot be written."""


class NonFiniteLoss(BisslZooError):
    """A loss or a gradient became NaN or infinite; the message names the level, the step and the losses.

    `rank` is the first process whose loss it is; None where it is of all together.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class Interrupted(BisslZooError):
    """A signal stopped the run, which is saved. `status` is the exit status: 128 + the number of the signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class BadHypergradient(BisslZooError):
    """A solver's answer is not finite, or as far from a solution as can be."""


def did_you_mean(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """`" Did you mean 'x'?"` for the choice nearest to `word`, or an empty string where none is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Return the first `limit` names joined by commas, and the number of the remaining ones."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def printable(text: str) -> str:
    """Escape characters that would move the cursor, colour or reorder text on a terminal, as `\\u001b`."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
