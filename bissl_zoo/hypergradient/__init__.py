"""Solvers for the hypergradient system `(I + H / (lambda + damping)) x = v`; the package depends on torch alone.

A solver is a function of a linear operator and a flat vector: `solve(operator, v) -> Solution`. One that uses the
gradients of the lower steps has further methods, see `MFac` and `Sama`.
"""

from bissl_zoo.hypergradient.cg import ConjugateGradient
from bissl_zoo.hypergradient.damping import choose_shift
from bissl_zoo.hypergradient.direct import Exact, Identity
from bissl_zoo.hypergradient.gauss_newton import GaussNewtonOperator
from bissl_zoo.hypergradient.mfac import MFac
from bissl_zoo.hypergradient.minres import MinRes
from bissl_zoo.hypergradient.neumann import Neumann
from bissl_zoo.hypergradient.nystrom import Nystrom
from bissl_zoo.hypergradient.operator import CurvatureOperator, GraphOperator, frozen_state
from bissl_zoo.hypergradient.sama import Sama
from bissl_zoo.hypergradient.solver import DenseOperator, LinearOperator, Solution
from bissl_zoo.hypergradient.subspace import Subspace

__all__ = [
    "ConjugateGradient",
    "CurvatureOperator",
    "DenseOperator",
    "Exact",
    "GaussNewtonOperator",
    "GraphOperator",
    "Identity",
    "LinearOperator",
    "MFac",
    "MinRes",
    "Neumann",
    "Nystrom",
    "Sama",
    "Solution",
    "Subspace",
    "choose_shift",
    "frozen_state",
]
