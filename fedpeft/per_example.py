"""Gradients of single records, their norms and clipped sums, in passes of many records at once.

Every record is treated as a client of its own, so the pass over a shared base that gives K clients
their gradients gives each record its own. A record's gradient is that of its unweighted loss, with
dropout off; ``batch.weights`` only say which rows are records (not 0) and which merely fill up
their client's share (0). Nothing here adds noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedpeft.errors import ModelError, SpecError
from fedpeft.types import Batch, Example, Learner, Stacked

CHUNK = 16


@dataclass(frozen=True, slots=True)
class Clipped:
    """Sums [K, ...] of clipped gradients; norms before clipping, and losses of the records [K * b].

    Adding or removing one record (or one unit) of a client moves its sums by at most the clipping
    norm, in the L2 norm over all tensors jointly and to rounding; replacing one, by at most twice
    as much. ``sums`` have the parameters' type, ``exact`` is the same in float64. Norms (float64;
    of records [K * b], or of units, client after client) and losses (nats) have no such bound: they
    are not to leave the client as they are.
    """

    sums: Stacked
    exact: Stacked
    norms: torch.Tensor
    losses: torch.Tensor


def gradients(
    learner: Learner, params: Stacked, fixed: Stacked, batch: Batch, *, chunk: int = CHUNK
) -> tuple[Stacked, torch.Tensor]:
    """Return each record's gradient [K * b, ...] and loss [K * b] in nats.

    ``params`` and ``fixed`` [K, ...] are those of the K clients whose records ``batch`` holds.
    Up to ``chunk`` records share a pass, fewer where the adapter takes fewer; that changes results
    by rounding only. A row that fills up has a gradient of exactly zero, and a loss that means
    nothing. Raises ``SpecError`` for a ``chunk`` below 1 and ``ModelError`` where rows cannot be
    dealt evenly to the clients.
    """
    rows = len(batch.weights)
    found = {name: value.new_empty(rows, *value.shape[1:]) for name, value in params.items()}
    losses = [batch.weights.new_empty(0)]
    for part in _parts(learner, params, fixed, batch, chunk):
        losses.append(part.losses)
        for name, grad in part.grads.items():
            found[name][part.rows] = _kept(grad, part.real)
    return found, torch.cat(losses)


def norms(
    learner: Learner, params: Stacked, fixed: Stacked, batch: Batch, *, chunk: int = CHUNK
) -> torch.Tensor:
    """Return the L2 norm of each record's gradient over all tensors jointly, float64 [K * b].

    Arguments and errors as of :func:`gradients`; only ``chunk`` gradients are held at a time. They
    are formed, unlike in Goodfellow 2015 (Efficient Per-Example Gradient Computations, arXiv
    1510.01799): an adapter's are small beside the activations that such formulas multiply.
    """
    found = [batch.weights.new_empty(0, dtype=torch.float64)]
    found += [_norms(part) for part in _parts(learner, params, fixed, batch, chunk)]
    return torch.cat(found)


def clipped_sums(
    learner: Learner,
    params: Stacked,
    fixed: Stacked,
    batch: Batch,
    *,
    clip: float,
    chunk: int = CHUNK,
    owners: Sequence[int] | None = None,
) -> Clipped:
    """Sum each client's gradients, every record's scaled by ``min(1, clip / norm)``.

    Abadi et al. 2016, Deep Learning with Differential Privacy (arXiv 1607.00133), algorithm 1
    without the noise. ``clip`` bounds the L2 norm over all tensors jointly, in the gradients' unit
    (nats per unit of a parameter). Other arguments and errors as of :func:`gradients`, and
    ``SpecError`` where ``clip`` is not positive and finite. No record gives a sum of zero.

    ``owners`` [K * b] says which of its client's units, counted from 0, each row is of: then the
    mean gradient of a unit's records is clipped, not each of them. The rows of a unit may be
    anywhere among its client's; those of ``chunk`` units, and one more, are held at a time.

    A record or unit whose norm is not finite contributes zero, and its norm says so. That is
    decided by itself alone and stays within the bound, so the sensitivity holds; an error would
    show whoever sees it that one record is there, and no noise covers that.
    """
    if not 0 < clip < float("inf"):
        raise SpecError(f"per_example: clip={clip} must be above 0 and finite")
    if owners is not None:
        return _clipped_units(learner, params, fixed, batch, clip, chunk, owners)
    sums, lengths = _zeros(params), [batch.weights.new_empty(0, dtype=_EXACT)]
    losses = [batch.weights.new_empty(0)]
    for part in _parts(learner, params, fixed, batch, chunk):
        own = _norms(part)
        factors, usable = (clip / own).clamp(max=1.0), part.real & own.isfinite()
        clients = part.clients.stop - part.clients.start
        for name, grad in part.grads.items():
            scaled = _kept(grad * _column(factors, grad), usable)
            sums[name][part.clients] += scaled.reshape(clients, -1, *grad.shape[1:]).sum(1)
        lengths.append(own)
        losses.append(part.losses)
    return Clipped(_rounded(sums, params), sums, torch.cat(lengths), torch.cat(losses))


def check(learner: Learner, params: Stacked, fixed: Stacked, records: Sequence[Example]) -> None:
    """Raise ``ModelError`` where records that share a pass do not have the gradients of each alone.

    So it is with losses that are means over a batch, with normalisation over it, and with layers
    that choose among all its tokens: clipping would bound nothing. ``params`` and ``fixed``
    [1, ...] are one client's.
    """
    together, _ = gradients(learner, params, fixed, learner.collate(records, [1.0] * len(records)))
    for k, record in enumerate(records):
        alone, _ = gradients(learner, params, fixed, learner.collate([record], [1.0]))
        shared = [together[n][k] for n in alone]
        apart = sum(
            float((there - v[0]).double().square().sum())
            for there, v in zip(shared, alone.values(), strict=True)
        )
        length = sum(float(v.double().square().sum()) for v in alone.values())
        usable = [all(bool(v.isfinite().all()) for v in g) for g in (alone.values(), shared)]
        if not any(usable):
            continue  # it counts as zero, and to stop here would tell that it is there
        if not (all(usable) and apart <= _APART**2 * length):
            raise ModelError(
                "privacy: the gradient of a record depends on the others in its batch, so clipping "
                "it bounds nothing; the task's losses must be one per record, and the model and "
                "the adapter must treat each record by itself"
            )


_EXACT = torch.float64
"""In float32 a factor that underflows would let a gradient exceed the clip."""
_APART = 0.1
"""Gradients that differ by rounding alone, also in bfloat16, are closer; batch means never are."""


def _zeros(like: Stacked) -> Stacked:
    return {name: value.new_zeros(value.shape, dtype=_EXACT) for name, value in like.items()}


def _rounded(exact: Stacked, like: Stacked) -> Stacked:
    return {name: value.to(like[name].dtype) for name, value in exact.items()}


def _clipped_units(
    learner: Learner,
    params: Stacked,
    fixed: Stacked,
    batch: Batch,
    clip: float,
    chunk: int,
    owners: Sequence[int],
) -> Clipped:
    """Clip the mean gradients of units, one after the other.

    Rows are ordered by unit, so a pass has few units, and of one alone the next pass has more rows.
    """
    clients, most = len(next(iter(params.values()))), max(owners, default=-1) + 1
    own = torch.tensor(owners, dtype=torch.int64, device=batch.weights.device)
    each = max(1, len(owners) // clients)
    unit = own + most * torch.arange(len(own), device=own.device).div(each, rounding_mode="floor")
    order = unit.argsort(stable=True)
    unit, batch = unit[order], _taken(batch, order)
    sums, lengths = _zeros(params), [batch.weights.new_empty(0, dtype=_EXACT)]
    losses, held = [batch.weights.new_empty(0)], _Units.none(params, own)
    for part in _parts(learner, params, fixed, batch, chunk):
        held = held.plus(unit[part.rows], part)
        lengths.append(_add_clipped(sums, held.but_last(), clip, most))
        held = held.last()
        losses.append(part.losses)
    lengths.append(_add_clipped(sums, held, clip, most))
    back = torch.cat(losses)[order.argsort()]
    return Clipped(_rounded(sums, params), sums, torch.cat(lengths), back)


def _add_clipped(sums: Stacked, units: _Units, clip: float, most: int) -> torch.Tensor:
    """Add the clipped means of units to their clients' ``sums``; return the norms of the means."""
    means = {n: v / _column(units.counts.clamp(min=1), v) for n, v in units.totals.items()}
    flat = [torch.linalg.vector_norm(v.flatten(1), dim=1) for v in means.values()]
    own: torch.Tensor = torch.linalg.vector_norm(torch.stack(flat), dim=0)
    factors = (clip / own).clamp(max=1.0)
    for name, value in means.items():
        scaled = _kept(value * _column(factors, value), own.isfinite())
        sums[name].index_add_(0, units.keys.div(max(most, 1), rounding_mode="floor"), scaled)
    return own[units.counts > 0]


@dataclass(frozen=True, slots=True)
class _Units:
    """Some units: which, in order, the sums of their records' gradients, and how many records."""

    keys: torch.Tensor
    totals: Stacked
    counts: torch.Tensor

    @classmethod
    def none(cls, params: Stacked, keys: torch.Tensor) -> _Units:
        totals = {n: v.new_zeros(0, *v.shape[1:], dtype=_EXACT) for n, v in params.items()}
        return cls(keys[:0], totals, keys.new_zeros(0, dtype=_EXACT))

    def plus(self, unit: torch.Tensor, part: _Part) -> _Units:
        """Return these and the units of a pass, whose first one may be the last of these."""
        every = torch.cat([self.keys, unit])
        keys, at = every.unique_consecutive(return_inverse=True)  # type: ignore[no-untyped-call]
        at, known = at[len(self.keys) :], len(self.keys)
        totals = {n: v.new_zeros(len(keys), *v.shape[1:]) for n, v in self.totals.items()}
        for name, value in totals.items():
            value[:known] = self.totals[name]
            value.index_add_(0, at, _kept(part.grads[name], part.real).to(_EXACT))
        counts = self.counts.new_zeros(len(keys))
        counts[:known] = self.counts
        return _Units(keys, totals, counts.index_add_(0, at, part.real.to(_EXACT)))

    def but_last(self) -> _Units:
        """Return those of which no more records come."""
        return self._some(slice(None, -1))

    def last(self) -> _Units:
        """Return the one of which more may come."""
        return self._some(slice(-1, None))

    def _some(self, which: slice) -> _Units:
        totals = {n: v[which].clone() for n, v in self.totals.items()}
        return _Units(self.keys[which], totals, self.counts[which])


@dataclass(frozen=True, slots=True)
class _Part:
    """Consecutive ``rows``, equally many of each of ``clients``, and which of them are records."""

    clients: slice
    rows: slice
    real: torch.Tensor
    grads: Stacked
    losses: torch.Tensor


def _parts(
    learner: Learner, params: Stacked, fixed: Stacked, batch: Batch, chunk: int
) -> Iterator[_Part]:
    for clients, rows in _cuts(learner, params, batch, chunk):
        each = (rows.stop - rows.start) // (clients.stop - clients.start)
        part = _taken(batch, rows)
        real = part.weights != 0
        part = replace(part, weights=real.to(part.weights.dtype))
        own, shared = _repeated(params, clients, each), _repeated(fixed, clients, each)
        grads, losses = learner.grads(own, shared, part)
        yield _Part(clients, rows, real, grads, losses)


def _cuts(
    learner: Learner, params: Stacked, batch: Batch, chunk: int
) -> Iterator[tuple[slice, slice]]:
    """Cut into passes, in order: whole clients where ``chunk`` holds them, else parts of one."""
    if chunk < 1:
        raise SpecError(f"per_example: chunk={chunk} must be at least 1")
    chunk = min(chunk, learner.max_group or chunk)
    clients, rows = len(next(iter(params.values()))), len(batch.weights)
    each, left = divmod(rows, clients)
    if left:
        raise ModelError(f"per_example: {rows} rows cannot be dealt evenly to {clients} clients")
    wide, deep = max(1, chunk // max(each, 1)), min(each, chunk)
    for first in range(0, clients if rows else 0, wide):
        last = min(first + wide, clients)
        for start in range(0, each, deep):
            stop = min(start + deep, each)
            yield slice(first, last), slice(first * each + start, (last - 1) * each + stop)


def _taken(batch: Batch, rows: slice | torch.Tensor) -> Batch:
    lengths = batch.lengths[rows] if isinstance(rows, slice) else [batch.lengths[r] for r in rows]
    return replace(
        batch,
        inputs={name: value[rows] for name, value in batch.inputs.items()},
        labels=batch.labels[rows],
        weights=batch.weights[rows],
        lengths=lengths,
    )


def _repeated(stacked: Stacked, clients: slice, each: int) -> Stacked:
    """Repeat every client's tensors for its records; a view for one client or one record each."""
    return {
        name: value[clients].unsqueeze(1).expand(-1, each, *value.shape[1:]).flatten(0, 1)
        for name, value in stacked.items()
    }


def _norms(part: _Part) -> torch.Tensor:
    """Return norms [n] in float64, where squares of large float32 entries do not overflow."""
    each = [
        torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64)
        for grad in part.grads.values()
    ]
    return _kept(torch.linalg.vector_norm(torch.stack(each), dim=0), part.real)


def _kept(value: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return ``value`` [n, ...] with zeros in the other rows, whatever is in them."""
    return torch.where(_column(where, value), value, 0.0)


def _column(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, *[1] * (like.dim() - 1))
