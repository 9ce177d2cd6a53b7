"""Edits of the base and an adapter beside them as one longer adapter, which PEFT can load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedpeft import lowrank
from fedpeft.lowrank import Product
from fedpeft.types import Tensors


def joined(tensors: Tensors) -> tuple[Tensors, Mapping[str, int]]:
    """Return the tensors with all edits in the factors, and the rank of each edited module.

    A product that is zero is left out, unless nothing else is there.
    """
    found = {k: v for k, v in tensors.items() if not k.endswith((".fold_A", ".fold_B"))}
    ranks = dict[str, int]()
    for module in lowrank.folded_modules(tensors):
        edit, own = lowrank.fold_of(tensors, module), lowrank.product(tensors, module)
        if not edit.a.shape[0]:
            continue
        if lowrank.is_matrix(edit):
            edit = _factored(edit.a)
        if own.b.any() and own.a.any():
            edit = Product(np.hstack([edit.b, own.b]), np.vstack([edit.a, own.a]))
        found |= lowrank.named(module, edit)
        ranks[module] = edit.rank
    return found, ranks


def patterns(ranks: Mapping[str, int], scale: float, *, rslora: bool) -> dict[str, Any]:
    """Return what PEFT's configuration says of modules whose ranks differ from the adapter's."""
    alphas = {m: scale * (math.sqrt(r) if rslora else r) for m, r in ranks.items()}
    return {"rank_pattern": dict(ranks), "alpha_pattern": alphas} if ranks else {}


def _factored(matrix: np.ndarray) -> Product:
    """Return a matrix [m, n] as a product of rank ``min(m, n)``: one of the factors is 1."""
    m, n = matrix.shape
    one = np.eye(min(m, n), dtype=np.float32)
    return Product(one, matrix) if m <= n else Product(matrix, one)
