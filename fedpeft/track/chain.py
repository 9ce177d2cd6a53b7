"""Several trackers: ``mlflow(...) | wandb(...)``, or a list."""

from __future__ import annotations

from fedpeft.errors import SpecError
from fedpeft.spec import method
from fedpeft.types import Tracked, Tracker


@method
class Chain:
    """Each is told by itself: one that fails keeps nothing from the others."""

    stages: tuple[Tracker, ...]

    def check(self) -> None:
        """Raise ``SpecError`` for anything but trackers."""
        if not self.stages or not all(isinstance(stage, Tracker) for stage in self.stages):
            raise SpecError("chain: write mlflow(...) | wandb(...)")

    def open(self, run: Tracked) -> None:
        """Do nothing: its stages are opened one by one."""
