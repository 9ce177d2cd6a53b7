"""Edits of the frozen base that aggregators make: one low-rank product per module, ever longer.

The weight of a module is the pristine one plus ``scale * B A``, with the adapter's scale, ``A``
[rank, n] and ``B`` [m, rank]. A round appends to both. What it appends is decomposed first, its
singular values split between both factors: no longer than its rank, and nobody's own factors. So
whoever holds the edits of an earlier round misses a tail only. A product that has become as long as
the matrix [m, n] it stands for is kept as that matrix, in the place of ``A`` beside a ``B`` [m, 0],
and sent as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedpeft import lowrank
from fedpeft.errors import WireError
from fedpeft.lowrank import Product
from fedpeft.tensors import is_finite
from fedpeft.types import Shapes, Tensors

_AT = "at"
"""In what is sent: how many ranks of each module the receiver has and keeps, int32."""


@dataclass(frozen=True, slots=True)
class Fold:
    """All edits so far, float32, by the names of :func:`lowrank.folded`.

    ``ranks`` maps a round to how many ranks of each module its broadcast brought a client to, as
    far as they are still the first ones here.
    """

    tensors: Tensors = field(default_factory=dict)
    ranks: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, shapes: Shapes) -> Fold:
        """Return no edits of the modules whose factors ``shapes`` names, as before round 0."""
        sizes = _sizes(shapes)
        return cls(
            _named((k, _nothing(m, n)) for k, (m, n) in sizes.items()), {0: (0,) * len(sizes)}
        )

    @property
    def modules(self) -> list[str]:
        """The modules, in the order of their ranks."""
        return lowrank.folded_modules(self.tensors)

    def plus(self, step: dict[str, np.ndarray], round: int, known: Collection[int]) -> Fold:
        """Append a step, for the broadcast of ``round``.

        Takes the arrays out of ``step`` and writes over them: it is all that a large cohort fills.
        ``known`` are the earlier rounds whose broadcast some client holds.
        """
        found = dict[str, Product]()
        kept = {t: list(ranks) for t, ranks in self.ranks.items() if t in known}
        for at, module in enumerate(self.modules):
            found[module] = _longer(lowrank.fold_of(self.tensors, module), step, module)
            if lowrank.is_matrix(found[module]):
                for ranks in kept.values():
                    ranks[at] = 0
        now = [0 if lowrank.is_matrix(value) else value.rank for value in found.values()]
        return Fold(_named(found.items()), {**kept, round: now})

    def held(self, round: int) -> tuple[int, ...]:
        """Return how many ranks are still the same for whoever got the broadcast of ``round``."""
        return tuple(self.ranks.get(round, (0,) * len(self.modules)))

    def since(self, held: Sequence[int]) -> Tensors:
        """Return what a client that has ``held`` ranks misses, for :func:`assembled`."""
        tails = dict[str, Product]()
        for module, rank in zip(self.modules, held, strict=True):
            value = lowrank.fold_of(self.tensors, module)
            tails[module] = Product(value.b[:, rank:], value.a[rank:])
        return {_AT: np.array(held, np.int32), **_named(tails.items())}

    def spared(self, held: Sequence[int]) -> int:
        """Return the bytes of what a client with ``held`` ranks does not miss."""
        values = (lowrank.fold_of(self.tensors, module) for module in self.modules)
        pairs = zip(values, held, strict=True)
        return sum(4 * rank * (v.b.shape[0] + v.a.shape[1]) for v, rank in pairs)


def grown(shapes: Shapes, growth: int, rounds: int, missed: float) -> float:
    """Return the most bytes of edits that a client misses after so many ``rounds``.

    Each adds ``growth`` ranks to every module; the client has ``missed`` of them, on average.
    """
    found = 0.0
    for m, n in _sizes(shapes).values():
        pair = _is_shorter(rounds * growth, m, n)
        found += 4 * (min(missed, rounds) * growth * (m + n) if pair else m * n)
    return found


def longest(shapes: Shapes) -> Shapes:
    """Return the names of what is sent, each with the largest shape that any of it may have."""
    sizes = _sizes(shapes)
    found: dict[str, tuple[int, ...]] = {_AT: (len(sizes),)}
    for module, (m, n) in sizes.items():
        a, b = lowrank.folded_names(module)
        found |= {a: (m, n), b: (m, 0)}
    return found


def assembled(came: Tensors, held: Tensors, shapes: Shapes) -> Tensors:
    """Return all edits: what a client ``held`` of them, and what ``came``.

    Where nothing is held of a module, its arrays are those that came. Raises ``WireError`` for
    anything that does not continue what is held, or is not of the modules of ``shapes``.
    """
    sizes = _sizes(shapes)
    if list(came) != list(longest(shapes)) or came[_AT].shape != (len(sizes),):
        raise WireError("edits of the base are not of the modules of this plan")
    edits = {name: value for name, value in came.items() if name != _AT}
    if came[_AT].dtype != np.int32 or any(v.dtype != np.float32 for v in edits.values()):
        raise WireError("edits of the base are not float32")
    if not is_finite(edits):
        raise WireError("edits of the base are not finite")
    found = dict[str, Product]()
    for (module, (m, n)), rank in zip(sizes.items(), came[_AT].tolist(), strict=True):
        new, own = lowrank.fold_of(came, module), _nothing(m, n)
        if rank and lowrank.folded_names(module)[0] in held:
            own = lowrank.fold_of(held, module)
        if not 0 <= rank <= min(own.rank, own.b.shape[-1]):
            raise WireError(f"edit of {module} follows rank {rank}, {own.b.shape[-1]} are held")
        more = new.b.shape[-1] if new.b.ndim == 2 else -1
        matrix = new.a.shape == (m, n) and more == 0 and new.b.shape == (m, 0) and not rank
        pair = (new.b.shape, new.a.shape) == ((m, more), (more, n))
        if not matrix and not (pair and _is_shorter(rank + more, m, n)):
            raise WireError(f"edit of {module} does not have the shape of its weight ({m} x {n})")
        found[module] = _joined(own, rank, new) if rank else new
    return _named(found.items())


def _longer(held: Product, step: dict[str, np.ndarray], module: str) -> Product:
    """Append what ``step`` has of a module, which it then lacks; keep the shorter of both forms."""
    a, b = lowrank.folded_names(module)
    if a not in step or b not in step:
        return held
    new, (m, n) = Product(step.pop(b), step.pop(a)), (held.b.shape[0], held.a.shape[1])
    if not lowrank.is_matrix(held) and _is_shorter(new.rank, m, n):
        new = lowrank.compact(new, overwrite=True)
        if _is_shorter(held.rank + new.rank, m, n):
            return _joined(held, held.rank, Product(new.b.astype("f4"), new.a.astype("f4")))
    total = new.dense() + (held.a if lowrank.is_matrix(held) else held.dense())
    return Product(np.zeros((m, 0), np.float32), total.astype(np.float32))


def _joined(first: Product, rank: int, then: Product) -> Product:
    b, a = [first.b[:, :rank], then.b], [first.a[:rank], then.a]
    return Product(np.concatenate(b, axis=1), np.concatenate(a))


def _is_shorter(rank: int, m: int, n: int) -> bool:
    return rank * (m + n) < m * n


def _nothing(m: int, n: int) -> Product:
    return Product(np.zeros((m, 0), np.float32), np.zeros((0, n), np.float32))


def _named(values: Iterable[tuple[str, Product]]) -> Tensors:
    return {k: v for module, value in values for k, v in lowrank.folded(module, value).items()}


def _sizes(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return the shape [m, n] of each module's weight, sorted by module."""
    pairs = {module: lowrank.factors(module) for module in lowrank.modules(shapes)}
    return {module: (shapes[b][0], shapes[a][1]) for module, (a, b) in pairs.items()}
