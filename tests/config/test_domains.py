"""Domains accept what they describe, and describe what they refuse."""

import math

import pytest

from bissl_zoo.config import domains as d

CASES = [
    (d.POSITIVE, [1, 0.5, 1e-9], [0, -1, math.nan, math.inf, "fast", None, True, [1]]),
    (d.NON_NEGATIVE, [0, 2.5], [-1e-9, "0", None]),
    (d.FRACTION, [0, 1, 0.3], [1.1, -0.1, math.nan]),
    (d.BELOW_ONE, [0, 0.999], [1, 2]),
    (d.SHARE, [1, 0.1], [0, 1.5]),
    (d.COUNT, [1, 10**9], [0, 1.0, True, "1", None]),
    (d.WHOLE, [0, 3], [-1, 0.0]),
    (d.PAIR, [2], [1, True]),
    (d.SEED, [0, 2**32 - 1], [2**32, 2**70, -1]),
    (d.FLAG, [True, False], [0, 1, "true"]),
    (d.NULL | d.COUNT, [None, 3], [0, "null"]),
    (d.choice("bce", None), ["bce", None], ["BCE", 0, False]),
    (d.choice(1, 2), [1, 2], [True, 1.0, 3]),
    (d.WIDTHS, [[256, 128], (3,)], [[], [0], "12", 5, [[1]], {1: 2}]),
    (d.sequence(d.SHARE, 2, ordered=True), [[0.1, 1.0], (0.5, 0.5)], [[0, 0], [1.0, 0.1], [0.1], [0.1, 0.2, 0.3]]),
]


@pytest.mark.parametrize("domain, accepted, refused", CASES, ids=[case[0].description for case in CASES])
def test_a_domain_accepts_and_refuses(domain, accepted, refused):
    assert [value for value in accepted if domain.problem(value)] == []
    assert [value for value in refused if not domain.problem(value)] == []
    assert all(domain.problem(value) == f"must be {domain.description}" for value in refused)
