"""What a handful of seeds can say: means, paired differences, their intervals and tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bissl_zoo.errors import BisslZooError

#: of the largest value; a spread below it is that of rounding
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Summary:
    """Mean and spread of some values.

    Attributes:
        std: of the sample (n - 1); None of a single value.
        low, high: ends of the t interval of the mean; None of a single value and of values without spread, from which
            nothing can be inferred about others.
    """

    count: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Summary):
    """Mean and spread of paired differences, with two tests of no difference, both two-sided.

    Attributes:
        paired_p: of the paired t test, which takes out what a seed does to both sides.
        welch_p: of Welch's t test, which does not pair and assumes no equal variances.

    Either is None where it has too few values or no spread to work with.
    """

    paired_p: float | None
    welch_p: float | None

    @property
    def half_width(self) -> float | None:
        """Of the interval: about the smallest difference that would have shown."""
        return None if self.high is None else self.high - self.mean


def summarize(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, standard deviation and t interval of the mean.

    Raises:
        BisslZooError: no values, one that is not finite, or a confidence outside (0, 1).
    """
    array = _checked(values)
    if not 0.0 < confidence < 1.0:
        raise BisslZooError(f"The confidence is {confidence}; it lies between 0 and 1, such as 0.95.")
    count, mean = len(array), float(array.mean())
    if count == 1:
        return Summary(1, mean, None, None, None)
    if not _has_spread(array, np.abs(array).max()):
        return Summary(count, mean, 0.0, None, None)
    std = float(array.std(ddof=1))
    low, high = stats.t.interval(confidence, count - 1, loc=mean, scale=std / math.sqrt(count))
    return Summary(count, mean, std, float(low), float(high))


def compare_paired(values: Sequence[float], reference: Sequence[float], confidence: float = 0.95) -> Difference:
    """`values` less `reference`, the value of a seed with that of the same seed.

    Raises:
        BisslZooError: of different lengths, or as `summarize` does.
    """
    array, other = _checked(values), _checked(reference)
    if len(array) != len(other):
        raise BisslZooError(f"Paired values come in pairs: there are {len(array)} of the one and {len(other)}.")
    differences, size = array - other, max(np.abs(array).max(), np.abs(other).max())
    if not _has_spread(differences, size):
        # what is left of it is rounding, of which a test would make certainty
        differences = np.full_like(differences, differences.mean())
    summary = summarize(differences, confidence)
    paired_p = None
    if summary.std:
        statistic = abs(summary.mean) / (summary.std / math.sqrt(summary.count))
        paired_p = 2.0 * float(stats.t.sf(statistic, summary.count - 1))
    return Difference(**vars(summary), paired_p=paired_p, welch_p=_welch(array, other))


def _welch(values: np.ndarray, reference: np.ndarray) -> float | None:
    one, other = ((s.mean, s.std, s.count) for s in (summarize(values), summarize(reference)))
    if not one[1] and not other[1]:
        return None
    return float(stats.ttest_ind_from_stats(*one, *other, equal_var=False).pvalue)


def _has_spread(values: np.ndarray, size: float) -> bool:
    return float(np.ptp(values)) > _ROUNDING * float(size)


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(list(values), dtype=np.float64)
    if not len(array):
        raise BisslZooError("There are no values to take the mean of.")
    if not np.isfinite(array).all():
        raise BisslZooError(f"Values to compare must be finite; these are {array.tolist()}. Leave out what failed.")
    return array
