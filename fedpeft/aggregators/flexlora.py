"""FlexLoRA: Fine-tuning of LLMs under Heterogeneous Tasks (Bai et al. 2024, arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from fedpeft import lowrank
from fedpeft.aggregators import _products
from fedpeft.aggregators._products import Parts
from fedpeft.lowrank import Product, SigmaTo
from fedpeft.spec import method
from fedpeft.types import Sent, Step, Update, Weights


@method
class FlexLora:
    """The weighted mean of the products, cut to the adapter's rank by its singular values.

    The mean is exact, the cut is the best of its rank, and so is what a client of lower rank is
    sent of it. ``sigma_to`` says which factor gets the singular values: ``B`` as in the released
    code, ``A``, or the square root to both (``split``). Where ranks differ, a mean in which clients
    lack the higher ones as if they were zero lowers these from round to round; with
    ``rank_normalise`` each rank is weighed by the clients that have it (raFLoRA, arXiv 2602.13486).
    Holds the factors of every update: K times the bytes of one.
    """

    sigma_to: SigmaTo = "B"
    rank_normalise: bool = False

    needs: ClassVar[Mapping[str, str]] = {"both-factors": _products.BOTH}
    refuses: ClassVar[Mapping[str, str]] = {"entrywise": _products.REPLACES}

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Decompose each module's sum of products without forming it."""

        def solve(parts: Parts, rank: int) -> Product:
            return lowrank.cut(lowrank.svd(lowrank.total(parts), rank), rank, self.sigma_to)

        return _products.refactored(updates, sent, weights, solve, self.rank_normalise)
