"""Limits on what comes from others; an environment variable, such as BISSL_ZOO_MAX_ENTRIES, sets another one."""

import os
import re

from bissl_zoo.errors import ConfigError

_PREFIX = "BISSL_ZOO_MAX_"
#: the end of the variable -> default
LIMITS = {
    "SECONDS": 900,  # to download one file, plus one for each 16 KiB of it
    "ENTRIES": 100_000,  # of one index
    "INDEX_BYTES": 64 << 20,  # of one index
    "FILE_BYTES": 1 << 40,  # of one file of an entry
    "TEXT_BYTES": 4 << 20,  # of one file of an entry that is read into memory: JSON, config, card
    "CONFIG_BYTES": 1 << 20,  # of one YAML file; parsing needs three hundred times the memory
    "CONFIG_VALUES": 100_000,  # of one config after its interpolations are resolved
    "SHARDS": 1_000_000,  # of one data set
}


def limit(name: str) -> int:
    """Return a limit of `LIMITS`, or the one that its environment variable sets.

    Raises:
        ConfigError: the variable is not a positive whole number.
    """
    text = os.environ.get(_PREFIX + name)
    if text is None:
        return LIMITS[name]
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise ConfigError(f"{_PREFIX}{name} is {text!r:.100}; set it to a whole number above 0.")
    return int(text)


def stated(name: str) -> str:
    """Return the end of a message about a limit: its value and the variable that sets another one."""
    return f"the limit is {limit(name):,} ({_PREFIX}{name} sets another)"
