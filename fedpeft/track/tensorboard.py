"""TensorBoard events in the run's folder, which every run has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft.spec import method
from fedpeft.types import Tracked

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@method
class Tensorboard:
    """Writes scalars; ``tensorboard --logdir runs`` shows them."""

    def open(self, run: Tracked) -> Events:
        """Go on at the first round that is not done; later events are cut off."""
        from torch.utils.tensorboard import SummaryWriter

        first = len(run.history)
        return Events(SummaryWriter(str(run.folder), purge_step=first), first)


class Events:
    """An event file. Rounds before the ``first`` are in older ones."""

    def __init__(self, writer: SummaryWriter, first: int) -> None:
        self._writer, self._first = writer, first

    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a round."""
        if round < self._first:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self, *, done: bool) -> None:
        """End the writer's thread."""
        self._writer.close()
