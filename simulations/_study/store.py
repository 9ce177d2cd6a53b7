"""Pieces of a study. Each has a results file, and a run in it is never repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedpeft.durable import replace_file
from fedpeft.errors import RunError
from fedpeft.spec import nearest

Run = dict[str, Any]
"""What is kept of one run: its rate as ``lr``, its ``seed``, ``metrics`` or a ``problem``."""
Play = Callable[[Mapping[str, Any], float, int], Run]
"""Makes the run of some settings with a rate and a seed."""


class Piece(Protocol):
    """One plan, but for the rate and the seed. Pieces can be compared and are keys."""

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what a run's result depends on beside its rate and seed."""
        ...

    @property
    def lacks(self) -> str:
        """Return why the package cannot run it; nothing where it can."""
        ...

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the rates that are tried on the first seed."""
        ...

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds that the best rate is to be run on."""
        ...

    @property
    def chooser(self) -> Piece:
        """Return the piece whose runs choose the rate: itself, if it tries any."""
        ...

    @property
    def stage(self) -> int:
        """Return when it runs: after all of lower stages, perhaps beside others of its own."""
        ...


_P = TypeVar("_P", bound=Piece)


class Store:
    """The results files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def runs(self, piece: Piece) -> list[Run]:
        """Return a piece's finished runs.

        Raises ``RunError`` where they had other settings, or the file is no results file.
        """
        path = self.folder / f"{piece.name}.json"
        if not path.exists():
            return []
        held = _read(path)
        if not piece.lacks and held["settings"] != piece.settings:
            now, then = piece.settings, held["settings"]
            other = [k for k in sorted({*now, *then}) if now.get(k) != then.get(k)]
            raise RunError(
                f"{path}: made with another {', '.join(other)} than now; move the file away, or "
                "restore what it was made with"
            )
        found: list[Run] = held["runs"]
        return found

    def keep(self, piece: Piece, run: Run) -> None:
        """Add a run to its piece's file, in place of one with the same rate and seed."""
        which = run["lr"], run["seed"]
        others = [r for r in self.runs(piece) if (r["lr"], r["seed"]) != which]
        runs = sorted([*others, run], key=lambda r: (r["seed"], r["lr"]))
        held = {"piece": piece.name, "settings": piece.settings, "runs": runs}
        text = json.dumps(held, indent=1, sort_keys=True) + "\n"
        replace_file(self.folder / f"{piece.name}.json", [text.encode()], "result")

    def rate(self, piece: Piece) -> float | None:
        """Return the rate that is best on the clients' held-out records under the first seed.

        By accuracy, where there is one, then by loss; of the piece's rates alone, since another
        that was tried besides may not have been for all. ``None`` before every rate was tried, or
        if none stayed finite.
        """
        chooser = piece.chooser
        own = [r for r in self.runs(chooser) if r["lr"] in chooser.rates]
        tried = [r for r in own if r["seed"] == chooser.seeds[0]]
        if not {*chooser.rates} <= {r["lr"] for r in tried}:
            return None
        finite = [r for r in tried if "metrics" in r]
        return float(max(finite, key=_quality)["lr"]) if finite else None

    def best(self, piece: Piece) -> dict[int, Run]:
        """Return the runs at the best rate that have metrics, by seed."""
        rate = self.rate(piece)
        runs = [r for r in self.runs(piece) if r["lr"] == rate and "metrics" in r]
        return {r["seed"]: r for r in runs}

    def scored(self, piece: Piece) -> list[Run]:
        """Return the runs at the best rate under the piece's seeds."""
        best = self.best(piece)
        return [best[seed] for seed in piece.seeds if seed in best]

    def next(self, piece: Piece) -> tuple[float, int] | None:
        """Return rate and seed of the next run that is missing and can be made, if any."""
        if piece.lacks:
            return None
        done = {(r["lr"], r["seed"]) for r in self.runs(piece)}
        wanted = [(lr, piece.seeds[0]) for lr in piece.rates]
        if (rate := self.rate(piece)) is not None:
            wanted += [(rate, seed) for seed in piece.seeds]
        return next((w for w in wanted if w not in done), None)

    def missing(self, piece: Piece) -> str:
        """Return what a piece lacks; nothing where it is complete."""
        if piece.lacks:
            return piece.lacks
        runs, rate = self.runs(piece), self.rate(piece)
        if piece.chooser != piece and rate is None:
            return f"the rate, which {piece.chooser.name} chooses"
        if not runs:
            return "not run"
        tried = {r["lr"] for r in runs if r["seed"] == piece.seeds[0]}
        if rates := [f"rate {lr:g}" for lr in piece.rates if lr not in tried]:
            return ", ".join(rates)
        best, failed = self.best(piece), {r["seed"] for r in runs if r["lr"] == rate}
        lacking = [s for s in piece.seeds if s not in best]
        return ", ".join(f"seed {s}" + (" (failed)" if s in failed else "") for s in lacking)


def advance(store: Store, piece: Piece, play: Play, on: Callable[[], bool]) -> Iterator[Run]:
    """Make a piece's missing runs while ``on()``, keeping each at once."""
    while on() and (wanted := store.next(piece)) is not None:
        run = play(piece.settings, *wanted)
        store.keep(piece, run)
        yield run


def missing(store: Store, wanted: Iterable[Piece]) -> dict[str, str]:
    """Return what each piece lacks that is not complete, by its name."""
    found = {piece.name: store.missing(piece) for piece in wanted}
    return {name: lacks for name, lacks in found.items() if lacks}


def named(pieces: Sequence[_P], name: str) -> _P:
    """Return the last piece of that name, which has all the seeds that anything wants of it.

    Raises ``RunError`` listing the names.
    """
    found = [piece for piece in pieces if piece.name == name]
    if not found:
        known = list(dict.fromkeys(piece.name for piece in pieces))
        raise RunError(f"there is no piece {name!r}{nearest(name, known)}")
    return found[-1]


def _read(path: Path) -> Mapping[str, Any]:
    """Return what a results file holds. Raises ``RunError`` where it is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(held["settings"], dict) and isinstance(held["runs"], list):
            return dict(held)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunError(f"{path}: is no results file, or a damaged one; move it away, or restore it")


def _quality(run: Run) -> tuple[float, float]:
    metrics = run["metrics"]
    return metrics.get("held/accuracy", 0.0), -metrics["held/loss"]
