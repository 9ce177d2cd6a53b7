"""LoRA-FA: Memory-efficient Low-rank Adaptation (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np

from fedpeft import lowrank
from fedpeft.aggregators.mean import Mean
from fedpeft.spec import method
from fedpeft.types import Sent, Step, Update, Weights

_SHIFT = 1e-8
"""Added to the diagonal of ``A A^T``, as PEFT does."""


@method
class LoraFa:
    """The weighted mean of the updates of ``B``, each times ``(A A^T)^-1``, at the server.

    A step of ``B`` along ``G A^T`` moves ``B A`` along ``G A^T A``, further where rows of ``A`` are
    long or alike; with the inverse it moves along ``G`` projected on the rows of ``A``. Of plain
    SGD this is ``plain(precondition=true)`` up to the factor ``1 / s^2``, which is the optimizer's
    to choose. Where a promise to clients adds noise to the sum, what comes after is
    post-processing: updates are clipped as they are, and signal and noise are multiplied alike. All
    that is no ``B`` is a weighted mean. A function of the weighted sum alone.
    """

    offers: ClassVar[Mapping[str, str]] = {"linear": "a function of the weighted sum alone"}
    needs: ClassVar[Mapping[str, str]] = {
        "fixed-a": "multiplies steps of B by a matrix that follows from A, so A must be fixed and "
        "common to all clients; use adapter: lora(train='B', send='both')",
        "sent-at-rest": "has to know A at the server; use adapter: lora(train='B', send='both')",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "mixed-ranks": "mixes all ranks of A; set ranks='' in the adapter, or use aggregator: mean"
    }

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Average, then multiply module by module in float64."""
        delta = dict(Mean().reduce(updates, sent, weights).delta)
        for module in lowrank.modules({**sent.still, **sent.moving}):
            a, b = lowrank.factors(module)
            rows = sent.still[a].astype(np.float64)
            gram = rows @ rows.T + _SHIFT * np.eye(len(rows))
            delta[b] = np.linalg.solve(gram, delta[b].T.astype(np.float64)).T.astype(np.float32)
        return Step(delta)
