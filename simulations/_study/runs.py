"""One run: a plan simulated, and what is kept of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fedpeft
from fedpeft.driver import Result, simulate
from fedpeft.errors import RunError, TrainError
from fedpeft.federation import Federation
from fedpeft.plan import Plan
from fedpeft.preflight import check
from fedpeft.spec import build
from fedpeft.tables import Tables
from fedpeft.tensors import size
from fedpeft.types import Metrics, Shapes
from fedpeft.watching import Line
from simulations._study.clock import Clock
from simulations._study.store import Run
from simulations.benchmarks._report import machine


def play(
    plan: Plan,
    lr: float,
    group: int,
    more: Callable[[Result], Mapping[str, Any]] = lambda _: {},
) -> Run:
    """Run ``plan`` on one core, ``group`` clients in a pass, and return what is kept of it.

    What else is kept, ``more`` makes of the result. Of training that did not stay
    finite that is the reason, as ``problem``.
    """
    import torch

    torch.set_num_threads(1)
    begun, clock = time.perf_counter(), Clock(build("engine", f"inline(group={group})"))
    checked = check(plan)
    run: Run = {"lr": lr, "seed": plan.seed, "fedpeft": fedpeft.__version__}
    run["machine"] = {**machine(), "torch": torch.__version__}
    run["personalised"] = bool(plan.adapter.roles(checked.shapes, 0).local)
    try:
        result = simulate(plan, engine=clock, watch=clock)
    except (TrainError, RunError) as error:
        return {**run, "problem": str(error)}
    run |= {k: result.table[k] for k in ("rounds", "up_bytes", "down_bytes")}
    run["metrics"] = metrics(result.history[-1], checked.federation)
    if plan.task.labels(checked.federation.splits.train) is not None:
        run["majority"] = majority(plan, checked.federation)
    run["float32_bytes"] = float32_bytes(plan, checked.shapes, result.history)
    run["refused"] = sum(len(line.get("refused", {})) for line in result.history)
    run["seen"] = sum(int(line.get("seen", 0)) for line in result.history)
    run |= more(result)
    run["seconds"] = round(time.perf_counter() - begun, 1)
    run["server_cpu_s"] = clock.per_round()
    return run


def metrics(last: Line, federation: Federation) -> dict[str, float]:
    """Return the metrics of a round; ``held/`` is the mean over the clients' held-out records."""
    found = {k: float(v) for k, v in last.items() if k.partition("/")[0] in ("test", "clients")}
    per_client: Mapping[str, Metrics] = last.get("per_client", {})
    rows = {client: len(federation.held[client]) for client in per_client}
    for name in ("accuracy", "loss") if rows else ():
        if any(name not in own for own in per_client.values()):
            continue  # texts have no accuracy
        total = sum(rows[client] * per_client[client][name] for client in rows)
        found[f"held/{name}"] = total / sum(rows.values())
    return {k: round(v, 6) for k, v in sorted(found.items())}


def majority(plan: Plan, federation: Federation) -> dict[str, float]:
    """Return what one answer to everything scores on the test rows and on the held-out records.

    On the test rows it is their most frequent label; of a client's held-out records, the label that
    is most frequent among those it trains on; without such records there is no such score.
    """
    train = plan.task.labels(federation.splits.train) or []
    test = Counter(plan.task.labels(federation.splits.test or []) or [])
    right = total = 0
    for client, rows in federation.train.items():
        (answer, _), *_ = Counter(train[i] for i in rows).most_common(1)
        right += sum(train[i] == answer for i in federation.held[client])
        total += len(federation.held[client])
    held = {"held": round(right / total, 6)} if total else {}
    return {**held, "test": round(max(test.values()) / test.total(), 6)}


def float32_bytes(plan: Plan, shapes: Shapes, history: Sequence[Line]) -> int:
    """Return what came up in all rounds as float32, four bytes a value and nothing else."""
    tables, found = Tables(plan, shapes), 0
    for line in history:
        at = int(line["round"])
        for client in line["replied"]:
            sections = tables.of(client, at).up(at)
            found += 4 * sum(size(section.values()) for section in sections.values())
    return found
