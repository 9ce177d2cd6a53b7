"""The least noise for a target, in few looks at a function that takes long."""

from __future__ import annotations

import math
from collections.abc import Callable

_LARGEST = 2.0**30
"""No noise multiplier is searched above."""
_CLOSE = 1.0005
"""How close to the least noise a search ends."""


def least(
    of: Callable[[float], float],
    target: float,
    noise: float,
    floor: float,
    slope: float | None = None,
) -> tuple[float, float]:
    """Return the least noise, up to a part in 2,000, for which ``of`` it is at most ``target``.

    It looks from ``noise`` on, and not below the ``floor``. The logarithm of what is ``of`` it is
    nearly linear in that of the noise, so few values are needed: with its ``slope``, which is
    returned as well, one that is near enough below the target. Raises ``OverflowError`` where no
    noise is enough.
    """
    low, high, is_known, slope = 0.0, math.inf, slope is not None, slope or -1.0
    last: tuple[float, float] | None = None
    while high > low * _CLOSE:
        found = max(of(noise), 1e-12)
        low, high = (low, min(high, noise)) if found <= target else (max(low, noise), high)
        if high <= floor or low > _LARGEST:
            break
        if is_known and noise == high and math.log(target / found) < -slope * math.log(_CLOSE):
            return noise, slope
        at = math.log(noise), math.log(found / target)
        if last and last[0] != at[0] and (at[1] - last[1]) / (at[0] - last[0]) < -0.05:
            slope, is_known = (at[1] - last[1]) / (at[0] - last[0]), True
        last, wanted = at, math.exp(at[0] - at[1] / slope)
        noise = wanted * (1 + (_CLOSE - 1) / 4)
        if abs(noise / high - 1) < (_CLOSE - 1) / 2:
            noise = high / (1 + (_CLOSE - 1) * 0.9)
        if not low < noise < high:
            noise = math.sqrt(low * high) if 0 < low < high < math.inf else noise
            noise = max(floor, noise)
    if low > _LARGEST:
        raise OverflowError
    return max(high, floor), slope
