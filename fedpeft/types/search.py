"""What looks for good values of a plan's lines, trial by trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from fedpeft.types.basics import Rng


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from ``low`` to ``high``, both of them among these; ``whole`` ones, or real ones.

    With ``log`` it is their logarithms that are looked through evenly. With a ``step`` only
    ``low``, ``low + step``, ... are meant.
    """

    low: float
    high: float
    whole: bool = False
    log: bool = False
    step: float | None = None


Space: TypeAlias = Mapping[str, Range | int]
"""What is looked through, by axis: a range, or so many choices."""
Point: TypeAlias = Mapping[str, float | int]
"""A value of each axis: a number of its range, or which of its choices (from 0)."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A point, and what came of it: the ``value`` of the goal, or the ``problem``."""

    point: Point
    value: float | None = None
    problem: str = ""


@runtime_checkable
class Search(Protocol):
    """``search/``: which points of a space are tried. Part of no plan."""

    @property
    def trials(self) -> int:
        """How many points are tried."""
        ...

    @property
    def batch(self) -> int:
        """How many are asked for at once, before anything is known of them."""
        ...

    @property
    def maximize(self) -> str | None:
        """The name of a number of the final table that is to be large, if one is."""
        ...

    @property
    def minimize(self) -> str | None:
        """The name of one that is to be small."""
        ...

    def check(self) -> None:
        """Raise ``FedPeftError`` for fields that contradict each other, or a missing package."""
        ...

    def ask(self, space: Space, trials: Sequence[Trial], count: int) -> Sequence[Point]:
        """Return the next points.

        A pure function of its arguments and the method's fields: ``trials`` are all that were asked
        for before, whole batches of them in their order. So a search is rebuilt from results alone.
        """
        ...


@runtime_checkable
class Repeating(Protocol):
    """A search whose points are drawn alike, each by itself, as many as chance says.

    Choosing the best of so many costs little more privacy than one of them, if nothing else is
    published (Papernot and Steinke 2021, arXiv 2110.03620). Its ``trials`` are the mean.
    """

    @property
    def shape(self) -> float | None:
        """The shape of the truncated negative binomial that is drawn from; ``None`` for none."""
        ...

    def settled(self, rng: Rng) -> Search:
        """Return the search with its number of trials, and the seed of its points, drawn."""
        ...
