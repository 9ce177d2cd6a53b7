"""A run folder as it is read afterwards: what was run, and what came of it so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.errors import RunError
from fedpeft.json_lines import mapping, read_lines
from fedpeft.plan import read_lines as read_plan_lines

_SPENT = {"epsilon": "epsilon of users", "epsilon_record": "epsilon of records"}


@dataclass(frozen=True, slots=True)
class PastRun:
    """A run, by the ``lines`` of its plan and how it stood when it was read.

    ``metrics`` are those of the last round that was evaluated, ``curves`` those of all, as pairs of
    a round, the first is 1, and a value. Bytes and ``seconds`` are of all rounds; ``None`` where
    the ledger does not tell them, as under a promise. ``spent`` is privacy, by whom it protects.
    """

    path: Path
    lines: Mapping[str, Any]
    rounds: int
    finished: bool
    metrics: Mapping[str, float]
    up_bytes: int | None
    down_bytes: int | None
    seconds: float | None
    spent: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    @property
    def megabytes(self) -> float | None:
        """What travelled both ways, for evaluation apart."""
        if self.up_bytes is None or self.down_bytes is None:
            return None
        return (self.up_bytes + self.down_bytes) / 1e6


def read_runs(paths: list[Path]) -> list[PastRun]:
    """Read run folders, or all those in a folder of runs.

    Raises ``RunError`` for a folder that is neither, or one whose files are damaged.
    """
    found = [run for path in paths for run in _runs_of(path)]
    if not found:
        raise RunError("no run was begun there; give run folders, or a folder of them")
    return found


def _runs_of(path: Path) -> Iterator[PastRun]:
    if not path.is_dir():
        raise RunError(f"{path}: no such folder")
    if (path / "run.json").exists():
        yield read_run(path)
        return
    below = [each for each in sorted(path.iterdir()) if (each / "run.json").exists()]
    if not below:
        raise RunError(f"{path}: is no run folder, and holds none")
    yield from map(read_run, below)


def read_run(path: Path) -> PastRun:
    """Read a run folder, also while it is being written. Raises ``RunError``."""
    history = read_lines(path / "rounds.jsonl")
    table = _table(path / "result.json")
    last = table.get("last") or _last_metrics(history)
    spent = history[-1] if history else {}
    return PastRun(
        path=path,
        lines=read_plan_lines(path / "plan.yaml"),
        rounds=len(history),
        finished=bool(table),
        metrics={name: value for name, value in last.items() if _is_number(value)},
        up_bytes=_total(history, "up_bytes"),
        down_bytes=_total(history, "down_bytes"),
        seconds=_total(history, "seconds"),
        spent={whom: spent[name] for name, whom in _SPENT.items() if _is_number(spent.get(name))},
        curves=_curves(history),
    )


def _total(history: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the sum over rounds; ``None`` where no round tells it."""
    told = [line[name] for line in history if _is_number(line.get(name))]
    return sum(told) if told else None


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(history, 1):
        for name, value in line.items():
            if (name == "loss" or "/" in name) and _is_number(value):
                found.setdefault(name, []).append((number, float(value)))
    return found


def _table(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    found = mapping(path.read_bytes())
    if found is None or not isinstance(found.get("last"), dict):
        raise RunError(f"{path}: is no final table of this version; take it away and say --resume")
    return found


def _last_metrics(history: list[dict[str, Any]]) -> Mapping[str, Any]:
    """Return the newest metrics of rounds, which have a place and a name: ``test/accuracy``."""
    for line in reversed(history):
        if found := {name: value for name, value in line.items() if "/" in name}:
            return found
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
