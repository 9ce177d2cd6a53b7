"""The loop of a search: points are asked for, their runs made, and what came of them told.

Nothing is remembered beside the runs: each time a search is begun anew, and what is finished, or
has failed, is found in its folder. So it goes on where it stopped, at the same points, whenever
that was.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.durable import replace_file
from fedpeft.errors import PlanError, RunError
from fedpeft.json_lines import read_lines
from fedpeft.spec import nearest
from fedpeft.sweep.outcomes import Outcome, numbers
from fedpeft.sweep.running import Sweep
from fedpeft.sweep.search_file import SearchFile
from fedpeft.types import Trial

FAILED = "failed.jsonl"


class Failures(MutableMapping[str, str]):
    """What has failed in a sweep's folder, by the names of runs: a line of a file for each.

    A search does not try it again, because what it asked for afterwards depends on it.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / FAILED
        found = read_lines(self._path)
        if bad := [i for i, line in enumerate(found, 1) if not {"run", "problem"} <= line.keys()]:
            raise RunError(f"{self._path}:{bad[0]}: names no run and problem; take the line away")
        self._known = {str(line["run"]): str(line["problem"]) for line in found}

    def __getitem__(self, run: str) -> str:
        return self._known[run]

    def __setitem__(self, run: str, problem: str) -> None:
        told = {**self._known, run: problem}
        lines = [json.dumps({"run": r, "problem": p}) + "\n" for r, p in told.items()]
        replace_file(self._path, ["".join(lines).encode()], "result")
        self._known = told

    def __delitem__(self, run: str) -> None:
        raise RunError(f"{self._path}: what has failed is not forgotten; take its line away")

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


@dataclass(frozen=True, slots=True)
class Best:
    """The best trial: its number, its values, those of its goal by seed, and its runs."""

    trial: int
    values: Mapping[str, Any]
    scores: Sequence[float]
    runs: Sequence[str]

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.scores)

    def told(self, file: SearchFile) -> str:
        """Return what a person is told in the end."""
        values = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return (
            f"best: trial {self.trial}, {values}: {file.goal} {self.score:.4f}; "
            f"{', '.join(self.runs)}"
        )


def run_search(file: SearchFile, sweep: Sweep) -> list[Trial]:
    """Make every trial that is missing; return all of them in their order.

    Raises ``PlanError`` where results do not have the goal, ``RunError`` where the disk does not
    take a run: the search goes on there when it is called again.
    """
    search, told = file.search, list[Trial]()
    while len(told) < search.trials:
        points = search.ask(file.space, told, min(search.batch, search.trials - len(told)))
        each = [file.cells(len(told) + i, point) for i, point in enumerate(points)]
        outcomes = iter(sweep.run([cell for cells in each for cell in cells]))
        ended = [[next(outcomes) for _ in cells] for cells in each]
        if passing := [outcome.problem for many in ended for outcome in many if outcome.passing]:
            raise RunError(f"{passing[0]}; the search goes on there when it is run again")
        told += [_told(file, point, many) for point, many in zip(points, ended, strict=True)]
    return told


def best_of(file: SearchFile, trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> Best | None:
    """Return the best of all trials, the first of several; ``None`` where none has a value."""
    known = [(trial.value, -i) for i, trial in enumerate(trials) if trial.value is not None]
    if not known:
        return None
    sign = 1 if file.search.maximize else -1
    number = -max((sign * value, order) for value, order in known)[1]
    its = [outcome for outcome in outcomes if outcome.cell.values["trial"] == number]
    values = {k: v for k, v in its[0].cell.values.items() if k not in ("trial", "seed")}
    scores = [float(numbers(outcome.table)[file.goal]) for outcome in its]
    return Best(number, values, scores, [outcome.run for outcome in its])


def _told(file: SearchFile, point: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Trial:
    if problems := [outcome.problem for outcome in outcomes if outcome.problem]:
        return Trial(point, None, problems[0])
    scores = []
    for outcome in outcomes:
        known = numbers(outcome.table)
        score = known.get(file.goal)
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise PlanError(
                f"search: {outcome.run} has no {file.goal!r}{nearest(file.goal, sorted(known))}; "
                "what is finished is kept"
            )
        if not math.isfinite(score):
            return Trial(point, None, f"{file.goal} of {outcome.run} is not finite")
        scores.append(float(score))
    return Trial(point, statistics.fmean(scores))
