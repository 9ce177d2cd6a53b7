"""What the table and the plot say of a piece, from its finished runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from fedpeft.significance import Interval, paired
from simulations._study.store import Run, Store
from simulations.compression._pieces import Piece
from simulations.compression._plans import Task


@dataclass(frozen=True, slots=True)
class Figures:
    """Scores of the task's metric by seed; bytes of all rounds and clients, mean over seeds.

    ``difference`` is that to ``raw``, seed by seed: ``None`` for ``raw``, and of one seed.
    """

    scores: tuple[float, ...]
    up_bytes: float
    float32_bytes: float
    difference: Interval | None
    refused: int

    @property
    def mean(self) -> float:
        """Return the mean score."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Return the standard deviation over seeds; 0 of one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def fewer(self) -> float:
        """Return how many times fewer bytes came up than the values take as float32."""
        return self.float32_bytes / self.up_bytes


def figures(store: Store, piece: Piece) -> Figures | None:
    """Return the figures of a piece; ``None`` where no run of it has finished."""
    runs = {seed: run for seed, run in store.best(piece).items() if seed in piece.seeds}
    if not runs:
        return None
    raw = {} if piece == piece.chooser else store.best(piece.chooser)
    shared = sorted({*runs} & {*raw})
    apart = [score(piece.task, runs[s]) - score(piece.task, raw[s]) for s in shared]
    kept = [runs[seed] for seed in sorted(runs)]
    return Figures(
        scores=tuple(score(piece.task, run) for run in kept),
        up_bytes=statistics.fmean(run["up_bytes"] for run in kept),
        float32_bytes=statistics.fmean(run["float32_bytes"] for run in kept),
        difference=paired(apart) if len(apart) > 1 else None,
        refused=sum(run["refused"] for run in kept),
    )


def score(task: Task, run: Run) -> float:
    """Return what counts of a run, in the task's unit."""
    return task.scale * float(run["metrics"][task.metric])
