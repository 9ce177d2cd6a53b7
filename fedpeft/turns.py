"""Who may still be asked, where a promise to clients allows each only so many participations.

A request counts where the round in which it was made is durable, in the file that has the model
which that round released. One of a round that was cut short has changed no model that anybody saw:
the round is played again, with the same noise, and counts what it asks then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedpeft.plan import Plan
from fedpeft.types import Flight, Rationed

Turns = Mapping[str, int]
"""How often each client was asked."""


def allowed(plan: Plan) -> int | None:
    """Return how often a client may be asked in a run; ``None`` where nothing limits that."""
    return plan.privacy.participations if isinstance(plan.privacy, Rationed) else None


def left(plan: Plan, turns: Turns, clients: Iterable[str]) -> list[str]:
    """Return those of ``clients`` who may be asked once more."""
    most = allowed(plan)
    return [name for name in clients if most is None or turns.get(name, 0) < most]


def after(plan: Plan, turns: Turns, asked: Iterable[str]) -> Turns:
    """Return how often each was asked, with those ``asked`` in one more round."""
    if allowed(plan) is None:
        return {}
    found = dict(turns)
    for name in asked:
        found[name] = found.get(name, 0) + 1
    return found


def exhausted(plan: Plan, turns: Turns, flying: Sequence[Flight], population: Sequence[str]) -> str:
    """Return why no further round could have all its replies; nothing where one could.

    It follows from who was asked, and from nothing that anybody said.
    """
    most, size = allowed(plan), round(plan.schedule.expected(len(population)))
    able = {*left(plan, turns, population), *(flight.client for flight in flying)}
    if most is None or len(able) >= size:
        return ""
    return (
        f"{len(able)} clients are left who have not been asked {most} times, and a round takes "
        f"{size} replies; more need a higher participations, which costs epsilon, or more clients"
    )


def possible(plan: Plan, population: int) -> int:
    """Return how many rounds there can be at most: of the plan, and by who may be asked."""
    most, size = allowed(plan), round(plan.schedule.expected(population))
    return plan.rounds if most is None else min(plan.rounds, population * most // size)
