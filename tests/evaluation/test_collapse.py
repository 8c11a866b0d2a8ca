"""The collapse monitors against closed forms and direct sums."""

import math

import numpy as np
import pytest
import torch

from bissl_zoo.errors import BisslZooError
from bissl_zoo.evaluation.probes import effective_rank, normalized_std


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_orthonormal_set_has_the_rank_of_its_dimension():
    basis = torch.linalg.qr(gaussian(16, 16).double()).Q
    for embeddings in (torch.eye(16), basis, 7 * basis, torch.eye(16).repeat(3, 1)):
        assert effective_rank(embeddings) == pytest.approx(16, rel=1e-6)
    assert effective_rank(torch.eye(16)[:5]) == pytest.approx(5, rel=1e-6)


def test_a_constant_set_has_rank_1_and_no_deviation():
    constant = gaussian(1, 32).expand(100, 32)
    assert effective_rank(constant) == pytest.approx(1, abs=1e-9)
    assert normalized_std(constant) == pytest.approx(0, abs=1e-12)
    assert effective_rank(torch.zeros(10, 4)) == 1.0 and normalized_std(torch.zeros(10, 4)) == 0.0


def test_the_rank_is_equation_1_of_rankme():
    embeddings = gaussian(300, 40) * torch.logspace(0, -3, 40)
    values = np.linalg.svd(embeddings.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7  # the paper's epsilon, which is worth less than 1e-7 * 40 * log(1e7)
    assert effective_rank(embeddings) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_the_deviation_is_that_of_a_direct_computation_and_1_for_a_gaussian():
    embeddings = gaussian(500, 24) + torch.arange(24) / 10
    unit = embeddings.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert normalized_std(embeddings) == pytest.approx(unit.std(axis=0).mean() * math.sqrt(24), rel=1e-12)
    # of N = 4000 samples, the mean over 64 deviations is known to 1 / sqrt(2 * 4000 * 64), a thousandth
    assert normalized_std(gaussian(4000, 64)) == pytest.approx(1, abs=0.01)
    # one-hot vectors: each dimension has mean 1/D and mean square 1/D
    assert normalized_std(torch.eye(10)) == pytest.approx(math.sqrt(1 - 1 / 10), rel=1e-12)


@pytest.mark.parametrize(
    ("embeddings", "message"), [([[1.0, math.nan]], "NaN or infinite"), ([1.0], r"must be \(N, D\)")]
)
def test_what_cannot_be_measured_is_refused(embeddings, message):
    for metric in (effective_rank, normalized_std):
        with pytest.raises(BisslZooError, match=message):
            metric(torch.tensor(embeddings))
