"""How many clients share a pass: said by the user, or measured on the plan's own records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from fedpeft.durable import replace_file
from fedpeft.engine._base import Stage
from fedpeft.errors import GroupError, RunError
from fedpeft.grouping import Grouping
from fedpeft.spec import bounded, method


@method
class Grouped:
    """What every engine that plays clients in groups can be told.

    ``group`` is how many clients may share a forward and backward pass: a number, or ``"auto"`` for
    the fastest that fits into ``memory`` (GB that a pass may take; by default half of what is
    free), measured on the plan's own records before the first round. With more than one, results
    differ by rounding from those of clients in turn. ``checkpointing`` computes the activations of
    the model's layers again in the backward pass: less memory, more time, the same result.
    """

    group: int | Literal["auto"] = bounded(default=1, low=1)
    memory: float | None = bounded(default=None, above=0)
    checkpointing: bool = False

    def made_with(self) -> dict[str, int | str]:
        """Return what decides the last bits of a run beside its plan."""
        return {"group": self.group}

    def check_device(self, device: str) -> None:
        """Take any device."""

    def grouping(self, stage: Stage, threads: int | None = None, workers: int = 1) -> Grouping:
        """Return which clients share a pass, by measuring where that was asked for.

        ``threads`` are those of a process that will train, of which there will be ``workers`` at
        once. What was measured, or did not fit into memory, is kept in the run folder, so that a
        resumed run repeats the same bits.
        """
        path = _path(stage)
        kept = _read(path) if path is not None and path.exists() else None
        if self.group != "auto":
            narrowed = kept is not None and not kept.costs and kept.width < self.group
            width = kept.width if kept is not None and narrowed else self.group
            return Grouping(width, checkpointing=self.checkpointing)
        if stage.site.plan.adapter.max_group == 1:
            stage.warn("clients train one at a time: this adapter has no stacked form")
            return Grouping(checkpointing=self.checkpointing)
        if kept is not None:
            return replace(kept, checkpointing=self.checkpointing)
        from fedpeft.engine._measure import measured

        if self.checkpointing:
            stage.site.attached.checkpoint()
        try:
            with _threads(threads):
                found = measured(stage.site, self.memory, workers)
            found = replace(found, checkpointing=self.checkpointing)
        except GroupError as error:
            stage.warn(f"clients train one at a time: {error}")
            found = Grouping(checkpointing=self.checkpointing)
        self.keep(stage, found)
        return found

    def keep(self, stage: Stage, grouping: Grouping) -> None:
        """Have a resumed run group its clients like this."""
        if path := _path(stage):
            replace_file(path, [json.dumps(asdict(grouping)).encode()], "plan")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Have torch work with another number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _path(stage: Stage) -> Path | None:
    return stage.folder / "grouping.json" if stage.folder else None


def _read(path: Path) -> Grouping:
    try:
        told = json.loads(path.read_bytes())
        costs = tuple((float(tokens), float(seconds)) for tokens, seconds in told["costs"])
        return Grouping(int(told["width"]), costs)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise RunError(f"{path}: damaged ({error}); start again in another folder") from None
