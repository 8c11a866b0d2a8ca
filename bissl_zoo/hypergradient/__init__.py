"""Hypergradient solvers: pure functions of a linear operator. This package depends on torch alone."""

from bissl_zoo.hypergradient.cg import ConjugateGradient
from bissl_zoo.hypergradient.exact import Exact
from bissl_zoo.hypergradient.identity import Identity
from bissl_zoo.hypergradient.operator import CurvatureOperator, frozen_state
from bissl_zoo.hypergradient.solver import LinearOperator, Solution

SOLVERS = {"cg": ConjugateGradient, "exact": Exact, "identity": Identity}

__all__ = [
    "SOLVERS",
    "ConjugateGradient",
    "CurvatureOperator",
    "Exact",
    "Identity",
    "LinearOperator",
    "Solution",
    "frozen_state",
]
