"""M-FAC: curvature from the gradients of the lower steps, without any product."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import LinearOperator, Solution

logger = logging.getLogger(__name__)

#: number of elements of a long vector that are summed at a time, which bounds rounding errors in float32
_PART = 2**18


@dataclass(eq=False)
class MFac:
    """Return `x = (I + F / lambda)^-1 v` with the empirical Fisher matrix `F = 1/m sum g g^T` (arXiv 2107.03356).

    `g` are the gradients of the pretext loss alone, without the pull, in the last m lower steps, which compute them
    anyway. `F` is block diagonal. With the rows `G (m, P)` of a block the inverse is exactly
    `x = v - G^T (lambda m I + G G^T)^-1 G v`: one matrix product per alternation, where the recursion of the paper
    makes m dependent passes over the same m^2 P operations. An upper step takes 2 m P.

    Args:
        gradients: m, number of gradients; each is a vector of length P in memory.
        blocks: a block for each parameter "tensor"; for each "layer", which has all parameters with the same name up to
            its last number, such as `blocks.3`, or of the same module if there is none; or one for "all".
        store: "device" keeps the gradients where the parameters are, "cpu" in host memory.
        damping: delta, added to lambda; the method needs none.
    """

    gradients: int = 20
    blocks: Literal["tensor", "layer", "all"] = "layer"
    store: Literal["device", "cpu"] = "device"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.gradients < 1:
            raise ValueError(f"solver 'mfac': gradients={self.gradients} must be at least 1.")
        for key, known in (("blocks", ("tensor", "layer", "all")), ("store", ("device", "cpu"))):
            if getattr(self, key) not in known:
                raise ValueError(f"solver 'mfac': {key}={getattr(self, key)!r}; use {' or '.join(known)}.")
        self._rows: Tensor | None = None  # (m, P); a new gradient replaces the oldest one
        self._filled = self._next = self._kept = 0
        self._segments: list[tuple[int, slice]] = []  # block number and range in a flat vector
        self._shift: float | None = None
        self._inverse: Tensor | None = None  # of `lambda m I + G G^T`, (blocks, m, m) float64 on the CPU

    def start_alternation(self, lower_steps: int) -> None:
        """Remove the gradients that the next `lower_steps` will replace; checkpoints need not hold them."""
        self._kept = max(0, self.gradients - lower_steps)
        self.load_state_dict(self.state_dict())

    def observe_lower_gradient(self, gradients: Mapping[str, Tensor]) -> None:
        """Store the gradient of the pretext loss in the backbone's parameters, by name and equal on all ranks."""
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients.values()])
        if self._rows is None:
            self._rows = flat.new_empty(self.gradients, len(flat), device="cpu")
        self._rows = self._rows.to("cpu" if self.store == "cpu" else flat.device)
        if not self._segments:
            self._segments = list(_segments(gradients, self.blocks))
        self._append(flat)

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients that the next alternation will use, `(n, P)` from old to new, or None."""
        count = min(self._kept, self._filled)
        order = [(self._next - count + number) % self.gradients for number in range(count)]
        return {"gradients": self._rows[order] if count else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the gradients of `state_dict`."""
        self._filled = self._next = 0
        rows = state["gradients"]
        if rows is not None and self._rows is None:
            self._rows = rows.new_empty(self.gradients, rows.shape[1])
        for row in () if rows is None else rows:
            self._append(row)

    def _append(self, flat: Tensor) -> None:
        self._rows[self._next].copy_(flat)
        self._next = (self._next + 1) % self.gradients
        self._filled = min(self._filled + 1, self.gradients)
        self._inverse = None

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Return `x` for `v (P,)` and lambda + damping of the operator; no product, no residual.

        The solution is `v` without gradients, and zero if `v` is not finite. Gradients that are not finite are removed.
        """
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), None, 0, "non_finite")
        if self._filled and (self._inverse is None or operator.shift != self._shift):
            self._shift, self._inverse = operator.shift, self._invert(operator.shift)
        if not self._filled:
            return Solution(v, None, 0, "not_solved")
        rows = self._rows[: self._filled]
        x = v.to(rows.device, copy=True)
        dots = torch.stack([rows[:, part] @ x[part] for _, part in self._segments]).double().cpu()
        factors = torch.einsum("bij,bj->bi", self._inverse, self._per_block(dots)).to(rows)
        for block, part in self._segments:
            x[part].addmv_(rows[:, part].T, factors[block], alpha=-1.0)
        x = x.to(v.device)
        if not torch.isfinite(x).all():
            return Solution(v, None, 0, "non_finite")
        return Solution(x, None, 0, "not_solved")

    def _invert(self, shift: float) -> Tensor:
        rows = self._rows[: self._filled]
        grams = self._per_block(torch.stack([rows[:, p] @ rows[:, p].T for _, p in self._segments]).double().cpu())
        finite = grams.diagonal(dim1=1, dim2=2).isfinite().all(dim=0)
        if not finite.all():
            removed = int((~finite).sum())
            logger.warning(f"mfac: {removed} of {self._filled} gradients are not finite and are not used.")
            self.load_state_dict({"gradients": rows[finite.to(rows.device)]})
            return self._invert(shift) if self._filled else grams
        values, vectors = torch.linalg.eigh(grams)
        # rounding makes eigenvalues of a Gram matrix negative, which would exceed a small lambda
        weights = 1.0 / (shift * self._filled + values.clamp(min=0.0))
        return vectors * weights[:, None, :] @ vectors.mT

    def _per_block(self, parts: Tensor) -> Tensor:
        """Sum values `(segments, ...)` by block: `(blocks, ...)`."""
        numbers = torch.tensor([block for block, _ in self._segments])
        return parts.new_zeros(1 + int(numbers.max()), *parts.shape[1:]).index_add_(0, numbers, parts)


def _segments(gradients: Mapping[str, Tensor], blocks: str) -> Iterator[tuple[int, slice]]:
    """Yield block number and range of each parameter in a flat vector, cut into parts."""
    numbers: dict[str, int] = {}
    start = 0
    for name, gradient in gradients.items():
        layer = re.match(r"(?:.*\.)?\d+(?=\.)", name)
        keys = {"tensor": name, "layer": layer[0] if layer else name.rpartition(".")[0] or name, "all": ""}
        block = numbers.setdefault(keys[blocks], len(numbers))
        end = start + gradient.numel()
        for part in range(start, end, _PART):
            yield block, slice(part, min(part + _PART, end))
        start = end
