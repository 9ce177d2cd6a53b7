"""Epsilon as a function of numbers, by Google's ``dp-accounting``.

Noise multipliers are standard deviations over the L2 sensitivity. Where cohorts are drawn by coins
or hold everybody, that is one client's most, neighbours differ by one client, and privacy loss
distributions are composed (PLD). Cohorts of a fixed size have only a Renyi accountant (RDP), for
neighbours in which one client is replaced by another: the sensitivity is twice one client's most.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fedpeft.errors import PlanError
from fedpeft.privacy._losses import Rounds, by_library
from fedpeft.privacy._search import least
from fedpeft.types import Sampling

_ORDERS = (*range(2, 25), *range(26, 65, 4), 80, 96, 128, 192, 256, 512, 1024)
"""Whole orders only: the others come from a series that need not converge."""
_GRIDS = 2.0**-20, 2.0**-10
"""The finest and the coarsest step of privacy losses; they are rounded up, so a bound remains."""
_FINE = 4e-3
"""The step over epsilon, for one round; the roundings of many add up."""
HOPELESS = 1000.0
"""Above, RDP's epsilon will do: it bounds PLD's, which would take all memory."""
_NEAR = 0.99
"""How near to the target epsilon is at the least noise with four digits."""
KNOWN: dict[str, float] = {}
"""Noise that was calibrated here or in other processes, by what for (``calibrations.py``)."""
_COARSER = 4
"""The step of losses by which noise is looked for, over the one by which it is confirmed."""
LEAST_NOISE = 0.01
"""No noise multiplier is below: epsilon would be in the thousands."""


def sensitivity(sampling: Sampling) -> int:
    """Return how far neighbours' sums are apart at most, in units of one client's most."""
    return 2 if sampling.kind == "fixed" else 1


def accountant(sampling: Sampling) -> str:
    """Return the name of the accountant whose epsilon counts."""
    return "RDP" if sampling.kind == "fixed" else "PLD"


def relation(sampling: Sampling) -> str:
    """Return what neighbours are."""
    if sampling.kind == "turns":  # who is not there lets somebody else in earlier
        return "one client's updates, or zeros at the same times"
    return "replace one client" if sampling.kind == "fixed" else "add or remove one client"


@lru_cache(maxsize=4096)
def epsilon(sampling: Sampling, noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return the epsilon of so many rounds at ``delta``."""
    rounds = felt(sampling, rounds)
    if rounds == 0:
        return 0.0
    rough = renyi(uncapped(sampling), noise_multiplier, rounds, delta) or 0.0
    if accountant(sampling) == "RDP" or rough > HOPELESS:
        return rough
    step = grid(rough, rounds)
    if _is_gaussian(sampling):
        return by_library(several(sampling, noise_multiplier, rounds, step), delta)
    return _rounds(sampling, noise_multiplier, step).epsilon(rounds, delta)


def _roughly(sampling: Sampling, noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return about the epsilon by PLD, a part in a thousand above it, in a fraction of the time."""
    rough = renyi(uncapped(sampling), noise_multiplier, rounds, delta) or 0.0
    if rough > HOPELESS:
        return rough
    step = _COARSER * grid(rough, rounds)
    return Rounds(_one_round(sampling, noise_multiplier, step), exact=False).epsilon(rounds, delta)


def several(sampling: Sampling, noise_multiplier: float, rounds: int, step: float) -> Any:
    """Return the privacy losses of so many rounds."""
    if _is_gaussian(sampling):
        return _one_round(sampling, noise_multiplier / math.sqrt(rounds), step)
    return _one_round(sampling, noise_multiplier, step).self_compose(rounds)


def _is_gaussian(sampling: Sampling) -> bool:
    """Tell whether no chance helps: such rounds add up to one, without any loss."""
    return sampling.kind == "turns" or (sampling.size is None and sampling.rate == 1)


def felt(sampling: Sampling, rounds: int) -> int:
    """Return in how many of the rounds one client may be."""
    return rounds if sampling.most is None else min(rounds, sampling.most)


@lru_cache(maxsize=8)
def _rounds(sampling: Sampling, noise_multiplier: float, step: float) -> Rounds:
    """Return what equal rounds share."""
    return Rounds(_one_round(sampling, noise_multiplier, step))


@lru_cache(maxsize=8)
def _one_round(sampling: Sampling, noise_multiplier: float, step: float) -> Any:
    """Return the privacy losses of one round, rounded up to a grid of this ``step``.

    They take most of the time, and rounds of one run share them.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as losses

    given: dict[str, Any] = {
        "value_discretization_interval": step,
        "neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
    }
    if sampling.size is None or sampling.kind == "turns":
        how = {"standard_deviation": noise_multiplier, "sampling_prob": sampling.rate}
        return losses.from_gaussian_mechanism(**how, **given)
    return losses.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=sampling.population,
        sampling_probability=sampling.rate,
        truncated_batch_size=sampling.size,
        noise_multiplier=noise_multiplier,
        **given,
    )


def grid(rough: float, steps: int) -> float:
    """Return the step of privacy losses at which so many roundings change little."""
    finest, coarsest = _GRIDS
    step = 2.0 ** math.floor(math.log2(max(rough, 1e-9) * _FINE / math.sqrt(steps)))
    return min(coarsest, max(finest, step))


@lru_cache(maxsize=4096)
def renyi(sampling: Sampling, noise_multiplier: float, rounds: int, delta: float) -> float | None:
    """Return the epsilon by RDP; ``None`` for capped cohorts, for which there is none."""
    from dp_accounting.rdp import compute_epsilon

    if sampling.kind == "coins" and sampling.size is not None:
        return None
    orders, one = one_round_s_rdp(sampling, noise_multiplier)
    return float(compute_epsilon(orders, felt(sampling, rounds) * one, delta)[0])


@lru_cache(maxsize=1024)
def one_round_s_rdp(sampling: Sampling, noise_multiplier: float) -> tuple[Any, Any]:
    """Return orders, and one round's Renyi divergence of each."""
    from dp_accounting.rdp import RdpAccountant

    found = RdpAccountant(_ORDERS, neighboring_relation=_relation(sampling))
    found.compose(_event(sampling, noise_multiplier))
    return found.orders, found.rdp


def repeated(
    sampling: Sampling, noise: float, rounds: int, mean: float, shape: float, delta: float
) -> float:
    """Return the epsilon of the best of a number of runs that is drawn, where it alone is seen.

    The number has the truncated negative binomial distribution of this ``mean`` and ``shape``
    (Papernot and Steinke 2021, arXiv 2110.03620).
    """
    from dp_accounting.dp_event import RepeatAndSelectDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    found = RdpAccountant(_ORDERS, neighboring_relation=_relation(sampling))
    run = SelfComposedDpEvent(_event(uncapped(sampling), noise), rounds)
    found.compose(RepeatAndSelectDpEvent(run, mean, shape))
    return float(found.get_epsilon(delta))


@lru_cache(maxsize=4096)
def calibrated(sampling: Sampling, target: float, rounds: int, delta: float) -> float:
    """Return the least noise multiplier, up to four digits, whose epsilon is at most ``target``.

    Losses are coarse while it is looked for; what is found is confirmed by :func:`epsilon`, and so
    is what was ``KNOWN`` before. Raises ``PlanError`` where there is none.
    """
    of = f"{sampling} {target} {rounds} {delta}"
    known = KNOWN.get(of)
    if known is not None and _fits(known, sampling, target, rounds, delta):
        return known
    KNOWN[of] = found = _calibrated(sampling, target, rounds, delta)
    return found


def _fits(noise: Any, sampling: Sampling, target: float, rounds: int, delta: float) -> bool:
    """Tell, by one evaluation, whether this may be the noise that calibration would find."""
    if type(noise) is not float or not LEAST_NOISE <= noise < math.inf:
        return False
    found = epsilon(sampling, noise, rounds, delta)
    return found <= target and (found > _NEAR * target or noise == LEAST_NOISE)


def _calibrated(sampling: Sampling, target: float, rounds: int, delta: float) -> float:
    """Return the least noise multiplier. Raises ``PlanError`` where there is none."""

    def exact(noise: float) -> float:
        return epsilon(sampling, noise, rounds, delta)

    def rough(noise: float) -> float:
        return renyi(uncapped(sampling), noise, rounds, delta) or 0.0

    def coarse(noise: float) -> float:
        return _roughly(sampling, noise, rounds, delta)

    try:
        found, _ = least(rough, target, 1.0, LEAST_NOISE)
        if accountant(sampling) != "RDP":
            slope = None
            if not _is_gaussian(sampling):
                found, slope = least(coarse, target, found, LEAST_NOISE)
            found, _ = least(exact, target, found, LEAST_NOISE, slope)
    except OverflowError:
        raise PlanError(f"privacy: no noise gives epsilon={target:g} at delta={delta:g}") from None
    unit = 10.0 ** (math.floor(math.log10(found)) - 3)
    noise = math.ceil(found / unit) * unit
    return float(f"{noise:.6g}")


def uncapped(sampling: Sampling) -> Sampling:
    return replace(sampling, size=None) if sampling.kind == "coins" else sampling


def _relation(sampling: Sampling) -> Any:
    from dp_accounting import NeighboringRelation

    fixed = sampling.kind == "fixed"
    return NeighboringRelation.REPLACE_ONE if fixed else NeighboringRelation.ADD_OR_REMOVE_ONE


def _event(sampling: Sampling, noise_multiplier: float) -> Any:
    """Return one round as ``dp-accounting`` describes it."""
    import dp_accounting as dp

    noise, population = dp.GaussianDpEvent(noise_multiplier), sampling.population
    if sampling.kind in ("all", "turns"):
        return noise
    if sampling.kind == "fixed":
        return dp.SampledWithoutReplacementDpEvent(population, sampling.size, noise)
    if sampling.size is not None:
        given = population, sampling.rate, sampling.size, noise_multiplier
        return dp.TruncatedSubsampledGaussianDpEvent(*given)
    return noise if sampling.rate == 1 else dp.PoissonSampledDpEvent(sampling.rate, noise)
