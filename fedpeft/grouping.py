"""Which clients share a forward and backward pass, step by step.

Records of all clients of a pass are padded to the longest of them, so partners are chosen by
length; each client's own records come in the order of its own data, so who shares a pass with whom
changes no result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

WINDOW = 4
"""Clients among whom partners are chosen, as a multiple of those in one pass."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """At most ``width`` clients in one pass.

    ``costs``, where measured, are (tokens, seconds) of passes of growing size: passes are then cut
    so that the sum of their costs is least, however few clients that leaves in one. Without them a
    pass takes as many clients as it may. ``checkpointing`` keeps no activations of the layers.
    """

    width: int = 1
    costs: tuple[tuple[float, float], ...] = ()
    checkpointing: bool = False

    def passes(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Return which clients go together, given the shape of each one's records.

        Client i has ``rows[i]`` records, padded to ``lengths[i]`` tokens. Every client is in one
        pass; those of a pass keep their order.
        """
        count = len(rows)
        if count <= self.width and not self.costs:
            return [list(range(count))]
        order = sorted(range(count), key=lambda i: (rows[i], lengths[i], i))
        cuts = self._cuts([rows[i] for i in order], [lengths[i] for i in order])
        return [sorted(order[start:end]) for start, end in cuts]

    def halved(self) -> Grouping:
        """Return this grouping with half as many clients in a pass, at least one."""
        return replace(self, width=max(1, self.width // 2))

    def window(self, client_bytes: int, memory: int) -> int:
        """Return among how many clients partners are chosen.

        Each holds ``client_bytes`` (parameters, gradient, optimizer state) all the while; together
        they may take ``memory`` bytes.
        """
        if self.width == 1:
            return 1
        return max(self.width, min(WINDOW * self.width, memory // max(client_bytes, 1)))

    def _cuts(self, rows: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """Cut clients in order into passes: the cheapest way, by dynamic programming."""
        count = len(rows)
        if not self.costs:
            return [(i, min(i + self.width, count)) for i in range(0, count, self.width)]
        best, start = np.zeros(count + 1), [0] * (count + 1)
        tall, wide = np.asarray(rows), np.asarray(lengths)
        for end in range(1, count + 1):
            low = max(0, end - self.width)
            longest = np.maximum.accumulate(wide[low:end][::-1])[::-1]
            tokens = np.arange(end - low, 0, -1) * tall[end - 1] * longest
            total = best[low:end] + self._seconds(tokens)
            at = int(np.argmin(total))
            best[end], start[end] = total[at], low + at
        cuts, end = list[tuple[int, int]](), count
        while end:
            cuts.append((start[end], end))
            end = start[end]
        return cuts[::-1]

    def _seconds(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Estimate what passes cost: between the measured sizes, and beyond the last in line."""
        size, cost = (np.asarray(column) for column in zip(*self.costs, strict=True))
        slope = cost[-1] / size[-1]
        if len(size) > 1:
            slope = max(0.0, (cost[-1] - cost[-2]) / (size[-1] - size[-2]))
        beyond = cost[-1] + slope * (tokens - size[-1])
        return np.asarray(np.where(tokens > size[-1], beyond, np.interp(tokens, size, cost)))
