"""Fine-tuning at the client, for evaluation (Wang et al. 2019, arXiv 1910.10252)."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedpeft.spec import bounded, method
from fedpeft.types import Personal, Trainer


@method
class Tuned(Personal):
    """Before an evaluation each client fine-tunes what it was sent on its training records.

    Nothing is kept, and the federation never sees it. The plan's trainer does it, with ``steps``
    and ``lr`` in the place of its own where they are given: by default a round's work. Its schedule
    runs over the tuning alone.
    """

    steps: int | None = bounded(default=None, low=1)
    lr: float | None = bounded(default=None, above=0)

    when: ClassVar[Literal["never", "rounds", "evaluation"]] = "evaluation"

    def trainer(self, trainer: Trainer) -> Trainer:
        """Return the plan's trainer with these steps and this rate."""
        return trainer.but(self.steps, self.lr)
