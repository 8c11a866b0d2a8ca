"""Symmetry, spectrum, comparison and recommendation on known matrices, against NumPy."""

import numpy as np
import pytest
import torch

from bissl_zoo.analysis.solver_diagnosis import Row, recommend, solve_all, spectrum, sufficient_shift, symmetry_error
from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator, Identity, MinRes

SIZE, LAM = 40, 0.01


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(values, seed=0):
    q, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("share", [0.0, 1.0, 0.1])
def test_the_symmetry_error_is_that_of_its_definition(share):
    matrix = symmetric(torch.linspace(-3, 20, SIZE)) + share * draw(SIZE, SIZE, seed=3)
    u, w = draw(SIZE, seed=1), draw(SIZE, seed=2)
    error = symmetry_error(DenseOperator(matrix), u, w)
    expected = abs(u @ matrix @ w - w @ matrix @ u) / (u.norm() * (matrix @ w).norm())
    assert error == pytest.approx(float(expected), rel=1e-12, abs=1e-14)
    assert (error > 1e-2 / SIZE**0.5) == (share > 0)  # what the tool allows


def test_lanczos_finds_the_ends_of_the_spectrum_within_its_bounds():
    matrix = symmetric(np.concatenate([[-7.0], np.linspace(0, 5, SIZE - 2), [50.0]]))
    expected = np.linalg.eigvalsh(matrix.numpy())
    values, bounds = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=10)
    assert values[0] == pytest.approx(expected[0], abs=1e-6) and values[-1] == pytest.approx(expected[-1], abs=1e-6)
    for value, bound in zip(values, bounds, strict=True):
        assert np.abs(expected - float(value)).min() <= float(bound) + 1e-9


def test_an_eigenvalue_that_the_right_hand_side_is_orthogonal_to_is_found():
    values = torch.linspace(1, 2, SIZE, dtype=torch.float64)
    values[0] = -30.0
    v = torch.ones(SIZE, dtype=torch.float64)
    v[0] = 0.0  # an exact eigenvector is missing from v
    assert spectrum(DenseOperator(torch.diag(values)), v, steps=10)[0][0] == pytest.approx(-30.0, abs=1e-6)


@pytest.mark.parametrize(("entry", "v", "message"), [(1.0, 0.0, "zero"), (torch.nan, 1.0, "not finite")])
def test_a_system_without_a_spectrum_is_refused(entry, v, message):
    with pytest.raises(ValueError, match=message):
        spectrum(DenseOperator(torch.full((3, 3), entry)), torch.full((3,), v), steps=2)


@pytest.mark.parametrize("solver", [MinRes(SIZE, 1e-9), ConjugateGradient(SIZE, 1e-9), Identity()], ids=repr)
def test_a_row_holds_the_largest_residual_and_the_turn_of_the_solution(solver):
    matrix, vs = symmetric(torch.linspace(0, 20, SIZE)), [draw(SIZE, seed=seed) for seed in (1, 2, 3)]
    operator = DenseOperator(matrix)
    fields = solve_all(operator, 5.0, solver, vs, LAM, LAM)
    a = np.eye(SIZE) + matrix.numpy() / 5.0
    xs = [v.numpy() if isinstance(solver, Identity) else np.linalg.solve(a, v.numpy()) for v in vs]
    residuals = [np.linalg.norm(v.numpy() - a @ x) / np.linalg.norm(v) for v, x in zip(vs, xs, strict=True)]
    cosines = [x @ v.numpy() / np.linalg.norm(x) / np.linalg.norm(v) for v, x in zip(vs, xs, strict=True)]
    assert fields["residual"] == pytest.approx(max(residuals), abs=1e-8) and fields["damping"] == 5.0 - LAM
    assert fields["cos_xv"] == pytest.approx(np.median(cosines), abs=1e-6)
    assert fields["norm_ratio"] == pytest.approx(
        max(np.linalg.norm(x) / np.linalg.norm(v) for v, x in zip(vs, xs, strict=True)), abs=1e-6
    )
    assert operator.subspace.explored == 0


def test_damping_that_is_chosen_counts_its_products_and_solves():
    operator = DenseOperator(symmetric(torch.linspace(-30, 60, SIZE)))
    vs = [draw(SIZE, seed=1), draw(SIZE, seed=2)]
    fields = solve_all(operator, None, MinRes(6, 0.05), vs, LAM, 0.5)
    assert fields["products"] == operator.products and fields["residual"] <= 0.05 and fields["norm_ratio"] <= 1.0
    assert solve_all(operator, None, Identity(), vs, LAM, 0.5)["products"] == 0


def test_the_sufficient_shift_lets_the_solve_reach_its_tolerance():
    operator, v = DenseOperator(symmetric(torch.linspace(0, 200, SIZE))), draw(SIZE, seed=1)
    operator.shift = sufficient_shift(operator, v, 5, 0.05, LAM)
    assert operator.shift > LAM and MinRes(5, 0.05)(operator, v).status == "converged"
    operator.shift *= 0.9
    operator.subspace.clear()
    assert MinRes(5, 0.05)(operator, v).status == "max_iterations"


def row(solver, curvature="gauss_newton", residual=0.01, cos_xv=0.8, norm_ratio=0.9, time=2.0):
    return Row(curvature, solver, 1.0, 4, residual, cos_xv, norm_ratio, "converged", 1.0, time)


IDENTITY = row("identity", residual=3.0, cos_xv=1.0, time=1.0)


@pytest.mark.parametrize(
    ("rows", "expected", "words"),
    [
        ([row("cg"), row("minres", time=1.5), IDENTITY], "minres", "37 degrees"),
        ([row("cg", cos_xv=0.99), row("minres", cos_xv=0.985), IDENTITY], "identity", "at least 0.985"),
        ([row("minres", norm_ratio=1.4, time=1.1), row("cg", "hessian"), IDENTITY], "cg", "Hessian"),
        ([row("minres", residual=0.3), row("cg", residual=0.2), IDENTITY], None, "0.2 of cg"),
        ([row("minres", residual=float("nan")), IDENTITY], None, "No solver"),
    ],
)
def test_the_fastest_solver_that_solves_and_turns_the_gradient_is_recommended(rows, expected, words):
    best, reason = recommend(rows, 0.05)
    assert (best and best.solver) == expected and words in reason
