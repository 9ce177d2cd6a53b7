"""Algebra of low-rank products ``B A``, which are never multiplied out while that costs more.

A sum of K products of rank r is one product of rank R = K r: the ``B`` side by side, the ``A`` on
top of each other. Norms and the singular value decomposition of an [m, n] product
then take O((m + n) R^2 + R^3) operations instead of O(m n min(m, n)). All in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.types import Shapes, Tensors

Matrix: TypeAlias = NDArray[np.float64]
SigmaTo: TypeAlias = Literal["B", "A", "split"]
"""Which factor gets the singular values: the same product, but other gradients afterwards."""

_A, _B = ".lora_A.weight", ".lora_B.weight"
_ROWS = 512
"""Rows that are multiplied at once where the result takes the place of a factor."""
_FOLD_A, _FOLD_B = ".fold_A", ".fold_B"


@dataclass(frozen=True, slots=True)
class Product:
    """``b @ a`` with ``b`` [m, R] and ``a`` [R, n]."""

    b: NDArray[np.floating]
    a: NDArray[np.floating]

    @property
    def rank(self) -> int:
        """The inner dimension R, which the rank of the product does not exceed."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [m, n] of the product."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def dense(self) -> Matrix:
        """Return the product itself [m, n]."""
        found: Matrix = np.asarray(self.b, np.float64) @ np.asarray(self.a, np.float64)
        return found


@dataclass(frozen=True, slots=True)
class Svd:
    """``(u * s) @ vt``: ``u`` [m, k] and ``vt`` [k, n] orthonormal, ``s`` [k] falling."""

    u: Matrix
    s: Matrix
    vt: Matrix


def modules(names: Iterable[str] | Shapes) -> list[str]:
    """Return the modules whose ``lora_A`` and ``lora_B`` are both among ``names``, sorted."""
    held = {*names}
    return sorted(
        name.removesuffix(_A)
        for name in held
        if name.endswith(_A) and name.removesuffix(_A) + _B in held
    )


def is_factor(name: str) -> bool:
    """Tell whether a tensor is a factor of some product, and not of a head."""
    return ".lora_" in name


def factors(module: str) -> tuple[str, str]:
    """Return the names of the module's ``A`` and ``B``."""
    return module + _A, module + _B


def product(tensors: Tensors, module: str) -> Product:
    """Return the product of a module."""
    a, b = factors(module)
    return Product(tensors[b], tensors[a])


def named(module: str, value: Product) -> Tensors:
    """Return the two factors as named float32 arrays."""
    a, b = factors(module)
    return {a: np.asarray(value.a, np.float32), b: np.asarray(value.b, np.float32)}


def folded_names(module: str) -> tuple[str, str]:
    """Return the names of the ``A`` and ``B`` of a product that is added to the module's weight."""
    return module + _FOLD_A, module + _FOLD_B


def folded_modules(names: Iterable[str]) -> list[str]:
    """Return the modules to whose weights a product is added, sorted."""
    return sorted(name.removesuffix(_FOLD_A) for name in names if name.endswith(_FOLD_A))


def folded(module: str, value: Product) -> Tensors:
    """Return a product that is added to the module's weight as named arrays."""
    a, b = folded_names(module)
    return {a: value.a, b: value.b}


def single(tensors: Tensors) -> Tensors:
    """Return the arrays as float32."""
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def fold_of(tensors: Tensors, module: str) -> Product:
    """Return the product that is added to the module's weight."""
    a, b = folded_names(module)
    return Product(tensors[b], tensors[a])


def is_matrix(value: Product) -> bool:
    """Tell whether ``a`` is the whole [m, n] matrix, beside a ``b`` [m, 0], and not a factor."""
    return bool(value.b.shape[1] == 0 and value.a.shape[0] > 0)


def total(parts: Sequence[tuple[float, Product]]) -> Product:
    """Return the weighted sum of products as one, in float64, the weights on ``A``."""
    rank = sum(part.rank for _, part in parts)
    rows, columns = parts[0][1].b.shape[0], parts[0][1].a.shape[1]
    b, a, start = np.empty((rows, rank), order="F"), np.empty((rank, columns)), 0
    for weight, part in parts:
        end = start + part.rank
        b[:, start:end] = part.b
        np.multiply(part.a, weight, out=a[start:end], dtype=np.float64)
        start = end
    return Product(b, a)


def norm(x: Product) -> float:
    """Return the Frobenius norm.

    By QR: a Gram matrix would lose half of the digits where terms cancel.
    """
    if x.rank >= min(x.b.shape[0], x.a.shape[1]):
        return float(np.linalg.norm(x.dense()))
    upper_b = np.asarray(np.linalg.qr(np.asarray(x.b, np.float64), mode="r"))
    upper_a = np.asarray(np.linalg.qr(np.asarray(x.a, np.float64).T, mode="r"))
    return float(np.linalg.norm(upper_b @ upper_a.T))


def svd(x: Product, rank: int | None = None, overwrite: bool = False) -> Svd:
    """Return the singular value decomposition: ``min(m, n, R)`` values, or the ``rank`` largest.

    QR of both factors, then a decomposition [R, R]; the product itself only where R is not below
    ``min(m, n)``. The largest entry of each left vector is positive, so that equal products give
    equal factors. ``overwrite`` leaves it free to do so in the memory of ``x``.
    """
    if x.rank >= min(x.b.shape[0], x.a.shape[1]):
        u, s, vt = np.linalg.svd(x.dense(), full_matrices=False)
        u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    else:
        basis_b, small = _qr(x.b, overwrite)
        basis_a, upper_a = _qr(x.a.T, overwrite)
        small = small @ upper_a.T
        del upper_a  # memory: what is held at once decides how large a cohort may be
        small_u, s, small_vt = np.linalg.svd(small)
        del small
        s, vt = s[:rank], _times(basis_a, small_vt[:rank].T).T
        del basis_a
        u = _times(basis_b, small_u[:, :rank])
    signs = np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(u.shape[1])])
    signs[signs == 0] = 1.0
    u *= signs
    vt *= signs[:, None]
    return Svd(u, s, vt)


def _qr(x: NDArray[np.floating], overwrite: bool) -> tuple[Matrix, Matrix]:
    """Return orthonormal columns and the upper triangle, in the memory of ``x`` or of one copy."""
    from scipy import linalg  # 0.3 s, for those who decompose something

    taken = (np.asarray if overwrite else np.array)(x, np.float64, order="F")
    basis, upper = linalg.qr(taken, overwrite_a=True, mode="economic", check_finite=False)
    return basis, upper


def _times(basis: Matrix, small: Matrix) -> Matrix:
    """Return ``basis @ small``, in the memory of ``basis`` where nearly all of it is needed."""
    kept = small.shape[1]
    if 2 * kept < basis.shape[1]:
        return np.asarray(basis @ small)
    for at in range(0, len(basis), _ROWS):
        basis[at : at + _ROWS, :kept] = basis[at : at + _ROWS] @ small
    return basis[:, :kept]


def compact(x: Product, overwrite: bool = False) -> Product:
    """Return the same product with as few ranks as it has, singular values split between both.

    ``overwrite`` leaves it free to do so in the memory of ``x``.
    """
    if not x.rank:
        return x
    found = svd(x, overwrite=overwrite)
    floor = max(x.b.shape[0], x.a.shape[1]) * np.finfo(np.float64).eps * found.s[0]
    return cut(found, int(np.sum(found.s > floor)), "split")


def within(found: Svd, energy: float) -> int:
    """Return how many singular values hold that share of the sum of their squares."""
    squares = np.cumsum(found.s**2)
    if not squares[-1]:
        return 0
    return min(int(np.searchsorted(squares, energy * squares[-1])) + 1, len(squares))


def cut(found: Svd, rank: int, sigma_to: SigmaTo = "B") -> Product:
    """Return the best product of ``rank`` (Eckart and Young 1936), filled up with zeros."""
    kept = min(rank, len(found.s))
    values = found.s[:kept]
    left = {"B": values, "A": np.ones(kept), "split": np.sqrt(values)}[sigma_to]
    right = {"B": np.ones(kept), "A": values, "split": np.sqrt(values)}[sigma_to]
    b = np.zeros((found.u.shape[0], rank))
    a = np.zeros((rank, found.vt.shape[1]))
    np.multiply(found.u[:, :kept], left, out=b[:, :kept])
    np.multiply(right[:, None], found.vt[:kept], out=a[:kept])
    return Product(b, a)
