"""What trainers share: the gradients of many clients' batches, in as few passes as they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.data._batching import length
from fedpeft.rng import derive_seed
from fedpeft.stacking import taken
from fedpeft.types import Job, Stacked

Rows = NDArray[np.int64]


def gradients(
    job: Job, params: Stacked, chosen: Sequence[Rows], step: int, parts: int = 1
) -> tuple[Stacked, NDArray[np.float64]]:
    """Return the mean gradients [n, ...] of the first n clients, and the sums of their losses [n].

    ``params`` [n, ...] are theirs and ``chosen`` names their records of this step, at least one
    each, worked off in ``parts`` equal parts.
    """
    sums, total = np.zeros(len(chosen)), dict[str, torch.Tensor]()
    part = math.ceil(max(map(len, chosen)) / parts)
    for at in range(0, max(map(len, chosen)), part):
        rows = [c[at : at + part] for c in chosen]
        found = _part(job, params, rows, [1 / len(c) for c in chosen], (step, at), sums)
        total = {k: total[k] + g for k, g in found.items()} if total else found
    return total, sums


def _part(
    job: Job,
    params: Stacked,
    rows: Sequence[Rows],
    weights: Sequence[float],
    moment: tuple[int, int],
    sums: NDArray[np.float64],
) -> Stacked:
    busy = [k for k, row in enumerate(rows) if len(row)]
    lengths = [max(length(job.examples[k][i]) for i in rows[k]) for k in busy]
    passes = job.grouping.passes([len(rows[k]) for k in busy], lengths)
    total: Stacked = {}
    for each in passes:
        members = [busy[i] for i in each]
        grads, losses = _one_pass(job, params, members, rows, weights, moment)
        sums[members] += losses
        if len(members) == len(rows):  # all, in their order
            return grads
        if not total:  # every client with records is in one pass
            make = torch.empty_like if len(busy) == len(rows) else torch.zeros_like
            total = {k: make(v) for k, v in params.items()}
        where = torch.tensor(members, device=job.learner.device)
        for name, grad in grads.items():
            total[name].index_copy_(0, where, grad)
    return total


def _one_pass(
    job: Job,
    params: Stacked,
    members: Sequence[int],
    rows: Sequence[Rows],
    weights: Sequence[float],
    moment: tuple[int, int],
) -> tuple[Stacked, NDArray[np.float64]]:
    """Return gradients [len(members), ...] and sums of losses of some clients."""
    height = max(len(rows[k]) for k in members)
    records, shares = [], []
    for k in members:
        spare = height - len(rows[k])
        records += [*(job.examples[k][i] for i in rows[k]), *[None] * spare]
        shares += [weights[k]] * len(rows[k]) + [0.0] * spare
    batch = job.learner.collate(records, shares)
    seeds = [derive_seed(job.seeds[k], "dropout", *moment) for k in members]
    grads, losses = job.learner.grads(
        taken(params, members), taken(job.fixed, members), batch, seeds
    )
    real = torch.where(batch.weights > 0, losses, 0.0)
    return grads, real.reshape(len(members), height).sum(1).double().cpu().numpy()
