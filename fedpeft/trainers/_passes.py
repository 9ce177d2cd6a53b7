"""What trainers share: the gradients of many clients' batches, in as few passes as they fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.data._batching import longest, several
from fedpeft.per_example import CHUNK, clipped_sums
from fedpeft.rng import derive_seed
from fedpeft.stacking import taken
from fedpeft.types import Batch, Example, Job, Stacked

Rows = NDArray[np.int64]


def gradients(
    job: Job, params: Stacked, chosen: Sequence[Rows], step: int, parts: int = 1
) -> tuple[Stacked, NDArray[np.float64]]:
    """Return the mean gradients [n, ...] of the first n clients, and the sums of their losses [n].

    ``params`` [n, ...] are theirs and ``chosen`` names their records of this step, at least one
    each, worked off in ``parts`` equal parts. Where records are hidden the gradients are noised,
    and a client may have no record in a step.
    """
    if job.hidden:
        return _hidden(job, params, chosen, step, parts)
    sums, total = np.zeros(len(chosen)), dict[str, torch.Tensor]()
    sizes = [math.ceil(len(c) / parts) for c in chosen]
    for j in range(parts):
        rows = [c[j * size : (j + 1) * size] for c, size in zip(chosen, sizes, strict=True)]
        if not any(map(len, rows)):
            break
        found = _part(job, params, rows, [1 / len(c) for c in chosen], (step, j), sums)
        total = {k: total[k] + g for k, g in found.items()} if total else found
    return total, sums


def batches(
    job: Job, order: Callable[[Sequence[Example], int], Iterable[Rows]]
) -> list[list[Rows]]:
    """Return the records of every step of each client, in the trainer's ``order``.

    ``order`` is given a client's examples and seed. Hidden records are drawn by secret coins.
    """
    if job.hidden:
        return [[batch.rows for batch in own.batches] for own in job.hidden]
    return [list(order(e, s)) for e, s in zip(job.examples, job.seeds, strict=True)]


def followed(
    job: Job,
    params: Stacked,
    constants: Stacked,
    chosen: Sequence[Rows],
    step: int,
    parts: int = 1,
) -> tuple[Stacked, Stacked, NDArray[np.float64]]:
    """Return what the first n clients follow in this step, all constants after it, and losses.

    Arguments as of :func:`gradients`; ``constants`` [K, ...] are those of all clients, and so are
    the new ones: who has finished keeps its last.
    """
    grads, sums = gradients(job, params, chosen, step, parts)
    first = {name: value[: len(chosen)] for name, value in constants.items()}
    place = job.elsewhere(params, first)
    there = gradients(job, place, chosen, step, parts)[0] if place else {}
    found, after = job.adjust(grads, params, first, there)
    moving = {_memory(value) for value in params.values()}  # optimizers write over these
    kept = {k: v.clone() if _memory(v) in moving else v for k, v in after.items()}
    return found, {k: _with_first(v, first[k], kept[k]) for k, v in constants.items()}, sums


def _memory(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _with_first(whole: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return ``whole`` with ``new`` in the place of its first rows, ``old``."""
    if new is old:
        return whole
    return new if len(new) == len(whole) else torch.cat([new, whole[len(new) :].to(new)])


def _part(
    job: Job,
    params: Stacked,
    rows: Sequence[Rows],
    weights: Sequence[float],
    moment: tuple[int, int],
    sums: NDArray[np.float64],
) -> Stacked:
    busy = [k for k, row in enumerate(rows) if len(row)]
    lengths = [longest(job.examples[k], rows[k]) for k in busy]
    passes = job.grouping.passes([len(rows[k]) for k in busy], lengths)
    order = [busy[i] for each in passes for i in each]
    sorted_params, sorted_fixed = taken(params, order), taken(job.fixed, order)
    found, start = list[Stacked](), 0
    for each in passes:
        here = slice(start, start + len(each))
        members, start = order[here], here.stop
        batch = _batch(job, members, rows, weights)
        seeds = [derive_seed(job.seeds[k], "dropout", *moment) for k in members]
        own = {name: value[here] for name, value in sorted_params.items()}
        fixed = {name: value[here] for name, value in sorted_fixed.items()}
        grads, losses = job.learner.grads(own, fixed, batch, seeds)
        real = torch.where(batch.weights > 0, losses, 0.0).reshape(len(members), -1)
        sums[members] += real.sum(1).double().cpu().numpy()
        found.append(grads)
    return _put_back(found, order, params)


def _hidden(
    job: Job, params: Stacked, chosen: Sequence[Rows], step: int, parts: int
) -> tuple[Stacked, NDArray[np.float64]]:
    """Return the noised means of clipped gradients [n, ...], and the sums of losses [n]."""
    losses = np.zeros(len(chosen))
    sums = {k: np.zeros(v.shape) for k, v in params.items()}
    busy = [k for k, rows in enumerate(chosen) if len(rows)]
    lengths = [longest(job.examples[k], chosen[k]) for k in busy]
    passes = job.grouping.passes([len(chosen[k]) for k in busy], lengths) if busy else []
    for places in passes:
        members = [busy[i] for i in places]
        batch = _batch(job, members, chosen, [1.0] * len(chosen))
        height = len(batch.weights) // len(members)
        owners = [o for k in members for o in _filled(job.hidden[k].batches[step].owners, height)]
        clipped = clipped_sums(
            job.learner,
            taken(params, members),
            taken(job.fixed, members),
            batch,
            clip=job.hidden[members[0]].bound,
            chunk=max(1, CHUNK // parts),
            owners=owners if any(h.has_units for h in job.hidden) else None,
        )
        real = torch.where(batch.weights > 0, clipped.losses, 0.0).reshape(len(members), -1)
        losses[members] += real.sum(1).double().cpu().numpy()
        for name, value in clipped.exact.items():
            sums[name][members] = value.cpu().numpy()
    each = [
        job.hidden[k].noised(step, {name: value[k] for name, value in sums.items()})
        for k in range(len(chosen))
    ]
    found = {
        name: torch.from_numpy(np.stack([own[name] for own in each])).to(like)
        for name, like in params.items()
    }
    return found, losses


def _filled(owners: Rows, height: int) -> list[int]:
    """Return whose each row is, up to ``height`` rows: what fills up counts nowhere."""
    return [*owners.tolist(), *[0] * (height - len(owners))]


def _batch(
    job: Job, members: Sequence[int], rows: Sequence[Rows], weights: Sequence[float]
) -> Batch:
    """Collate the records of some clients, equally many rows for each."""
    height = max(len(rows[k]) for k in members)
    records, shares = [], []
    for k in members:
        spare = height - len(rows[k])
        records += [*several(job.examples[k], rows[k]), *[None] * spare]
        shares += [weights[k]] * len(rows[k]) + [0.0] * spare
    return job.learner.collate(records, shares)


def _put_back(found: Sequence[Stacked], order: Sequence[int], params: Stacked) -> Stacked:
    """Return the gradients of all passes in the clients' own order; zero where there is none."""
    if len(found) == 1 and order == list(range(len(order))) and len(order) == _clients(params):
        return found[0]
    make = torch.empty_like if len(order) == _clients(params) else torch.zeros_like
    total = {name: make(value) for name, value in params.items()}
    start = 0
    for grads in found:
        end = start + _clients(grads)
        where = torch.tensor(order[start:end], device=next(iter(grads.values())).device)
        for name, value in grads.items():
            total[name].index_copy_(0, where, value)
        start = end
    return total


def _clients(params: Stacked) -> int:
    return len(next(iter(params.values())))
