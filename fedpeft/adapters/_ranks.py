"""Which rank a client has, by the plan alone: named in it, or drawn for its name or the round."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

import numpy as np

from fedpeft import lowrank
from fedpeft.errors import PlanError, SpecError
from fedpeft.rng import derive
from fedpeft.types import Shapes


@dataclass(frozen=True, slots=True)
class Ranks:
    """``named`` clients have the rank written there; all others draw one of ``drawn``.

    ``drawn`` are ranks and their weights. Who else takes part changes no client's rank. Or all have
    the same, drawn for each round between ``least`` and the highest.
    """

    named: Mapping[str, int]
    drawn: Sequence[tuple[int, float]]
    least: int | None = None

    @property
    def known(self) -> set[int]:
        """Every rank that a client may have."""
        return {*self.named.values(), *(rank for rank, _ in self.drawn)}

    def of(self, client: str, seed: int, round: int | None = None) -> int:
        """Return the rank of ``client`` in a round of training, or outside of any.

        Raises ``PlanError`` where the plan gives it none.
        """
        if self.least is not None:
            most = max(self.known)
            drawn = derive(seed, "rank", round or 0).integers(self.least, most + 1)
            return most if round is None else int(drawn)
        if client in self.named:
            return self.named[client]
        if not self.drawn:
            raise PlanError(f"ranks gives client {client!r} none; end it with one for all others")
        edges = np.cumsum([weight for _, weight in self.drawn])
        at = derive(seed, "rank", client).random() * edges[-1]
        return self.drawn[min(int(np.searchsorted(edges, at, "right")), len(edges) - 1)][0]

    def check(self, clients: Collection[str]) -> None:
        """Raise ``PlanError`` for a name that no client has, or a client without a rank."""
        for name in self.named:
            if name not in clients:
                some = sorted(clients, key=lambda c: -SequenceMatcher(None, c, name).ratio())[:3]
                raise PlanError(
                    f"ranks names {name!r}, which is no client; there is {', '.join(some)}"
                )
        for client in clients:
            self.of(client, 0)


def narrowed(shapes: Shapes, rank: int) -> Shapes:
    """Return the shapes with factors of another rank."""
    found = dict(shapes)
    for module in lowrank.modules(shapes):
        a, b = lowrank.factors(module)
        found |= {a: (rank, shapes[a][1]), b: (shapes[b][0], rank)}
    return found


@lru_cache(maxsize=16)
def parse(text: str) -> Ranks:
    """Read ``"4,8,16"``, ``"4*40,8*20,16*10"`` (weights), ``"name=4,other=16,8"`` or ``"4..16"``.

    Raises ``SpecError`` naming the entry.
    """
    least, dots, most = (part.strip() for part in text.partition(".."))
    if dots:
        if not (least.isdecimal() and most.isdecimal() and 0 < int(least) < int(most)):
            raise _unreadable(text, text)
        return Ranks({}, [(int(most), 1.0)], int(least))
    named, drawn = dict[str, int](), list[tuple[int, float]]()
    for entry in text.split(","):
        name, is_named, rest = (part.strip() for part in entry.rpartition("="))
        rank, is_weighted, weight = (part.strip() for part in rest.partition("*"))
        if not rank.isdecimal() or int(rank) < 1 or (is_named and (is_weighted or not name)):
            raise _unreadable(text, entry)
        if is_named and name in named:
            raise SpecError(f"lora: ranks={text!r} names {name!r} twice")
        if is_named:
            named[name] = int(rank)
        else:
            drawn.append((int(rank), _weight(weight) if is_weighted else 1.0))
            if not 0 < drawn[-1][1] < math.inf:
                raise _unreadable(text, entry)
    return Ranks(named, drawn)


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _unreadable(text: str, entry: str) -> SpecError:
    return SpecError(
        f"lora: ranks={text!r} has the entry {entry.strip()!r}; write ranks to draw from, as in "
        "'4,8,16' or with weights '4*40,8*20', names as in 'anna=4,ben=16,8', or the least and the "
        "most of a rank that is drawn in each round for all, as in '4..16'"
    )
