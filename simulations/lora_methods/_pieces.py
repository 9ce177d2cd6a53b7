"""Pieces: a method with so many clients. Each has a results file; a run in it is never repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.durable import replace_file
from fedpeft.errors import RunError
from simulations.lora_methods import _plans
from simulations.lora_methods._plans import CENTRAL, CLIENTS, KNOWN, METHODS, VARIANTS, Scale
from simulations.lora_methods._runs import Run

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Piece:
    """A method, how many clients, and whether a contrast wants more seeds of it."""

    method: str
    clients: int
    contrast: bool = False

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        return f"{self.method}_{self.clients}"


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two methods whose order papers dispute; ``claims`` is what they say of ``left``."""

    left: str
    right: str
    claims: str


CONTRASTS = (
    Contrast("ffa_lora", "fedit", "better with many clients or skew, worse with few near iid"),
    Contrast("rolora", "fedit", "better with 50 clients, no gap with 3 (RoLoRA)"),
    Contrast("flora", "fedit", "at least as good (FLoRA); far worse with few local steps (FedSVD)"),
    Contrast("lora_fair_lam0", "fedit", "worse (LoRA-FAIR)"),
    Contrast("lora_fair_lam0", "lora_fair", "worse (LoRA-FAIR)"),
    Contrast("fedsvd", "ffa_orthonormal", "better (FedSVD, of FFA at one rate)"),
)


class Store:
    """The results files of one folder."""

    def __init__(self, folder: Path, scale: Scale = _plans.FULL) -> None:
        self.folder, self.scale = folder, scale

    def runs(self, piece: Piece) -> list[Run]:
        """Return a piece's finished runs. Raises ``RunError`` where they had other settings."""
        path = self.folder / f"{piece.name}.json"
        if not path.exists():
            return []
        held = json.loads(path.read_text(encoding="utf-8"))
        if _plans.available(piece.method) and held["settings"] != self.settings(piece):
            now, then = self.settings(piece), held["settings"]
            other = [k for k in sorted({*now, *then}) if now.get(k) != then.get(k)]
            raise RunError(
                f"{path}: made with another {', '.join(other)} than now; move the file away, or "
                "restore what it was made with"
            )
        found: list[Run] = held["runs"]
        return found

    def settings(self, piece: Piece) -> dict[str, Any]:
        """Return what a run's result depends on beside its rate and seed."""
        return _plans.lines(piece.method, piece.clients, self.scale)

    def keep(self, piece: Piece, run: Run) -> None:
        """Add a run to its piece's file."""
        runs = sorted([*self.runs(piece), run], key=lambda r: (r["seed"], r["lr"]))
        held = {"piece": piece.name, "settings": self.settings(piece), "runs": runs}
        text = json.dumps(held, indent=1, sort_keys=True) + "\n"
        replace_file(self.folder / f"{piece.name}.json", [text.encode()], "result")

    def rate(self, piece: Piece) -> float | None:
        """Return the rate that is best on the clients' held-out records under the first seed.

        Ties go to the lower loss. ``None`` before every rate was tried, or if none stayed finite.
        """
        tried = [r for r in self.runs(piece) if r["seed"] == self.scale.seeds[0]]
        if not {*self.scale.rates} <= {r["lr"] for r in tried}:
            return None
        finite = [r for r in tried if "metrics" in r]
        if not finite:
            return None
        keys = ("held/accuracy", "held/loss")
        best = max(finite, key=lambda r: (r["metrics"][keys[0]], -r["metrics"][keys[1]]))
        return float(best["lr"])

    def seeds(self, piece: Piece) -> tuple[int, ...]:
        """Return the seeds that the best rate is to be run on."""
        return self.scale.more_seeds if piece.contrast else self.scale.seeds

    def best(self, piece: Piece) -> dict[int, Run]:
        """Return the runs at the best rate that have metrics, by seed."""
        rate = self.rate(piece)
        runs = [r for r in self.runs(piece) if r["lr"] == rate and "metrics" in r]
        return {r["seed"]: r for r in runs}

    def scored(self, piece: Piece) -> list[Run]:
        """Return the runs at the best rate under the table's seeds."""
        best = self.best(piece)
        return [best[seed] for seed in self.scale.seeds if seed in best]

    def next(self, piece: Piece) -> tuple[float, int] | None:
        """Return rate and seed of the next run that is missing, if any."""
        if not _plans.available(piece.method):
            return None
        done = {(r["lr"], r["seed"]) for r in self.runs(piece)}
        wanted = [(lr, self.scale.seeds[0]) for lr in self.scale.rates]
        if (rate := self.rate(piece)) is not None:
            wanted += [(rate, seed) for seed in self.seeds(piece)]
        return next((w for w in wanted if w not in done), None)


def pieces() -> list[Piece]:
    """Return all pieces in the order in which they run."""
    first, rest = METHODS[:6], METHODS[6:]
    found = [Piece(m.name, clients) for clients in CLIENTS for m in first]
    found += [Piece(CENTRAL, clients) for clients in CLIENTS]
    found += [Piece(m.name, clients) for clients in CLIENTS for m in rest]
    found += [Piece(m.name, clients) for clients in CLIENTS for m in VARIANTS]
    sides = dict.fromkeys(name for c in CONTRASTS for name in (c.right, c.left))
    return found + [Piece(name, n, contrast=True) for n in CLIENTS for name in sides]


def named(name: str) -> Piece:
    """Return the piece of that name, with all the seeds that anything wants of it.

    Raises ``RunError`` listing the names.
    """
    found = [piece for piece in pieces() if piece.name == name]
    if not found:
        known = ", ".join(dict.fromkeys(piece.name for piece in pieces()))
        raise RunError(f"there is no piece {name!r}; there is {known}")
    return found[-1]


def advance(
    store: Store,
    piece: Piece,
    play: Callable[[Mapping[str, Any], float, int], Run],
    on: Callable[[], bool],
) -> Iterator[Run]:
    """Make a piece's missing runs while ``on()``, keeping each at once."""
    while on() and (wanted := store.next(piece)) is not None:
        run = play(store.settings(piece), *wanted)
        store.keep(piece, run)
        yield run


def missing(store: Store, wanted: Sequence[Piece]) -> dict[str, str]:
    """Return what each piece lacks, by its name."""
    found = dict[str, str]()
    for piece in wanted:
        if not _plans.available(piece.method):
            found[piece.name] = f"the package has no preset {KNOWN[piece.method].preset}"
            continue
        if not (runs := store.runs(piece)):
            found[piece.name] = "not run"
            continue
        tried = {r["lr"] for r in runs if r["seed"] == store.scale.seeds[0]}
        rates = [f"rate {lr:g}" for lr in store.scale.rates if lr not in tried]
        seeds = [f"seed {s}" for s in store.seeds(piece) if s not in store.best(piece)]
        if rates or seeds:
            found[piece.name] = ", ".join(rates or seeds)
    return found
