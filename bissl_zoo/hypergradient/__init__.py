"""Hypergradient solvers: pure functions of a linear operator. This package depends on torch alone."""

from bissl_zoo.hypergradient.cg import ConjugateGradient
from bissl_zoo.hypergradient.damping import choose_shift, definite_shift
from bissl_zoo.hypergradient.exact import Exact
from bissl_zoo.hypergradient.identity import Identity
from bissl_zoo.hypergradient.minres import MinRes
from bissl_zoo.hypergradient.neumann import Neumann
from bissl_zoo.hypergradient.nystrom import Nystrom
from bissl_zoo.hypergradient.operator import CurvatureOperator, frozen_state
from bissl_zoo.hypergradient.solver import DenseOperator, LinearOperator, Solution
from bissl_zoo.hypergradient.subspace import Subspace

__all__ = [
    "ConjugateGradient",
    "CurvatureOperator",
    "DenseOperator",
    "Exact",
    "Identity",
    "LinearOperator",
    "MinRes",
    "Neumann",
    "Nystrom",
    "Solution",
    "Subspace",
    "choose_shift",
    "definite_shift",
    "frozen_state",
]
