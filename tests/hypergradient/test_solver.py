import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import Breaking, residual, rotated, system

from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator, Exact, MinRes, Neumann, Nystrom, Solution
from bissl_zoo.hypergradient.solver import power_of_two, relative_residual
from bissl_zoo.registry import SOLVERS

SIZE = 8
#: every solver with its defaults, and options that change the code path
VARIANTS = {name: SOLVERS.build(name) for name in SOLVERS.list()}
VARIANTS["cg blockwise"] = ConjugateGradient(blockwise=True)
VARIANTS["cg unchecked"] = ConjugateGradient(check=False)
VARIANTS["nystrom unchecked"] = Nystrom(check=False)
#: kind of system -> the statuses that a solver may report; "not_solved" is always allowed
STATUSES = {
    "definite": {"converged", "max_iterations"},
    "indefinite": {"converged", "max_iterations", "negative_curvature", "diverged"},
    "negative": {"converged", "max_iterations", "negative_curvature", "diverged"},
    "singular": {"converged", "max_iterations", "negative_curvature", "diverged", "singular"},
    "zero": {"negative_curvature", "singular"},
    "nan": {"non_finite"},
    "inf": {"non_finite"},
}


def matrix(kind):
    """Return the matrix `A` of a kind, rotated so that every product mixes all components."""
    diagonals = {
        "definite": [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4],
        "indefinite": [-3.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "negative": [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0],
        "singular": [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "zero": [0.0] * SIZE,
    }
    if kind in ("nan", "inf"):
        return torch.full((SIZE, SIZE), float(kind), dtype=torch.float64)
    return rotated(diagonals[kind], 0)


def right(seed=1):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", STATUSES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_system_has_a_finite_answer_a_true_residual_and_a_status(name, kind, dtype):
    a, v = matrix(kind).to(dtype), right().to(dtype)
    operator, solve = system(a), VARIANTS[name]
    for count in range(3):  # each solve starts with the subspace of the one before
        before = operator.products
        solution = solve(operator, v * (1.0 - 3.0 * count))
        assert isinstance(solution, Solution) and torch.isfinite(solution.x).all()
        assert solution.x.shape == v.shape and solution.x.dtype == dtype
        assert solution.products == operator.products - before
        blockwise = {"max_iterations"} if name == "cg blockwise" else set()  # it runs all iterations
        assert solution.status in STATUSES[kind] | {"not_solved"} | blockwise
        if solution.status == "not_solved" or not getattr(solve, "check", True):
            assert solution.residual is None or solution.status == "non_finite"
        elif solution.status == "non_finite":
            assert solution.residual == math.inf
        else:
            v_now = v * (1.0 - 3.0 * count)
            true = float((v_now - a @ solution.x).double().norm() / v_now.double().norm())
            assert solution.residual == pytest.approx(true, abs=1e-8 if dtype == torch.float64 else 1e-4)
            tolerance = getattr(solve, "tolerance", torch.finfo(dtype).eps ** 0.5)
            assert (solution.status == "converged") == (solution.residual <= tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_zero_is_answered_by_zero_without_a_product(name):
    operator = system(matrix("indefinite"))
    solution = VARIANTS[name](operator, torch.zeros(SIZE, dtype=torch.float64))
    assert not solution.x.any() and solution.products == operator.products == 0
    assert (solution.status, solution.residual) in [("converged", 0.0), ("not_solved", None)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_v_that_is_not_finite_is_answered_by_zero(name, bad):
    operator, v = system(matrix("definite")), right()
    v[3] = bad
    solution = VARIANTS[name](operator, v)
    assert not solution.x.any() and torch.isfinite(solution.x).all() and solution.status == "non_finite"
    assert solution.products == operator.products
    assert not operator.subspace.basis


@pytest.mark.parametrize("after", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("name", VARIANTS)
def test_products_that_become_not_finite_have_a_finite_answer(name, after):
    operator, v = Breaking(matrix("definite"), after), right()
    for _ in range(3):
        solution = VARIANTS[name](operator, v)
        assert torch.isfinite(solution.x).all()
        assert solution.status in {"non_finite", "converged", "max_iterations", "not_solved"}
        if solution.residual == math.inf:
            assert torch.equal(solution.x, v)
        elif solution.residual is not None:
            true = residual(torch.eye(SIZE, dtype=v.dtype) + operator.hessian, solution.x, v)
            assert solution.residual == pytest.approx(true, rel=1e-7, abs=1e-12)


@given(
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.sampled_from(sorted(VARIANTS)),
)
@settings(max_examples=100, deadline=None)
def test_the_answer_is_finite_whatever_comes_in(diagonal, v, name):
    operator = DenseOperator(torch.diag(torch.tensor(diagonal)))
    for _ in range(2):
        solution = VARIANTS[name](operator, torch.tensor(v))
        assert torch.isfinite(solution.x).all()
        assert solution.residual is None or not math.isnan(solution.residual)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_solution_that_overflows_its_dtype_is_replaced_by_v(name):
    operator, v = DenseOperator(-0.6 * torch.eye(3)), torch.full((3,), 3e38)  # x is 2.5 v
    solution = VARIANTS[name](operator, v)
    assert torch.equal(solution.x, v) and solution.status != "converged"


def test_the_operator_of_a_matrix_is_damped_and_counts():
    hessian, u = torch.tensor([[2.0, 1.0], [1.0, -4.0]]), torch.tensor([1.0, 2.0])
    operator = DenseOperator(hessian, shift=4.0)
    assert torch.equal(operator.hessian_product(u), torch.tensor([4.0, -7.0]))
    assert torch.equal(operator(u), torch.tensor([2.0, 0.25])) and operator.products == 2
    assert operator.block_sizes == [2] and DenseOperator(hessian, block_sizes=[1, 1]).block_sizes == [1, 1]


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="must be positive"):
        DenseOperator(torch.eye(2), shift)


def test_a_product_before_the_damping_is_chosen_is_refused():
    operator = DenseOperator(torch.eye(2), shift=None)
    assert torch.equal(operator.hessian_product(torch.ones(2)), torch.ones(2))
    with pytest.raises(RuntimeError, match="damping is not chosen"):
        operator(torch.ones(2))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool))
@settings(max_examples=50, deadline=None)
def test_the_power_of_two_leaves_every_digit(value):
    v = torch.tensor([value, value / 3])
    scale = power_of_two(v)
    assert math.frexp(float(scale))[0] == 0.5  # a power of two
    assert 0.5 <= float((v / scale).abs().max()) <= 2.0
    assert torch.equal(v / scale * scale, v)


def test_the_relative_residual_is_one_product():
    operator = DenseOperator(torch.eye(2), shift=1.0)
    assert relative_residual(operator, torch.tensor([0.5, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    assert operator.products == 1
    assert relative_residual(operator, torch.zeros(2), torch.zeros(2)) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_scale_of_v_does_not_matter(name, scale):
    a, v = matrix("definite").float(), right().float()
    reference, scaled = (VARIANTS[name](system(a, [5, 3]), v * s) for s in (1.0, scale))
    assert scaled.status == reference.status
    torch.testing.assert_close(scaled.x / scale, reference.x, rtol=1e-4, atol=1e-5)  # float32
    assert (scaled.residual or 0.0) == pytest.approx(reference.residual or 0.0, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("solver", "wrong"),
    [
        (MinRes, {"iterations": 0}),
        (MinRes, {"recycled_iterations": 0}),
        (MinRes, {"recycle": -1}),
        (Neumann, {"iterations": 0}),
        (Nystrom, {"rank": 0}),
    ],
)
def test_invalid_limits_are_refused_by_name(solver, wrong):
    with pytest.raises(ValueError, match=f"solver '{solver.__name__.lower()}'.*{next(iter(wrong))}"):
        solver(**wrong)


def test_exact_refuses_a_problem_above_its_size_limit():
    with pytest.raises(ValueError, match="11 x 11 matrix.*max_size=10"):
        Exact(max_size=10)(system(torch.eye(11)), torch.ones(11))
