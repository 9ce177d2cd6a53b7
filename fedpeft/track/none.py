"""Nobody besides the run's own folder, with its TensorBoard events."""

from __future__ import annotations

from fedpeft.spec import method
from fedpeft.types import Tracked


@method
class None_:
    """Tells nobody."""

    def open(self, run: Tracked) -> None:
        """Do nothing."""
