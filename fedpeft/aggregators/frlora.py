"""FRLoRA: Federated Residual Low-Rank Adaption (Yan et al. 2025, OpenReview e0rQRMUhs7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from fedpeft import lowrank
from fedpeft.aggregators import _products
from fedpeft.lowrank import Matrix, Product
from fedpeft.spec import method
from fedpeft.types import Sent, Step, Update, Weights


@method
class Frlora:
    """The product of the mean factors is added to the base, from round to round of higher rank.

    Like the mean of factors it is not the mean of the products, but a client is sent ``r`` ranks a
    round. All begin a round with the same factors: drawn anew, where the paper takes the principal
    singular vectors of the weights. A client that did not reply counts as what it began with. A
    function of weighted sums alone; memory of one update.
    """

    offers: ClassVar[Mapping[str, str]] = {
        **_products.EDITS,
        "linear": "a function of the weighted sum alone",
    }
    needs: ClassVar[Mapping[str, str]] = {
        "folds": _products.FOLDS,
        "both-factors": _products.BOTH,
        "common-start": "averages factors that all began from the same ones; "
        "use adapter: lora(fresh='round')",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "mixed-ranks": "averages factors of one rank; set ranks='' in the adapter, or use "
        "aggregator: stack",
    }

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Add up in the order given, then multiply the means."""
        rest = {name: np.zeros(value.shape) for name, value in sent.moving.items()}
        moved, begun = dict[str, Matrix](), sent
        for update in updates:
            begun, share = update.sent or sent, update.weight / weights.denominator
            for name, value in update.delta.items():
                total = rest if name in rest else moved
                total[name] = total.get(name, 0) + share * value.astype(np.float64)
        start = {**begun.still, **begun.moving}
        fold = dict[str, np.ndarray]()
        for module in lowrank.modules(start) if moved else []:
            a, b = (start[name] + moved.get(name, 0) for name in lowrank.factors(module))
            fold |= lowrank.folded(module, Product(b, a))
        return Step({k: v.astype(np.float32) for k, v in rest.items()}, fold=fold)

    def growth(self, ranks: Sequence[int]) -> int:
        """Return the rank."""
        return max(ranks, default=0)
