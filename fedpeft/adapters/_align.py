"""Factors turned towards those that were sent: FedRot-LoRA (Zhang et al. 2026, arXiv 2602.23638).

``B A = (B R)(R^T A)`` for every rotation ``R``, so clients that learn the same may send factors
that cancel out when they are averaged. Each turns its own towards what all were sent.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft import lowrank
from fedpeft.lowrank import Matrix, Product
from fedpeft.types import Tensors


def aligned(trained: Tensors, received: Tensors, to: Literal["A", "B"], strength: float) -> Tensors:
    """Return ``trained`` with the factors of each module turned; their product stays.

    ``to`` is the factor that is brought near to the one ``received``, and ``strength`` in (0, 1]
    how far. Where either of the two is zero there is nothing to turn to, and where training
    diverged nothing to turn.
    """
    found = dict(trained)
    for module in lowrank.modules(trained):
        own, sent = lowrank.product(trained, module), lowrank.product(received, module)
        overlap = _times(own.a, sent.a.T) if to == "A" else _times(own.b.T, sent.b)
        if not overlap.any() or not np.isfinite(overlap).all():
            continue
        turn = softened(rotation(overlap), strength)
        found |= lowrank.named(module, Product(_times(own.b, turn), _times(turn.T, own.a)))
    return found


def rotation(overlap: Matrix) -> Matrix:
    """Return the rotation ``R`` [r, r] of determinant +1 that maximises ``<R, overlap>``.

    With ``overlap = A A_ref^T`` or ``B^T B_ref`` that is the one that brings ``R^T A`` nearest to
    ``A_ref``, or ``B R`` to ``B_ref`` (orthogonal Procrustes problem).
    """
    u, _, vt = np.linalg.svd(overlap)
    if np.linalg.det(u) * np.linalg.det(vt) < 0:
        vt[-1] *= -1
    return np.asarray(u @ vt)


def softened(turn: Matrix, strength: float) -> Matrix:
    """Return the orthogonal matrix nearest to ``(1 - strength) I + strength turn``."""
    u, _, vt = np.linalg.svd((1 - strength) * np.eye(len(turn)) + strength * turn)
    return np.asarray(u @ vt)


def _times(x: NDArray[Any], y: NDArray[Any]) -> Matrix:
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64)
