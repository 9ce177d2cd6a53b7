"""HetLoRA: Heterogeneous LoRA for Federated Fine-tuning (Cho et al. 2024, arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpeft import lowrank
from fedpeft.aggregators import _products
from fedpeft.lowrank import Matrix, Product
from fedpeft.spec import method
from fedpeft.types import Sent, Step, Update, Weights


@method
class HetLora:
    """Both factors averaged by the norms ``||B_k A_k||`` of what clients hold after training.

    Factors of lower rank are filled up with zeros. So row j of ``A`` and column j of ``B`` shrink
    in each round to the share ``omega_j`` of the clients that have them, and with them what the
    higher ranks have learned, by ``omega_j^2``: ``rank_normalise`` divides by that share instead,
    and leaves what nobody has. Norms are those of single modules; with weightings other than
    ``uniform`` they multiply the weights. All that is no pair of factors is a weighted mean.

    A share of clients that did not reply counts as what was sent. The paper's penalty on the last
    ranks, and the clients' own pruning of them, are left out. Memory of one update.
    """

    rank_normalise: bool = False

    needs: ClassVar[Mapping[str, str]] = {
        "both-factors": "weighs clients by the norms of their products, so they must be sent both "
        "factors; use adapter: lora(train='A,B') or lora(train='B', send='both')"
    }

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Add up in the order given."""
        received = {**sent.still, **sent.moving}
        sums = {m: _Sum.of(lowrank.product(received, m)) for m in lowrank.modules(received)}
        paired = {name for module in sums for name in lowrank.factors(module)}
        total = dict[str, Matrix]()
        total |= {k: np.zeros(v.shape) for k, v in sent.moving.items() if k not in paired}
        replied = 0.0
        for update in updates:
            share, own = update.weight / weights.denominator, update.sent or sent
            held = {**own.still, **own.moving}
            replied += share
            for module, found in sums.items():
                found.add(share, _products.trained(update.delta, held, module))
            for name, value in total.items():
                value += share * update.delta[name].astype(np.float64)
        for module, found in sums.items():
            made = found.moved(replied, self.rank_normalise)
            pair = zip(lowrank.factors(module), (made.a, made.b), strict=True)
            total |= {k: np.asarray(v, np.float64) for k, v in pair if k in sent.moving}
        return Step({k: total[k].astype(np.float32) for k in sent.moving})


@dataclass(slots=True)
class _Sum:
    """Running sums of one module; ``by_rank`` [r] are the weights of those who have each rank."""

    before: Product
    a: Matrix
    b: Matrix
    by_rank: Matrix

    @classmethod
    def of(cls, before: Product) -> _Sum:
        return cls(
            before, np.zeros(before.a.shape), np.zeros(before.b.shape), np.zeros(before.rank)
        )

    def add(self, share: float, part: Product) -> None:
        """Add a client's factors, weighed by the norm of their product."""
        weight = share * lowrank.norm(part)
        self.a[: part.rank] += weight * part.a.astype(np.float64)
        self.b[:, : part.rank] += weight * part.b.astype(np.float64)
        self.by_rank[: part.rank] += weight

    def moved(self, replied: float, normalise: bool) -> Product:
        """Return how far the factors move; not at all while all products are zero."""
        most = float(self.by_rank[0])
        divisor = np.where(normalise, self.by_rank, most)
        known = divisor > 0
        divisor = np.where(known, divisor, 1)
        a = np.where(known[:, None], self.a / divisor[:, None] - self.before.a, 0)
        b = np.where(known, self.b / divisor - self.before.b, 0)
        return Product(replied * b, replied * a)
