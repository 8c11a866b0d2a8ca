"""One sentence says what the hypergradient of a stage was."""

import pytest

from bissl_zoo.bilevel.summary import HypergradientSummary


def summary(cosines, ratios):
    result = HypergradientSummary()
    result.update({"solver/cos_xv": c, "solver/norm_ratio": r} for c, r in zip(cosines, ratios, strict=True))
    return result


@pytest.mark.parametrize(
    "cosines, ratios, words",
    [
        ([0.999, 0.99, 0.5], [1.0, 0.99, 0.7], ["joint training", "0.990"]),
        ([0.8] * 24, [0.9] * 2 + [1.5] * 22, ["negative curvature", "22 of 24"]),
        ([0.8] * 3, [0.7] * 3, ["37 degrees", "0.70"]),
        ([0.8] * 20, [0.7] * 18 + [1.2] * 2, ["37 degrees"]),
        ([1.0000001] * 2, [1.0] * 2, ["joint training"]),
    ],
)
def test_the_sentence_names_what_happened(cosines, ratios, words):
    assert all(word in summary(cosines, ratios).sentence() for word in words)


def test_undone_steps_count_nothing_and_the_state_is_restored():
    first = summary([0.9], [0.8])
    first.update([{}])
    second = HypergradientSummary()
    assert second.sentence() == ""
    second.load_state_dict(first.state_dict())
    second.update([{"solver/cos_xv": 0.7, "solver/norm_ratio": 0.8}])
    assert second.cosines == [0.9, 0.7] and first.cosines == [0.9]
