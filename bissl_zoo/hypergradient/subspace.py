"""What is known of a symmetric matrix from the products made with it so far."""

from collections.abc import Callable

import torch
from torch import Tensor

#: elements of a long vector that are worked on at a time. Sums are made in such parts: in float32 on the CPU,
#: `torch.linalg.vector_norm` of 11 million numbers is off by 4e-4, and a basis scaled by it is as far from orthonormal.
_PART = 2**18


class Rows:
    """Flat `(P,)` vectors that grow in number, kept where matrix-vector products reach many of them at once."""

    _PER_BLOCK = 4  # so that growing copies nothing

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """The vector itself, not a copy."""
        index = range(self._count)[index]
        return self._blocks[index // self._PER_BLOCK][index % self._PER_BLOCK]

    def append(self, w: Tensor) -> None:
        """Add a copy of `w (P,)` as the last row."""
        if self._count == self._PER_BLOCK * len(self._blocks):
            self._blocks.append(w.new_empty(self._PER_BLOCK, len(w)))
        self._count += 1
        self[-1].copy_(w)

    def truncate(self, count: int) -> None:
        """Keep the first `count` rows."""
        self._count = min(count, self._count)
        del self._blocks[-(-self._count // self._PER_BLOCK) :]

    def dots(self, w: Tensor) -> Tensor:
        """Inner products with `w (P,)`, `(m,)`, and as the last one that of `w` with itself."""
        filled = self._filled()
        sums = [
            torch.cat([*(torch.mv(rows[:, part], w[part]) for rows in filled), torch.dot(w[part], w[part])[None]])
            for part in _parts(w)
        ]
        return torch.stack(sums).sum(dim=0)

    def add_to(self, w: Tensor, factors: Tensor) -> Tensor:
        """Add the sum of all rows, each times its factor `(m,)`, to `w (P,)` in place; returns `w`."""
        filled = self._filled()
        shares = factors.split([len(rows) for rows in filled])
        for part in _parts(w):
            for rows, share in zip(filled, shares, strict=True):
                w[part].addmv_(rows[:, part].T, share)
        return w

    def _filled(self) -> list[Tensor]:
        return [rows[: self._count - i * self._PER_BLOCK] for i, rows in enumerate(self._blocks)]


def _parts(w: Tensor) -> list[slice]:
    return [slice(start, start + _PART) for start in range(0, len(w), _PART)]


class Subspace:
    """Directions, and the products of one symmetric matrix `H` with them, in the coordinates of an orthonormal basis.

    With the basis in the rows of `V (m, P)`, the directions are `V^T R` and their products `H V^T R = V^T K`, where
    `R (m, k)` has orthonormal columns: a Lanczos relation that more than one starting vector may extend. `A = I + H/s`
    has the same relation with `R + K/s` for every `s`, so damping can be exchanged without a product, and the residual
    of any `x` in the space is known without one. Keeping it between right-hand sides is recycling (Parks et al., SIAM
    J. Sci. Comput. 28, 2006; for symmetric matrices Wang, de Sturler and Paulino, IJNME 69, 2007).

    Attributes:
        basis: m orthonormal flat `(P,)` vectors, as rows.
        directions, images: `R` and `K`, `(m, k)` float64 on the CPU.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, for a new matrix."""
        self.basis = Rows()
        self.directions = torch.zeros(0, 0, dtype=torch.float64)
        self.images = torch.zeros(0, 0, dtype=torch.float64)
        self._marks: list[int] = []  # size of the basis that the first 1, 2, ... products need

    @property
    def explored(self) -> int:
        """k, the number of directions whose product is known."""
        return self.directions.shape[1]

    def coordinates(self, w: Tensor) -> Tensor:
        """Coordinates `(m,)` float64 of `w (P,)`; what of it lies outside the space becomes a new basis vector.

        Returns:
            Coordinates, not finite where `w` is not; the basis is unchanged then.
        """
        return self._absorb(w.clone())

    def combine(self, coordinates: Tensor) -> Tensor:
        """The flat `(P,)` vector that has these coordinates `(m,)`."""
        out = torch.zeros_like(self.basis[0])
        return self.basis.add_to(out, coordinates.to(out))

    def unexplored(self, *candidates: Tensor) -> Tensor | None:
        """The unit direction `(m,)` to spend the next product on.

        It is the part of the first candidate `(m,)`, say a residual, on which the product is not known already; where
        nothing of it is left, of the next, and at last the newest basis vector; None when `H` maps the explored space
        into itself.
        """
        newest = torch.zeros(len(self.basis), dtype=torch.float64)
        newest[-1] = 1.0
        for candidate in (*candidates, newest):
            candidate = torch.nn.functional.pad(candidate, (0, len(newest) - len(candidate)))
            size = candidate.norm()
            for _ in range(2):
                candidate = candidate - self.directions @ (self.directions.T @ candidate)
            if candidate.norm() > 1e-6 * size:
                return candidate / candidate.norm()
        return None

    def explore(self, product: Callable[[Tensor], Tensor], direction: Tensor) -> bool:
        """Spend one product with `H` on the unit direction with these coordinates `(m,)`.

        Returns:
            Whether the product was finite; where it was not, nothing is added.
        """
        image = self._absorb(product(self.combine(direction)))
        if not torch.isfinite(image).all():
            return False
        size = len(self.basis)
        direction = torch.nn.functional.pad(direction, (0, size - len(direction)))
        self.directions = torch.cat([self.directions, direction[:, None]], dim=1)
        self.images = torch.cat([self.images, image[:, None]], dim=1)
        self._marks.append(size)
        return True

    def minimal_residual(self, coordinates: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        """The `x` in the explored space whose residual for `A x = v` is least.

        Args:
            coordinates: of v, `(m,)`.
        Returns:
            Coordinates `(m,)` of `x` and of the residual `v - A x`.
        """
        coordinates = torch.nn.functional.pad(coordinates, (0, len(self.basis) - len(coordinates)))
        if not self.explored:
            return torch.zeros_like(coordinates), coordinates
        applied = self.directions + self.images / shift
        # what is smaller is rounding of the products, and would make an `x` whose residual nobody knows
        negligible = 100 * torch.finfo(self.basis[0].dtype).eps
        y = torch.linalg.lstsq(applied, coordinates[:, None], rcond=negligible, driver="gelsd").solution[:, 0]
        return self.directions @ y, coordinates - applied @ y

    def ritz_values(self) -> tuple[Tensor, Tensor]:
        """Estimates of eigenvalues of `H`, ascending `(k,)`, and for each the norm of its residual, float64."""
        projected = self.directions.T @ self.images
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        residuals = self.images @ vectors - self.directions @ vectors * values
        return values, residuals.norm(dim=0)

    def truncate(self, limit: int) -> None:
        """Keep the first products, as many as `limit` basis vectors hold."""
        if len(self.basis) <= limit:
            return
        kept = sum(mark <= limit for mark in self._marks)
        size = self._marks[kept - 1] if kept else 0
        self.basis.truncate(size)
        self._marks = self._marks[:kept]
        self.directions = self.directions[:size, :kept].clone()
        self.images = self.images[:size, :kept].clone()

    def _absorb(self, w: Tensor) -> Tensor:
        """`coordinates` of a vector that may be overwritten: long vectors are slow to allocate.

        Gram-Schmidt, a second time where the first left less than half, which is enough (Daniel et al., Math. Comp. 30,
        1976; Giraud et al., Numer. Math. 101, 2005). One transfer to the host each time.
        """
        coordinates, size = torch.zeros(len(self.basis), dtype=torch.float64), None
        for _ in range(2):
            dots = self.basis.dots(w)
            self.basis.add_to(w, -dots[:-1])
            *inside, before, after = torch.cat([dots, Rows().dots(w)]).double().tolist()
            size, norm = before**0.5 if size is None else size, after**0.5
            coordinates += torch.tensor(inside, dtype=torch.float64)
            if not norm < 0.5 * size:
                break
        if norm <= 100 * torch.finfo(w.dtype).eps * size:
            return coordinates
        coordinates = torch.cat([coordinates, torch.tensor([norm], dtype=torch.float64)])
        if torch.isfinite(coordinates).all():
            self.basis.append(w.div_(norm))
            self.directions = torch.nn.functional.pad(self.directions, (0, 0, 0, 1))
            self.images = torch.nn.functional.pad(self.images, (0, 0, 0, 1))
        return coordinates
