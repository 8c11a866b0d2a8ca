"""Errors that the user can act on; the tools print their message without a traceback."""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: control characters except tab and newline, and characters that change the writing direction
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: extras of the package, and the modules of the libraries that they install
EXTRAS = {
    "train": ("pycocotools", "scipy", "sklearn", "tensorboard"),
    "report": ("jinja2", "matplotlib", "sklearn"),
}


class BisslZooError(Exception):
    """Base of errors that the user can fix; the message names the problem, the place and the fix."""


class ConfigError(BisslZooError):
    """An invalid config file, override or config value."""


class RegistryError(BisslZooError):
    """A name that is unknown or registered twice, or arguments that a registered object does not take."""


class DatasetError(BisslZooError):
    """A data set that is missing or empty, or contains an unusable file."""


class CheckpointError(BisslZooError):
    """A checkpoint or run directory that is missing, damaged or of another run."""


class ZooError(BisslZooError):
    """A zoo entry that is missing, damaged, or cannot be written."""


class NonFiniteLoss(BisslZooError):
    """A loss or gradient is NaN or infinite; the message names the level, the step and the losses.

    `rank` is the first rank with such a loss, or None for a gradient averaged over ranks.
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
    """A solution of the hypergradient system is not finite or far from solving it."""


def require_extra(*extras: str) -> None:
    """Raise BisslZooError if a library of an extra is not installed, with the command that installs it."""
    for extra in extras:
        if missing := [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]:
            raise BisslZooError(f'Not installed: {", ".join(missing)}. Use pip install "bissl_zoo[{extra}]".')


def did_you_mean(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `" Did you mean 'x'?"` with the choice nearest to `word`, or an empty string if none is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def argument_problem(target: Callable[..., Any], given: Iterable[str]) -> str | None:
    """Return why `target` cannot be called with the keyword arguments `given`, or None if it can.

    The text continues the name of the target: "does not take 'sze'. Did you mean 'size'? It accepts: size.".
    """
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    accepted = {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    accepts = f"It accepts: {', '.join(accepted) or 'no arguments'}."
    unknown = [name for name in given if name not in accepted]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        return f"does not take '{unknown[0]}'.{did_you_mean(unknown[0], accepted)} {accepts}"
    missing = [name for name, default in accepted.items() if default is inspect.Parameter.empty and name not in given]
    return f"needs {', '.join(map(repr, missing))}. {accepts}" if missing else None


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Return the first `limit` names joined by commas, and the number of the remaining ones."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def printable(text: str) -> str:
    """Escape characters that would move the cursor, colour or reorder text on a terminal, as `\\u001b`."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
