"""Sums of ``z z^T`` with ``z = A x``, what goes into each module's ``B``, for K clients at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from fedpeft import lowrank

Sums: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""Module to the sums [K, r, r] and the number of positions [K] in them, float64."""


class Grams:
    """What the hooks of low-rank modules add to, while somebody observes."""

    def __init__(self) -> None:
        self._lengths: Tensor | None = None
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def during(self, lengths: Sequence[int]) -> Iterator[Sums]:
        """Have :meth:`add` count; ``lengths`` says how many positions of each row are its own.

        They alone count where a module sees all positions of its rows. Where it sees others (a
        pooled vector, patches), those of a row count whose length is not 0.
        """
        self._lengths, self._found = torch.tensor(lengths), {}
        try:
            yield self._found
        finally:
            self._lengths, self._found = None, {}

    def add(
        self, module: str, x: Tensor, params: Mapping[str, Tensor], rows: tuple[int, int]
    ) -> None:
        """Add a module's inputs ``x`` [K * b, ..., in], if anybody observes.

        ``rows`` are the records of the pass, and their positions all together.
        """
        if self._lengths is None:
            return
        kind, a = torch.promote_types(x.dtype, torch.float32), params[lowrank.factors(module)[0]]
        grouped = x.to(kind).reshape(a.shape[0], -1, x.shape[-1])
        z = torch.bmm(grouped, a.to(kind).transpose(1, 2)).to(torch.float64)
        own, times = _own(x, self._lengths, *rows)
        own = own.to(z.device).reshape(z.shape[:2])
        z = torch.where(own[..., None], z, 0.0)  # no product: padding may hold what is not finite
        gram, count = torch.bmm(z.transpose(1, 2), z) * times, own.sum(1).double() * times
        if module in self._found:  # layers that share weights
            before = self._found[module]
            gram, count = before[0] + gram, before[1] + count
        self._found[module] = gram, count


def _own(x: Tensor, lengths: Tensor, records: int, positions: int) -> tuple[Tensor, int]:
    """Return which positions of ``x`` count, and how many times.

    What is computed once for all records (relative positions, as in DeBERTa) counts for each, so
    that it does not matter which records share a batch.
    """
    count = x.shape[:-1].numel()
    if len(x) % records:
        return torch.ones(count, dtype=torch.bool), int((lengths > 0).sum())
    each = count // records
    if count == positions:
        return torch.arange(each) < lengths[:, None], 1
    return (lengths > 0)[:, None].expand(-1, each), 1
