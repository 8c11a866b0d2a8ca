"""Directions and products of one symmetric matrix, kept between solves (Krylov subspace recycling)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: number of elements of a long vector that are summed at a time. In float32 on the CPU, `torch.linalg.vector_norm` of
#: 11 million numbers has an error of 4e-4, and a basis normalized with it is equally far from orthonormal.
_PART = 2**18


class Rows:
    """Growing list of flat `(P,)` vectors, stored in blocks so that matrix-vector products handle several at once."""

    _PER_BLOCK = 4  # appending allocates a new block and copies no earlier vector

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Return row `index`, a view."""
        index = range(self._count)[index]
        return self._blocks[index // self._PER_BLOCK][index % self._PER_BLOCK]

    def append(self, w: Tensor) -> None:
        """Append a copy of `w (P,)`."""
        if self._count == self._PER_BLOCK * len(self._blocks):
            self._blocks.append(w.new_empty(self._PER_BLOCK, len(w)))
        self._count += 1
        self[-1].copy_(w)

    def truncate(self, count: int) -> None:
        """Keep the first `count` rows."""
        self._count = min(count, self._count)
        del self._blocks[-(-self._count // self._PER_BLOCK) :]

    def dots(self, w: Tensor) -> Tensor:
        """Return the inner products of all m rows with `w (P,)`, then `w @ w`: `(m + 1,)`."""
        filled = self._filled()
        sums = [
            torch.cat([*(torch.mv(rows[:, part], w[part]) for rows in filled), torch.dot(w[part], w[part])[None]])
            for part in _parts(w)
        ]
        return torch.stack(sums).sum(dim=0)

    def add_to(self, w: Tensor, factors: Tensor) -> Tensor:
        """Add `sum_i factors[i] * row_i` to `w (P,)` in place and return `w`; `factors` is `(m,)`."""
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
    """Directions and the products of one symmetric matrix `H` with them, in the coordinates of an orthonormal basis.

    With the basis in the rows of `V (m, P)`, the directions are `V^T R` and their products `H V^T R = V^T K`, where
    `R (m, k)` has orthonormal columns: a Lanczos relation that several starting vectors may extend. `A = I + H/s` has
    the same relation with `R + K/s` for every `s`. The damping can therefore change without a new product, and the
    residual of any `x` in the space needs none. Keeping the space between right-hand sides is called recycling (Parks
    et al., SIAM J. Sci. Comput. 28, 2006; for symmetric matrices Wang, de Sturler and Paulino, IJNME 69, 2007).

    Attributes:
        basis: m orthonormal flat `(P,)` vectors, as rows.
        directions, images: `R` and `K`, `(m, k)` float64 on the CPU.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove all vectors; call it when the matrix changes."""
        self.basis = Rows()
        self.directions = torch.zeros(0, 0, dtype=torch.float64)
        self.images = torch.zeros(0, 0, dtype=torch.float64)
        self._marks: list[int] = []  # basis size after 1, 2, ... products

    @property
    def explored(self) -> int:
        """Number of directions with a known product, k."""
        return self.directions.shape[1]

    def coordinates(self, w: Tensor) -> Tensor:
        """Return the coordinates `(m,)`, float64, of `w (P,)`; its part outside the space becomes a new basis vector.

        If `w` is not finite, neither are the coordinates, and the basis is unchanged.
        """
        return self._absorb(w.clone())

    def combine(self, coordinates: Tensor) -> Tensor:
        """Return the flat `(P,)` vector with the given coordinates `(m,)`."""
        out = torch.zeros_like(self.basis[0])
        return self.basis.add_to(out, coordinates.to(out))

    def unexplored(self, *candidates: Tensor) -> Tensor | None:
        """Return the unit direction `(m,)` for the next product, or None if `H` maps the explored space into itself.

        It is the part of the first candidate `(m,)`, such as a residual, that is orthogonal to the explored directions.
        If that part vanishes, the next candidate is used, and finally the newest basis vector.
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
        """Compute `H` times the unit direction with the given coordinates `(m,)`, and add both.

        Returns:
            True if the product is finite; otherwise nothing is added.
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

    def minimal_residual(self, coordinates: Tensor, shift: float, absolute: bool = False) -> tuple[Tensor, Tensor]:
        """Minimize `||v - A x||` over the explored space, with `A = I + H / shift`.

        Args:
            coordinates: coordinates of `v`, `(m,)`.
            absolute: use absolute Ritz values, see :meth:`absolute_images`; then `||x|| <= ||v||`.
        Returns:
            Coordinates `(m,)` of `x` and of the residual `v - A x`.
        """
        coordinates = torch.nn.functional.pad(coordinates, (0, len(self.basis) - len(coordinates)))
        if not self.explored:
            return torch.zeros_like(coordinates), coordinates
        applied = self.directions + (self.absolute_images() if absolute else self.images) / shift
        # smaller singular values are rounding errors of the products; with them, the residual below would be wrong
        negligible = 100 * torch.finfo(self.basis[0].dtype).eps
        y = torch.linalg.lstsq(applied, coordinates[:, None], rcond=negligible, driver="gelsd").solution[:, 0]
        return self.directions @ y, coordinates - applied @ y

    def ritz_values(self) -> tuple[Tensor, Tensor]:
        """Return estimates of eigenvalues of `H`, ascending `(k,)`, and the residual norm of each, float64."""
        values, vectors = self._ritz_pairs()
        residuals = self.images @ vectors - self.directions @ vectors * values
        return values, residuals.norm(dim=0)

    def absolute_images(self) -> Tensor:
        """Return the products of the directions with `H + 2 sum |t| y y^T`, `(m, k)`.

        The sum is over the negative Ritz values `t` and their vectors `y`. On the explored space this matrix is `|H|`,
        which is positive semidefinite (saddle-free curvature, arXiv 1406.2572); if `H` is explored completely, it is
        `|H|` everywhere.
        """
        values, vectors = self._ritz_pairs(negative=True)
        return self.images - 2.0 * (self.directions @ (vectors * values)) @ vectors.T

    def add_reflection(self, product: Tensor, u: Tensor) -> Tensor:
        """Add `2 sum |t| y y^T u` of :meth:`absolute_images` to `product (P,)` in place and return it."""
        values, vectors = self._ritz_pairs(negative=True)
        if not len(values):
            return product
        inside = torch.tensor(self.basis.dots(u)[:-1].tolist(), dtype=torch.float64)
        ritz = self.directions @ vectors
        return self.basis.add_to(product, (ritz @ (-2.0 * values * (ritz.T @ inside))).to(product))

    def negative_share(self, x: Tensor) -> float:
        """Return the share of `||x||^2` of `x (P,)` that lies in directions of negative Ritz values."""
        negative = self.directions @ self._ritz_pairs(negative=True)[1]
        *inside, size = self.basis.dots(x).double().cpu()
        share = (negative.T @ torch.stack(inside)).square().sum() / size if size > 0 else torch.zeros(())
        return float(share)

    def _ritz_pairs(self, negative: bool = False) -> tuple[Tensor, Tensor]:
        """Return the Ritz values `(k,)`, ascending, or the negative ones, and their vectors in terms of directions."""
        projected = self.directions.T @ self.images
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        chosen = values < (0.0 if negative else math.inf)
        return values[chosen], vectors[:, chosen]

    def truncate(self, limit: int) -> None:
        """Keep the first products that fit into `limit` basis vectors."""
        if len(self.basis) <= limit:
            return
        products = sum(mark <= limit for mark in self._marks)
        size = self._marks[products - 1] if products else 0
        self.basis.truncate(size)
        self._marks = self._marks[:products]
        self.directions = self.directions[:size, :products].clone()
        self.images = self.images[:size, :products].clone()

    def _absorb(self, w: Tensor) -> Tensor:
        """Compute the coordinates of a vector and overwrite it, since long vectors are slow to allocate.

        Gram-Schmidt with one reorthogonalization if less than half of the norm remains, which is sufficient (Daniel et
        al., Math. Comp. 30, 1976; Giraud et al., Numer. Math. 101, 2005). Each pass needs one transfer to the host.
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
            row = self.directions.new_zeros(1, self.explored)
            self.directions, self.images = torch.cat([self.directions, row]), torch.cat([self.images, row])
        return coordinates
