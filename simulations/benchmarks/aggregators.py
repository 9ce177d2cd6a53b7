"""What a server pays per method: seconds and memory for 50 clients of rank 16 on 4096 x 4096.

Updates are made one by one as a server would decode them; a method that needs them all holds them
itself. Where papers multiply the factors out and decompose the [m, n] matrix, that way is timed in
the same run on one module and scaled to all of them. ``peak_over_held`` is the most memory the
method took, over the bytes of all updates, which whoever holds them must have. What
the linear algebra takes once for a process is not in it, nor what the C library keeps of what was
freed. Where a method edits the base, to append its edit is its work, too. Random factors: nothing
here depends on what they say, but for the rank that ``stack(energy=...)`` keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import lowrank
from fedpeft.engine._allocator import give_back, map_large_blocks
from fedpeft.folds import Fold
from fedpeft.rng import derive
from fedpeft.spec import build
from fedpeft.tensors import shapes_of
from fedpeft.types import Folding, Sent, Tensors, Update, Weights
from simulations.benchmarks import _report

CLIENTS, RANK, SIDE, MODULES = 50, 16, 4096, 4
METHODS: Mapping[str, str] = {
    "mean": "AB",
    "flexlora": "AB",
    "lora_fair": "AB",
    "lora_fair(solver='cosine')": "AB",
    "fedsvd": "B",
    "stack": "AB",
    "stack(energy=0.9)": "AB",
    "fedex": "AB",
    "frlora": "AB",
}
"""Aggregators, and the factors that travel up to them."""
DENSE: Mapping[str, str] = {"flexlora": "sum", "stack(energy=0.9)": "sum", "fedsvd": "mean"}
"""Which matrix is decomposed the dense way."""
_STATUS = Path("/proc/self/status")


class Cohort:
    """Clients of one shape; every update is made anew when it is asked for."""

    def __init__(self, clients: int, rank: int, side: int, modules: int) -> None:
        self.clients, self.rank, self.side = clients, rank, side
        self.names = [f"layer{i}" for i in range(modules)]

    def sent(self, up: str) -> Sent:
        """Return the adapter the clients were sent; the factors ``up`` come back, if any."""
        held = self._tensors("sent", "AB" if up else "", 1.0)
        moving = {k: v for k, v in held.items() if k.split("lora_")[1][0] in up}
        return Sent(moving, {k: v for k, v in held.items() if k not in moving})

    def updates(self, up: str, fresh: str = "") -> Iterator[Update]:
        """Yield one update after the other; factors begin anew by ``client`` or by ``round``."""
        begun = self.begun("round") if fresh == "round" else {}
        for i in range(self.clients):
            own = self.begun(f"begin {i}") if fresh == "client" else begun
            sent = Sent(own) if own else None
            yield Update(f"c{i}", self._tensors(f"c{i}", up, 0.1), 1.0, 1.0, sent=sent)

    def begun(self, owner: str) -> Tensors:
        """Return factors as they begin: ``B`` zero."""
        drawn = self._tensors(owner, "A", 1.0)
        zeros = {lowrank.factors(m)[1]: np.zeros((self.side, self.rank), "f4") for m in self.names}
        return {**drawn, **zeros}

    def bytes(self, up: str) -> int:
        """Return the bytes of all updates."""
        return 4 * self.clients * len(self.names) * len(up) * self.rank * self.side

    def _tensors(self, owner: str, factors: str, scale: float) -> Tensors:
        rng = derive(0, "aggregators", owner)
        shapes = {"A": (self.rank, self.side), "B": (self.side, self.rank)}
        return {
            f"{name}.lora_{factor}.weight": scale * rng.standard_normal(shapes[factor], np.float32)
            for name in self.names
            for factor in factors
        }


def measure(quick: bool) -> dict[str, Any]:
    """Return a row for each method."""
    cohort = Cohort(5, 4, 256, 2) if quick else Cohort(CLIENTS, RANK, SIDE, MODULES)
    shape = {"clients": cohort.clients, "rank": cohort.rank, "side": cohort.side}
    shape["modules"] = len(cohort.names)
    one = Cohort(cohort.clients, cohort.rank, cohort.side, 1)
    dense = {
        "sum": _seconds(lambda: _dense(one, _summed(one))) - _seconds(lambda: _made(one, "AB")),
        "mean": _seconds(lambda: _dense(one, _mean(one))) - _seconds(lambda: _made(one, "B")),
    }
    map_large_blocks()
    _warm(one)
    making: dict[tuple[str, str], float] = {}
    rows = []
    for spec, up in METHODS.items():
        method = build("aggregators", spec)
        needs = getattr(method, "needs", {})
        fresh = "client" if "fresh" in needs else "round" if "common-start" in needs else ""
        if (up, fresh) not in making:
            making[up, fresh] = _seconds(partial(_made, cohort, up, fresh))
        weights = Weights({}, float(cohort.clients))
        sent = cohort.sent("" if fresh else up)
        fold = Fold.empty(shapes_of(cohort.begun("round")))
        before = _resident(reset=True)
        began = time.perf_counter()
        step = method.reduce(cohort.updates(up, fresh), sent, weights)
        after = fold.plus(step.fold, 1, ())
        seconds = max(1e-9, time.perf_counter() - began - making[up, fresh])
        peak = _resident() - before
        row = {**shape, "method": spec, "seconds": round(seconds, 3)}
        row["held_mb"] = round(cohort.bytes(up) / 1e6, 1)
        row["peak_over_held"] = round(peak / cohort.bytes(up), 2) if before else None
        if isinstance(method, Folding):
            row["ranks_added"] = max(after.ranks[1])
        if spec in DENSE:
            whole = dense[DENSE[spec]] * len(cohort.names)
            row |= {"dense_seconds": round(whole, 2), "times_faster": round(whole / seconds, 1)}
        rows.append(row)
    return {"rows": rows}


def _warm(cohort: Cohort) -> None:
    """Decompose a sum, for which the libraries take memory that they keep."""
    products = [lowrank.product(update.delta, cohort.names[0]) for update in cohort.updates("AB")]
    lowrank.svd(lowrank.total([(1.0, value) for value in products]), overwrite=True)


def _made(cohort: Cohort, up: str, fresh: str = "") -> int:
    """Make every update and let it go."""
    return sum(len(update.delta) for update in cohort.updates(up, fresh))


def _summed(cohort: Cohort) -> np.ndarray:
    """Form the mean of one module's products, client by client, in float32."""
    total = np.zeros((cohort.side, cohort.side), np.float32)
    for update in cohort.updates("AB"):
        found = lowrank.product(update.delta, cohort.names[0])
        total += np.float32(1 / cohort.clients) * (found.b @ found.a)
    return total


def _mean(cohort: Cohort) -> np.ndarray:
    """Form the product of the mean ``B`` and the common ``A``."""
    a, b = lowrank.factors(cohort.names[0])
    mean = sum(update.delta[b] for update in cohort.updates("B")) / np.float32(cohort.clients)
    return np.asarray(mean @ cohort.sent("B").still[a])


def _dense(cohort: Cohort, formed: np.ndarray) -> np.ndarray:
    """Decompose the matrix as papers do, and cut it to the rank."""
    u, s, _ = np.linalg.svd(formed, full_matrices=False)
    return np.asarray(u[:, : cohort.rank] * s[: cohort.rank])


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _resident(reset: bool = False) -> int:
    """Return the most bytes in memory since the last reset; 0 where the system does not tell.

    What others have freed is given back first, or a method that takes it again would look small.
    """
    try:
        if reset:
            give_back()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if "VmHWM" in line), 0)


if __name__ == "__main__":
    _report.main("aggregators", measure)
