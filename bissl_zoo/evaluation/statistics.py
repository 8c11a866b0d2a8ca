"""Statistics of a few seeds: means, paired differences, intervals, tests, and the number of seeds for an effect."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bissl_zoo.errors import BisslZooError

#: of intervals; level and power of the test for which seeds are counted, and the largest number of them
CONFIDENCE, LEVEL, POWER, MOST = 0.95, 0.05, 0.8, 10_000
#: a spread below this share of the largest value is rounding error
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Summary:
    """Mean and spread of some values.

    Attributes:
        count: number of values.
        mean: their mean.
        std: sample standard deviation (n - 1); None for a single value.
        low, high: t confidence interval of the mean; None for a single value or values without spread.
    """

    count: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Summary):
    """Mean and spread of paired differences, with two-sided tests of a zero difference.

    Attributes:
        paired_p: p value of the paired t test, which removes the effect of the seed.
        welch_p: p value of Welch's t test, which is unpaired and allows unequal variances.

    Both are None if there are too few values or no spread.
    """

    paired_p: float | None
    welch_p: float | None

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, about the smallest detectable difference."""
        return None if self.high is None else self.high - self.mean


def summarize(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation and 95 % t interval of the mean.

    Raises:
        BisslZooError: there are no values, or a value is not finite.
    """
    array = _checked(values)
    count, mean = len(array), float(array.mean())
    if count == 1:
        return Summary(1, mean, None, None, None)
    if not _has_spread(array, np.abs(array).max()):
        return Summary(count, mean, 0.0, None, None)
    std = float(array.std(ddof=1))
    low, high = stats.t.interval(CONFIDENCE, count - 1, loc=mean, scale=std / math.sqrt(count))
    return Summary(count, mean, std, float(low), float(high))


def compare_paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Return statistics of `values - reference`, paired by seed.

    Raises:
        BisslZooError: the lengths differ, or as :func:`summarize`.
    """
    array, other = _checked(values), _checked(reference)
    if len(array) != len(other):
        raise BisslZooError(f"Paired values must have equal lengths, not {len(array)} and {len(other)}.")
    differences, size = array - other, max(np.abs(array).max(), np.abs(other).max())
    if not _has_spread(differences, size):
        # the remaining spread is rounding error, which a test would find significant
        differences = np.full_like(differences, differences.mean())
    summary = summarize(differences)
    paired_p = None
    if summary.std:
        statistic = abs(summary.mean) / (summary.std / math.sqrt(summary.count))
        paired_p = 2.0 * float(stats.t.sf(statistic, summary.count - 1))
    return Difference(**vars(summary), paired_p=paired_p, welch_p=_welch(array, other))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for several tests (Holm, Scand. J. Statist. 6, 1979); reject where they are < level.

    Args:
        p_values: of the tests of one family, in any order.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def equivalence_p(difference: Summary, margin: float) -> float | None:
    """Return the p value of two one-sided t tests (TOST; Schuirmann, 1987) that the mean lies within +- `margin`.

    A p value below the level shows that the two arms differ by less than the margin. None without spread or seeds.

    Raises:
        BisslZooError: the margin is not positive.
    """
    if not margin > 0:
        raise BisslZooError(f"The margin is {margin}; use a positive difference of the metric, such as 0.01.")
    if not difference.std:
        return None
    error = difference.std / math.sqrt(difference.count)
    return float(stats.t.sf((margin - abs(difference.mean)) / error, difference.count - 1))


def seeds_needed(std: float, effect: float) -> int | None:
    """Return the number of pairs with which a two-sided paired t test finds a mean difference with probability `POWER`.

    Args:
        std: standard deviation of the paired differences.
        effect: the difference to be found, of either sign.
    Returns:
        The smallest sufficient number, at least 2; None if it exceeds `MOST`.
    """

    def found(count: int) -> float:
        critical = stats.t.isf(LEVEL / 2, count - 1)
        return float(stats.nct.sf(critical, count - 1, abs(effect) / std * math.sqrt(count)))

    if std == 0:
        return 2
    low, high = 2, 2
    while found(high) < POWER:
        low, high = high, 2 * high
        if high > 2 * MOST:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= POWER else (middle + 1, high)
    return low if low <= MOST else None


def _welch(values: np.ndarray, reference: np.ndarray) -> float | None:
    first, second = ((s.mean, s.std, s.count) for s in (summarize(values), summarize(reference)))
    if not first[1] and not second[1]:
        return None
    return float(stats.ttest_ind_from_stats(*first, *second, equal_var=False).pvalue)


def _has_spread(values: np.ndarray, size: float) -> bool:
    return float(np.ptp(values)) > _ROUNDING * float(size)


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(list(values), dtype=np.float64)
    if not len(array):
        raise BisslZooError("There are no values to average.")
    if not np.isfinite(array).all():
        raise BisslZooError(f"Values to compare must be finite, not {array.tolist()}. Leave out failed runs.")
    return array
