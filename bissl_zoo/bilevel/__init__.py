"""The bilevel problem of BiSSL: two levels coupled through the backbone, solved by alternation (arXiv 2410.02387)."""

from bissl_zoo import hypergradient
from bissl_zoo.bilevel.algorithm import Adaptation, BiLevel, UpperGradients, refuse_sync_batch_norm
from bissl_zoo.bilevel.level import Level
from bissl_zoo.registry import SOLVERS

# registered here and not in their files, since `hypergradient` depends on torch alone
SOLVERS.register("cg")(hypergradient.ConjugateGradient)
SOLVERS.register("minres")(hypergradient.MinRes)
SOLVERS.register("neumann")(hypergradient.Neumann)
SOLVERS.register("nystrom")(hypergradient.Nystrom)
SOLVERS.register("mfac")(hypergradient.MFac)
SOLVERS.register("sama")(hypergradient.Sama)
SOLVERS.register("exact")(hypergradient.Exact)
SOLVERS.register("identity")(hypergradient.Identity)

__all__ = ["Adaptation", "BiLevel", "Level", "UpperGradients", "refuse_sync_batch_norm"]
