"""What makes a piece's missing runs, in this process or in one of several.

Not in ``__main__``: processes that are spawned cannot import a package's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from fedpeft.errors import PlanError
from simulations.lora_methods import _pieces, _plans
from simulations.lora_methods._pieces import Piece, Store
from simulations.lora_methods._runs import Run


def advance(store: Store, piece: Piece, end: float) -> bool:
    """Make the runs that are missing until ``end``; True where the piece cannot be run."""
    try:
        for run in _pieces.advance(store, piece, _play, lambda: time.time() < end):
            told = run.get("problem") or ", ".join(
                f"{k} {run['metrics'][k]:.4f}" for k in ("test/accuracy", "held/accuracy")
            )
            print(f"{piece.name} lr={run['lr']:g} seed={run['seed']}: {told}", flush=True)
    except PlanError as error:  # one method that does not fit must not cost the others
        print(f"{piece.name}: {error}", file=sys.stderr)
        return True
    return False


def _play(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    from simulations.lora_methods._runs import play

    return play(_plans.plan_of(given, lr, seed), lr)
