"""Means, intervals and tests over seeds, against values worked out by hand and against scipy's own."""

import math

import numpy as np
import pytest
from scipy import stats

from bissl_zoo.errors import BisslZooError
from bissl_zoo.evaluation.statistics import (
    compare_paired,
    equivalence_p,
    holm,
    seeds_needed,
    summarize,
)

#: of Student's t, two-sided, 95 %, from a printed table
T_TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}


def draws(count=10, seed=0):
    generator = np.random.default_rng(seed)
    shared = generator.normal(0.5, 0.05, count)
    return shared + generator.normal(0.01, 0.01, count), shared


def test_mean_spread_and_interval_of_five_values_are_those_worked_out_by_hand():
    summary = summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (summary.count, summary.mean) == (5, 3.0)
    assert summary.std == pytest.approx(math.sqrt(10 / 4), abs=1e-12)
    half = T_TABLE[4] * math.sqrt(2.5) / math.sqrt(5)
    assert (summary.low, summary.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)


def test_the_paired_interval_is_its_closed_form():
    values, reference = [0.52, 0.55, 0.49], [0.50, 0.51, 0.48]  # differences 0.02, 0.04, 0.01
    difference = compare_paired(values, reference)
    mean = 0.07 / 3
    std = math.sqrt(((0.02 - mean) ** 2 + (0.04 - mean) ** 2 + (0.01 - mean) ** 2) / 2)
    assert difference.mean == pytest.approx(mean, abs=1e-12) and difference.std == pytest.approx(std, abs=1e-12)
    half = T_TABLE[2] * std / math.sqrt(3)
    assert (difference.low, difference.high) == pytest.approx((mean - half, mean + half), abs=2e-5)
    assert difference.half_width == pytest.approx(half, abs=2e-5)


def test_intervals_and_p_values_are_scipys():
    values, reference = draws()
    difference = compare_paired(values, reference)
    paired = stats.ttest_rel(values, reference)
    interval = paired.confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert difference.paired_p == pytest.approx(paired.pvalue, rel=1e-9)
    welch = stats.ttest_ind(values, reference, equal_var=False).pvalue
    assert difference.welch_p == pytest.approx(welch, rel=1e-9)


def test_one_seed_has_a_mean_and_nothing_else():
    summary = summarize([0.4])
    assert (summary.count, summary.mean, summary.std, summary.low, summary.high) == (1, 0.4, None, None, None)
    difference = compare_paired([0.4], [0.3])
    assert difference.mean == pytest.approx(0.1)
    assert (difference.std, difference.low, difference.paired_p, difference.welch_p) == (None, None, None, None)
    assert difference.half_width is None


def test_two_seeds_have_an_interval_of_thirteen_standard_errors():
    difference = compare_paired([0.52, 0.56], [0.50, 0.50])  # differences 0.02, 0.06: standard error 0.02
    assert difference.half_width == pytest.approx(T_TABLE[1] * 0.02, abs=1e-4)
    assert difference.paired_p == pytest.approx(1 - 2 * math.atan(2) / math.pi)  # t = 2 of a Cauchy


def test_differences_that_are_equal_but_for_rounding_are_no_certainty():
    values, reference = [0.3, 0.4, 0.8], [0.2, 0.3, 0.7]
    assert len({a - b for a, b in zip(values, reference, strict=True)}) > 1
    with pytest.warns(RuntimeWarning, match="nearly identical"):
        assert stats.ttest_rel(values, reference).pvalue < 1e-20
    difference = compare_paired(values, reference)
    assert difference.mean == pytest.approx(0.1)
    assert (difference.std, difference.low, difference.paired_p) == (0.0, None, None)
    assert difference.welch_p == pytest.approx(stats.ttest_ind(values, reference, equal_var=False).pvalue)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(BisslZooError, match="finite"):
        summarize([0.5, bad])
    with pytest.raises(BisslZooError, match="finite"):
        compare_paired([0.5, 0.6], [0.5, bad])


def test_invalid_inputs_are_refused():
    with pytest.raises(BisslZooError, match="equal lengths, not 2 and 1"):
        compare_paired([0.5, 0.6], [0.5])
    with pytest.raises(BisslZooError, match="no values"):
        summarize([])


def test_holms_adjusted_p_values_are_those_worked_out_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and never below the value before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize("shift", [0.0, 0.004, -0.02])
def test_equivalence_is_the_larger_of_scipys_two_one_sided_tests(shift):
    values, reference = draws()
    difference, margin = compare_paired(values + shift, reference), 0.015
    raw = values + shift - reference
    above = stats.ttest_1samp(raw, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(raw, margin, alternative="less").pvalue
    assert equivalence_p(difference, margin) == pytest.approx(max(above, below), rel=1e-9)


def test_equivalence_needs_a_positive_margin_and_a_spread():
    with pytest.raises(BisslZooError, match="margin"):
        equivalence_p(compare_paired([1.0, 2.0], [1.0, 1.5]), 0.0)
    assert equivalence_p(compare_paired([1.0], [0.9]), 0.1) is None


def test_the_number_of_seeds_gives_the_power_asked_for():
    # a printed table: effects of 1 and 0.5 standard deviations need 10 and 34 pairs at 5 % and a power of 0.8
    assert seeds_needed(1.0, 1.0) == 10
    assert seeds_needed(2.0, -1.0) == 34
    assert seeds_needed(1.0, 1e-6) is None and seeds_needed(0.0, 0.1) == 2
    generator = np.random.default_rng(0)
    samples = generator.normal(0.02, 0.025, (4000, seeds_needed(0.025, 0.02)))
    assert (stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.82, abs=0.04)
