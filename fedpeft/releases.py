"""The server's half of a promise: secret coins, the noised sum, and what the ledger may say."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedpeft import turns
from fedpeft.errors import PlanError
from fedpeft.plan import Plan
from fedpeft.rng import derive, derived, keyed
from fedpeft.tables import Tables
from fedpeft.tensors import padded
from fedpeft.types import Population, Rng, Sampled, Sampling, Sent, Shapes, Update

if TYPE_CHECKING:
    from fedpeft.privacy._mechanism import Mechanism
    from fedpeft.state import ServerState

_KEY = 32
"""Bytes of a round's key."""
_PUBLIC = ("round", "epsilon", "epsilon_rdp", "epsilon_record", "clip")
_SERVERS = "test/"
"""What follows from noised sums, from the plan, or from the server's own records."""


@dataclass(frozen=True, slots=True)
class Coins:
    """What decides the next round's cohort and noise, and the norm that updates are clipped to.

    The key exists before anybody is asked, and is durable then: a round that is played again asks
    the same clients and adds the same noise. There is none where nothing is promised.
    """

    key: bytes = b""
    clip: float = math.inf


def is_guarded(plan: Plan) -> bool:
    """Tell whether updates are clipped and their sum is noised."""
    return plan.privacy.bound < math.inf


def drawn(plan: Plan, round: int, clip: float) -> Coins:
    """Return fresh coins for ``round``: from the operating system, or from the seed."""
    if not is_guarded(plan):
        return Coins()
    if plan.privacy.secret:
        return Coins(secrets.token_bytes(_KEY), clip)
    return Coins(derive(plan.seed, "coins", round).bytes(_KEY), clip)


def mechanism_of(plan: Plan, population: int) -> Mechanism | None:
    """Return what releases the sums of a run; ``None`` where they are as they are.

    Raises ``PlanError`` where nobody knows how cohorts are drawn, or no noise keeps the promise.
    """
    if not is_guarded(plan):
        return None
    found = plan.privacy.mechanism(_sampling(plan, population), plan.rounds)
    if found is None:
        raise PlanError("privacy: bounds updates, and has no mechanism that noises their sum")
    return found


def _sampling(plan: Plan, population: int) -> Sampling:
    """Return what is known of whose replies are in a round's sum."""
    if (most := turns.allowed(plan)) is not None:
        size = round(plan.schedule.expected(population))
        return Sampling("turns", population, size=size, most=most)
    if not isinstance(plan.cohort, Sampled):
        raise PlanError("cohort: nobody knows how it draws clients; use poisson or uniform")
    return plan.cohort.sampling(population)


def chooser(
    plan: Plan, state: ServerState, population: Sequence[str]
) -> Callable[[Sequence[str]], Sequence[str]]:
    """Return who of those within reach is asked in the next round.

    Where something is promised the cohort is drawn from all clients by the secret coins, so that
    how likely a client is drawn never depends on who else is there; who is away is not replaced.
    """
    if not is_guarded(plan):
        return lambda names: plan.cohort.choose(names, derive(plan.seed, state.round, "cohort"))
    chosen = frozenset(plan.cohort.choose(population, keyed(state.coins.key)))
    return lambda names: [name for name in names if name in chosen]


def asker(plan: Plan, state: ServerState) -> Callable[[int], Rng]:
    """Return what draws whom a schedule asks in the next round, after so many were asked in it."""
    round, key = state.round, state.coins.key
    if not is_guarded(plan):
        return lambda before: derive(plan.seed, round, "ask", before)
    return lambda before: keyed(derived(key, f"ask {before}"))


def released(
    plan: Plan,
    tables: Tables,
    state: ServerState,
    population: Population,
    updates: Iterable[Update],
    sent: Sent,
) -> tuple[Update, float] | None:
    """Return the noised sum of the updates as the only one there is, and the next clip.

    ``None`` where nothing is promised, and then no update is read.
    """
    mechanism, round = mechanism_of(plan, len(population)), state.round
    if mechanism is None:
        return None
    up = tables.up(round)["adapter"]
    shapes = _may_come(tables, round, population)
    total, clip = mechanism.release(updates, shapes, state.coins.clip, state.coins.key)
    fresh = tables.begin("", round)  # where any is, all clients begin with the same
    its = replace(sent, moving={**sent.moving, **fresh}) if fresh else None
    return Update("", padded([total], up)[0], 1.0, 1.0, sent=its), clip


def published(plan: Plan, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the ledger may say of a round: nothing of clients where coins are secret."""
    if not plan.privacy.secret:
        return dict(line)
    return {k: v for k, v in line.items() if k in _PUBLIC or k.startswith(_SERVERS)}


def spent(plan: Plan, population: int, state: ServerState) -> dict[str, float]:
    """Return the clip of the round after ``state``, and what is spent once it is over."""
    mechanism, rounds = mechanism_of(plan, population), state.round + 1
    if mechanism is None:
        return {}
    found = {"epsilon": mechanism.epsilon(rounds), "clip": state.coins.clip}
    beside = mechanism.renyi(rounds)
    return found if beside is None else {**found, "epsilon_rdp": beside}


def card(plan: Plan, population: int, rounds: int) -> dict[str, str]:
    """Return what a model card says of the promise after so many ``rounds``."""
    mechanism = mechanism_of(plan, population)
    if mechanism is None:
        return {} if plan.privacy.hides else {"Privacy": "none: updates were not noised"}
    told = mechanism.told()
    if not plan.privacy.secret:
        return {"Privacy": "NOT private: noise and cohorts follow from the plan's seed"}
    epsilon, beside = mechanism.epsilon(rounds), mechanism.renyi(rounds)
    by = "" if beside is None or told["accountant"] == "RDP" else f"; {beside:.3f} by RDP"
    return {
        "Privacy": f"epsilon {epsilon:.3f} at delta {told['delta']:g}, spent in {rounds} rounds",
        "Accountant": f"{told['accountant']}, noise multiplier {told['noise_multiplier']:g}{by}",
        "Unit of privacy": f"{told['unit']}; neighbours: {told['relation']}",
        "Sampler": told["sampler"],
        "Adversary": told["adversary"],
    }


def warnings(plan: Plan, population: int) -> Iterator[str]:
    """Yield what a promise does not cover, or what makes it weak."""
    mechanism = mechanism_of(plan, population)
    if mechanism is None:
        return
    if not plan.privacy.secret:
        yield "privacy: simulate_noise: the seed decides the noise, so the result is NOT private"
    if mechanism.delta >= 1 / population:
        yield (
            f"privacy: delta={mechanism.delta:g} allows to publish the data of one client in "
            f"{population}; set it well below {1 / population:.2g}"
        )
    if (rounds := turns.possible(plan, population)) < plan.rounds:
        yield (
            f"privacy: {population} clients with participations={turns.allowed(plan)} fill at most "
            f"{rounds} rounds, and the plan has {plan.rounds}; the run ends when too few are left "
            "to fill one"
        )
    if plan.warm_start is not None:
        yield "privacy: the promise does not cover what warm_start was trained on"


def _may_come(tables: Tables, round: int, population: Population) -> Shapes:
    """Return the part of the adapter that some client may send an update of in ``round``.

    It follows from the plan alone; the rest travels never, and needs no noise.
    """
    each = {tables.of(client, round) for client in population}
    ups = [own.up(round)["adapter"] for own in each]
    return {
        name: tuple(max(sizes) for sizes in zip(*(up[name] for up in ups), strict=True))
        for name in tables.up(round)["adapter"]
    }
