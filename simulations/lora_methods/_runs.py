"""One run: a plan simulated, and what is kept of it."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import fedpeft
from fedpeft.driver import Line, Quiet, simulate
from fedpeft.engine._base import Engine, Stage
from fedpeft.errors import TrainError
from fedpeft.federation import Federation
from fedpeft.grouping import Grouping
from fedpeft.plan import Plan
from fedpeft.preflight import check
from fedpeft.spec import build
from fedpeft.types import Metrics, Population, Simulation
from fedpeft.wire import Message
from simulations.benchmarks._report import machine
from simulations.lora_methods._plans import GROUP

Run = dict[str, Any]
_T = TypeVar("_T")


def play(plan: Plan, lr: float) -> Run:
    """Run ``plan`` on one core and return what is kept of it.

    Of training that did not stay finite that is the reason, as ``problem``.
    """
    import torch

    torch.set_num_threads(1)
    begun, clock = time.perf_counter(), Clock(build("engine", f"inline(group={GROUP})"))
    checked = check(plan)
    run: Run = {"lr": lr, "seed": plan.seed, "fedpeft": fedpeft.__version__}
    run["machine"] = {**machine(), "torch": torch.__version__}
    run["personalised"] = bool(plan.adapter.roles(checked.shapes, 0).local)
    try:
        result = simulate(plan, engine=clock, watch=clock)
    except TrainError as error:
        return {**run, "problem": str(error)}
    run |= {k: result.table[k] for k in ("rounds", "up_bytes", "down_bytes")}
    run["metrics"] = metrics(result.history[-1], checked.federation)
    run["majority"] = majority(plan, checked.federation)
    run["seen"] = sum(int(line["seen"]) for line in result.history)
    run["seconds"] = round(time.perf_counter() - begun, 1)
    run["server_cpu_s"] = clock.per_round()
    return run


def metrics(last: Line, federation: Federation) -> dict[str, float]:
    """Return the metrics of a round; ``held/`` are the clients' held-out records, pooled."""
    found = {k: float(v) for k, v in last.items() if k.partition("/")[0] in ("test", "clients")}
    per_client: Mapping[str, Metrics] = last["per_client"]
    rows = {client: len(federation.held[client]) for client in per_client}
    for name in ("accuracy", "loss"):
        total = sum(rows[client] * per_client[client][name] for client in rows)
        found[f"held/{name}"] = total / sum(rows.values())
    return {k: round(v, 6) for k, v in sorted(found.items())}


def majority(plan: Plan, federation: Federation) -> dict[str, float]:
    """Return what one answer to everything scores on the test rows and on the held-out records.

    On the test rows it is their most frequent label; of a client's held-out records, the label that
    is most frequent among those it trains on.
    """
    train = plan.task.labels(federation.splits.train) or []
    test = Counter(plan.task.labels(federation.splits.test or []) or [])
    right = total = 0
    for client, rows in federation.train.items():
        (answer, _), *_ = Counter(train[i] for i in rows).most_common(1)
        right += sum(train[i] == answer for i in federation.held[client])
        total += len(federation.held[client])
    return {"held": round(right / total, 6), "test": round(max(test.values()) / test.total(), 6)}


class Clock(Quiet):
    """An engine that separates the clients' CPU seconds from the server's, round by round.

    The server's are what is left of a round: packing what goes down, checking and decoding what
    comes up, aggregating. The last round also evaluates, and does not count.
    """

    def __init__(self, inner: Simulation) -> None:
        self.inner, self.clients = inner, 0.0
        self._at, self._server = 0.0, list[float]()

    def made_with(self) -> Mapping[str, int | str]:
        """Return what the engine within does."""
        return self.inner.made_with()

    def check_device(self, device: str) -> None:
        """Ask the engine within."""
        self.inner.check_device(device)

    @contextmanager
    def start(self, stage: Stage) -> Iterator[Engine]:
        """Start the engine within."""
        with self.inner.start(stage) as engine:
            yield _Clocked(engine, self)

    def begin(self, plan: Plan, round: int) -> None:
        """Start to count."""
        self._at, self.clients = time.process_time(), 0.0

    def round(self, line: Line) -> None:
        """Note what the round took beside its clients."""
        now = time.process_time()
        self._server.append(now - self._at - self.clients)
        self._at, self.clients = now, 0.0

    def per_round(self) -> float | None:
        """Return the median of the server's CPU seconds; ``None`` with one round."""
        return round(statistics.median(self._server[:-1]), 4) if self._server[:-1] else None


class _Clocked:
    """See ``engine._base.Engine``."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine, self._clock, self.remote = engine, clock, engine.remote

    def population(self) -> Population:
        """Return every client with its training records."""
        return self._engine.population()

    def exchange(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Message | bytes | Exception]]:
        """Have all clients play their round before the server sees any reply."""
        packed, begun = list(requests), time.process_time()
        answers = list(self._engine.exchange(packed))
        self._clock.clients += time.process_time() - begun
        yield from answers

    def evaluate(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Metrics | Exception]]:
        """Ask the engine."""
        return self._engine.evaluate(requests)

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Ask the engine."""
        return self._engine.share(clients, work)
