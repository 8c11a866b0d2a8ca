"""Domains of the arguments of parts: checked before a run starts, and the only values that a zoo entry may set."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Domain:
    """A set of accepted values.

    Attributes:
        description: completes "must be ...", such as "a number above 0".
        accepts: returns True for a value of the set; it may raise TypeError for other types.
    """

    description: str
    accepts: Callable[[Any], bool]

    def problem(self, value: Any) -> str:
        """Return "must be ..." if `value` is not accepted, otherwise an empty string."""
        try:
            accepted = self.accepts(value)
        except (TypeError, ValueError, OverflowError):
            accepted = False
        return "" if accepted else f"must be {self.description}"

    def __or__(self, other: "Domain") -> "Domain":
        either = f"{self.description}, or {other.description}"
        return Domain(either, lambda value: not self.problem(value) or not other.problem(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def choice(*names: Any) -> Domain:
    """Return the domain of some names."""
    listed = " or ".join("null" if name is None else f"'{name}'" for name in names)
    return Domain(listed, lambda value: any(value == name and type(value) is type(name) for name in names))


def sequence(of: Domain, length: int | None = None, ordered: bool = False) -> Domain:
    """Return the domain of lists of values of a domain.

    Args:
        length: number of values; None for one or more.
        ordered: each value is at least the one before it.
    """

    def accepts(value: Any) -> bool:
        items = list(value)
        return (
            not isinstance(value, (str, Mapping))
            and (len(items) == length if length else bool(items))
            and not any(of.problem(item) for item in items)
            and (not ordered or items == sorted(items))
        )

    count = f"{length} values" if length else "values"
    order = ", the smaller first" if ordered else ""
    return Domain(f"a list of {count}{order}, each {of.description}", accepts)


ANY = Domain("any value", lambda value: True)
NULL = choice(None)
FLAG = Domain("true or false", lambda value: isinstance(value, bool))
TEXT = Domain("text", lambda value: isinstance(value, str))
NUMBER = Domain("a finite number", _is_number)
POSITIVE = Domain("a number above 0", lambda value: _is_number(value) and value > 0)
NON_NEGATIVE = Domain("a number, 0 or more", lambda value: _is_number(value) and value >= 0)
FRACTION = Domain("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
BELOW_ONE = Domain("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
SHARE = Domain("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
WHOLE = Domain("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0)
COUNT = Domain("a whole number, 1 or more", lambda value: _is_whole(value) and value >= 1)
PAIR = Domain("a whole number, 2 or more", lambda value: _is_whole(value) and value >= 2)
SEED = Domain("a whole number from 0 to 2^32 - 1", lambda value: _is_whole(value) and 0 <= value < 2**32)
WIDTHS = sequence(COUNT)
COLORS = sequence(NUMBER, length=3)
DEVIATIONS = sequence(POSITIVE, length=3)
