"""What rounds of several kinds spend together on the same records, whoever chooses among them then.

Neighbours have to be the same for all. What is said holds where later runs depend on results of
earlier ones, as long as their noise does not (Rogers et al. 2016, arXiv 1605.08294).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fedpeft.privacy import _accountant
from fedpeft.types import Sampling

Kind = tuple[Sampling, float, int]
"""How units are drawn, the noise multiplier, and how many rounds, or steps, there are."""


@lru_cache(maxsize=256)
def composed(kinds: tuple[Kind, ...], delta: float) -> tuple[float, str]:
    """Return the epsilon of all at ``delta``, and the accountant that says so.

    Privacy losses are composed (PLD) where they are known of every kind, else Renyi divergences.
    """
    kinds = tuple((of, noise, _accountant.felt(of, count)) for of, noise, count in kinds)
    kinds = tuple(kind for kind in kinds if kind[2])
    if not kinds:
        return 0.0, "PLD"
    from dp_accounting.pld import privacy_loss_distribution as losses
    from dp_accounting.rdp import compute_epsilon

    orders, divergences = renyi(kinds)
    rough = float(compute_epsilon(orders, divergences, delta)[0])
    if any(_accountant.accountant(of) == "RDP" for of, *_ in kinds) or rough > _accountant.HOPELESS:
        return rough, "RDP"
    step = _accountant.grid(rough, sum(count for *_, count in kinds))
    found = losses.identity(value_discretization_interval=step)
    for of, noise, count in kinds:
        found = found.compose(_accountant.several(of, noise, count, step))
    return float(found.get_epsilon_for_delta(delta)), "PLD"


def renyi(kinds: Sequence[Kind]) -> tuple[Sequence[float], Sequence[float]]:
    """Return orders, and the Renyi divergence of all at each; at most, of capped cohorts."""
    each = [
        (_accountant.one_round_s_rdp(_accountant.uncapped(of), noise), _accountant.felt(of, count))
        for of, noise, count in kinds
    ]
    return each[0][0][0], sum(count * one for (_, one), count in each)


@lru_cache(maxsize=256)
def repeated(kind: Kind, each: int, mean: float, shape: float, delta: float) -> float:
    """Return the epsilon of publishing nothing but the best trial, by Renyi divergences.

    A trial is ``each`` runs of one kind. How many trials there are is drawn from the truncated
    negative binomial of this ``shape`` and ``mean``, by secret coins and before anything is seen;
    trials are drawn alike, each by itself (Papernot and Steinke 2021, arXiv 2110.03620, theorem 2,
    as ``dp-accounting`` has it).
    """
    sampling, noise, count = kind
    rounds = each * _accountant.felt(sampling, count)
    return _accountant.repeated(sampling, noise, rounds, mean, shape, delta)


def merged(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Return equal kinds as one, in one order; each count is of a run of its own."""
    counts: dict[tuple[Sampling, float], int] = {}
    for of, noise, count in kinds:
        key = (of if of.most is None else _endless(of)), noise
        counts[key] = counts.get(key, 0) + _accountant.felt(of, count)
    kinds = [(of, noise, count) for (of, noise), count in counts.items()]
    return tuple(sorted(kinds, key=repr))


def _endless(of: Sampling) -> Sampling:
    """Return a sampling whose rounds are those that a client may be in, and no more."""
    return Sampling("all", of.population)
