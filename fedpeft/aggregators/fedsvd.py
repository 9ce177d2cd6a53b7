"""FedSVD: Adaptive Orthogonalization for Private Federated LoRA (Lee 2025, arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np

from fedpeft import lowrank
from fedpeft.aggregators import _products
from fedpeft.aggregators.mean import Mean
from fedpeft.lowrank import Product
from fedpeft.spec import method
from fedpeft.types import Sent, Step, Update, Weights


@method
class FedSvd:
    """The weighted mean of the factor that moved, then both made anew: ``A`` gets orthonormal rows.

    Exact, since the other factor is common to all clients; ``B`` gets the singular values. Once
    ``A`` is orthonormal, this is FFA-LoRA with that ``A`` under plain SGD: the rows of ``A`` only
    turn within their own space. A function of the weighted sum alone; memory of one update.
    """

    offers: ClassVar[Mapping[str, str]] = {
        **_products.REMAKES,
        "linear": "a function of the weighted sum alone",
    }
    needs: ClassVar[Mapping[str, str]] = {
        "both-factors": _products.BOTH,
        "one-factor": "needs a factor common to all clients; use lora(train='B', send='both')",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "entrywise": _products.REPLACES,
        "resting-ranks": _products.ALL_RANKS,
    }

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Average, then decompose each module's product by QR of its factors."""
        mean = Mean().reduce(updates, sent, weights)
        after = {**sent.still, **{k: v + mean.delta[k] for k, v in sent.moving.items()}}
        replaced: dict[str, np.ndarray] = {}
        for module in lowrank.modules(after):
            value = lowrank.product(after, module)
            if value.b.any() and value.a.any():
                value = lowrank.cut(lowrank.svd(value), value.rank)
            replaced |= lowrank.named(module, Product(value.b, value.a))
        return Step({k: v for k, v in mean.delta.items() if k not in replaced}, replaced)
