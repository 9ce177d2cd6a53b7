"""Measures what passes of growing size cost, on the plan's own records, and chooses a grouping."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.data._batching import length
from fedpeft.engine._allocator import give_back, keep_freed_memory
from fedpeft.engine._player import TOO_LARGE
from fedpeft.errors import TrainError
from fedpeft.grouping import Grouping
from fedpeft.out_of_memory import is_out_of_memory, release
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


def measured(site: Site, memory: float | None, workers: int = 1) -> Grouping:
    """Return the fastest grouping whose passes fit into ``memory`` (GB).

    Without it, as many ``workers`` as train at once may take half of what is free. A pass of 1, 2,
    4 ... clients is timed with records of middle length, until larger ones gain nothing, do not
    fit, or there are not so many clients. Raises ``TrainError`` where not even one client fits.
    """
    keep_freed_memory()  # as in training
    free = _SHARE * _free_memory(site.learner.device) / workers
    allowed = 1e9 * memory if memory else free
    most = min(_LARGEST, max(1, round(site.plan.cohort.expected(len(site.federation.population)))))
    record, height = _typical(site)
    found, width = list[tuple[float, float]](), 1
    best, used = float("inf"), 0
    while width <= most and 2 * used <= allowed:  # a pass twice as large takes twice as much
        try:
            seconds, used = _timed(site, record, width, height)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if width == 1:
                raise TrainError(TOO_LARGE) from None
            break
        if used > allowed and width > 1:
            break
        found.append((float(width * height * length(record)), seconds))
        if seconds / width > _WORSE * best:
            break
        best = min(best, seconds / width)
        width *= 2
    release(site.learner.device)
    rates = [seconds / 2**i for i, (_, seconds) in enumerate(found)]
    chosen = rates.index(min(rates))
    return Grouping(2**chosen, tuple(found[: chosen + 1])) if chosen else Grouping()


def _typical(site: Site) -> tuple[Example, int]:
    """Return a record of middle length, and how many a client of middle size has in a batch."""
    rng = derive(site.plan.seed, "measure")
    names = list(site.federation.population)
    some = rng.choice(len(names), min(_SAMPLE, len(names)), replace=False)
    pool = [site.train(names[i])[0] for i in sorted(some)]
    pool.sort(key=length)
    sizes = sorted(site.federation.population[names[i]] for i in some)
    steps, seen = site.plan.trainer.budget(sizes[len(sizes) // 2])
    return pool[len(pool) // 2], max(1, round(seen / steps))


def _timed(site: Site, record: Example, width: int, height: int) -> tuple[float, int]:
    """Return the seconds and the bytes at the peak of one pass of ``width`` clients."""
    learner, roles = site.learner, site.tables.roles(0)
    stacked = stack([site.initial] * width, learner.device)
    params = {k: v.clone() for k, v in stacked.items() if k in roles.train}
    fixed = {k: v for k, v in stacked.items() if k not in roles.train}
    batch = learner.collate([record] * (width * height), [1 / height] * (width * height))
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
    give_back()  # what lies freed in this process would hide what the pass takes
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


def _free_memory(device: Any) -> int:
    """Return how many bytes are free on ``device``: a GPU's, or what the system can give."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
        return min(1024 * int(found["MemAvailable"].split()[0]), _container_limit())
    except (OSError, KeyError, ValueError):
        return 1 << 31


def _container_limit() -> int:
    """Return what is left of the limit of this process's control group, if it has one."""
    try:
        most, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii").strip()
            for name in ("max", "current")
        )
    except OSError:
        return sys.maxsize
    return int(most) - int(used) if most.isdigit() else sys.maxsize
