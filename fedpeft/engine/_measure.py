"""Measures what passes of growing size cost, on the plan's own records, and chooses a grouping."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.data._batching import length
from fedpeft.engine._player import free_memory, is_out_of_memory, release
from fedpeft.grouping import Grouping
from fedpeft.rng import derive
from fedpeft.stacking import stack
from fedpeft.types import Example, Stacked

if TYPE_CHECKING:
    from fedpeft.site import Site

_LARGEST = 256
_WORSE = 1.1
"""Growth of the time per client at which larger groups are no longer tried."""
_TIMES, _SECONDS = 3, 1.0
"""A size is measured at most so often, and for so long; the fastest counts."""
_SAMPLE = 64
_SHARE = 0.5
"""Part of the free memory that a pass may take where nothing was said."""


def measured(site: Site, memory: float | None) -> Grouping:
    """Return the fastest grouping whose passes fit into ``memory`` (GB; None: half of the free).

    A pass of 1, 2, 4 ... clients is timed with records of middle length, until larger ones gain
    nothing, do not fit, or there are not so many clients.
    """
    allowed = 1e9 * memory if memory else _SHARE * free_memory(site.learner.device)
    most = min(_LARGEST, max(1, round(site.plan.cohort.expected(len(site.federation.population)))))
    records, height = _typical(site)
    found, width = list[tuple[float, float]](), 1
    best, used = float("inf"), list[int]()
    failed = False
    while width <= most:
        if used and _expected(used) > allowed:
            break
        try:
            seconds, peak = _timed(site, records, width, height)
        except (RuntimeError, MemoryError) as error:
            if width == 1 or not is_out_of_memory(error):
                raise
            failed = True
        if failed:
            release(site.learner.device)
            break
        used.append(peak)
        if peak > allowed and width > 1:
            break
        found.append((float(width * height * length(records[0])), seconds))
        if seconds / width > _WORSE * best:
            break
        best = min(best, seconds / width)
        width *= 2
    rates = [seconds / 2**i for i, (_, seconds) in enumerate(found)]
    chosen = rates.index(min(rates))
    return Grouping(2**chosen, tuple(found[: chosen + 1])) if chosen else Grouping()


def _typical(site: Site) -> tuple[list[Example], int]:
    """Return a client's records of middle length, and how many of them are in a batch."""
    rng = derive(site.plan.seed, "measure")
    names = list(site.federation.population)
    some = rng.choice(len(names), min(_SAMPLE, len(names)), replace=False)
    pool = [site.train(names[i])[0] for i in sorted(some)]
    pool.sort(key=length)
    sizes = sorted(site.federation.population[names[i]] for i in some)
    steps, seen = site.plan.trainer.budget(sizes[len(sizes) // 2])
    return [pool[len(pool) // 2]], max(1, round(seen / steps))


def _timed(site: Site, records: Sequence[Example], width: int, height: int) -> tuple[float, int]:
    """Return the seconds and the bytes at the peak of one pass of ``width`` clients."""
    learner, roles = site.learner, site.tables.roles(0)
    stacked = stack([site.initial] * width, learner.device)
    params = {k: v.clone() for k, v in stacked.items() if k in roles.train}
    fixed = {k: v for k, v in stacked.items() if k not in roles.train}
    batch = learner.collate([records[0]] * (width * height), [1 / height] * (width * height))
    best, begun, times = float("inf"), time.perf_counter(), 0
    with _peak(learner.device) as peak:
        learner.grads(params, fixed, batch)
    while times < _TIMES and (not times or time.perf_counter() - begun < _SECONDS):
        start = time.perf_counter()
        _finished(learner.grads(params, fixed, batch)[0])
        best, times = min(best, time.perf_counter() - start), times + 1
    return best, peak.bytes


def _finished(grads: Stacked) -> None:
    """Wait for a device that works on its own."""
    import torch

    if any(g.is_cuda for g in grads.values()):
        torch.cuda.synchronize()


@dataclass
class _Peak:
    bytes: int = 0


@contextlib.contextmanager
def _peak(device: Any) -> Iterator[_Peak]:
    """Measure how much memory is taken on top of what is held; 0 where nothing can tell."""
    import torch

    found = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    before = _resident(reset=True)
    yield found
    found.bytes = max(0, _resident() - before)


def _resident(reset: bool = False) -> int:
    """Return the most bytes this process had in memory since the last reset (Linux)."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in status.splitlines() if "VmHWM" in x), 0)


def _expected(used: Sequence[int]) -> float:
    """Foresee the peak of a pass twice as large as the last one."""
    return 2.0 * used[-1]
