"""A learner without a model: every record pulls the parameters to a place of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.broadcasts import broadcast, header
from fedpeft.client_rounds import client_round
from fedpeft.mean_gradients import mean_gradients
from fedpeft.memory import InProcess, MemoryStore
from fedpeft.plan import Plan
from fedpeft.releases import chooser
from fedpeft.rounds import server_round
from fedpeft.state import ServerState, start
from fedpeft.tables import Tables
from fedpeft.types import Batch, Example, Metrics, Stacked, Tensors
from fedpeft.weighing import weighed

F64 = NDArray[np.float64]


def record(number: int, length: int = 1) -> Example:
    """Return the record of row ``number``, ``length`` tokens long."""
    return {"input_ids": np.full(length, number, dtype=np.int64)}


@dataclass
class Quadratic:
    """Record r has loss ``sum(curves[r] * (x - places[r])^2) / 2`` in ``x`` [K, d].

    A tensor ``bowl``, where there is one, adds ``|bowl|^2 / 2`` to every loss.
    """

    curves: F64
    places: F64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_group: int | None = None

    def collate(self, records: Sequence[Example | None], weights: Sequence[float]) -> Batch:
        """Keep the row numbers."""
        rows = torch.tensor([0 if r is None else int(r["input_ids"][0]) for r in records])
        lengths = [0 if r is None else len(r["input_ids"]) for r in records]
        return Batch({"rows": rows}, rows, torch.tensor(weights, dtype=torch.float64), lengths)

    def grads(
        self,
        params: Stacked,
        fixed: Stacked,
        batch: Batch,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Stacked, torch.Tensor]:
        """Return gradients and losses as a model's learner does."""
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        losses = self._losses({**fixed, **leaves}, batch.labels)
        found = torch.autograd.grad((losses * batch.weights).sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True)), losses.detach()

    def evaluate(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Metrics]:
        """Return the mean loss of each client."""
        found = []
        for own, records in zip(tensors, examples, strict=True):
            rows = torch.tensor([int(e["input_ids"][0]) for e in records])
            stacked = {k: torch.from_numpy(np.array(v)).double()[None] for k, v in own.items()}
            found.append({"loss": float(self._losses(stacked, rows).mean())})
        return found

    def grams(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Tensors]:
        """Return nothing: no tensor is a factor."""
        return [{} for _ in tensors]

    def mean_gradients(
        self,
        tensors: Sequence[Tensors],
        names: Collection[str],
        examples: Sequence[Sequence[Example]],
        width: int = 1,
    ) -> Sequence[tuple[Tensors, float]]:
        """Return mean gradients and losses as a model's learner does."""
        return mean_gradients(self, tensors, names, examples, width, rows=4)

    def _losses(self, params: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        x = params["x"]
        each = len(rows) // len(x)
        curves, places = torch.from_numpy(self.curves)[rows], torch.from_numpy(self.places)[rows]
        distance = x.repeat_interleave(each, dim=0) - places
        losses = (curves * distance**2).sum(1) / 2
        if "bowl" in params:
            losses = losses + (params["bowl"].flatten(1) ** 2).sum(1).repeat_interleave(each) / 2
        return losses

    def minimum(self, rows: Sequence[int] | slice = slice(None)) -> F64:
        """Return where the mean loss of ``rows`` is least."""
        found: F64 = (self.curves[rows] * self.places[rows]).sum(0) / self.curves[rows].sum(0)
        return found


@dataclass
class QuadraticSite:
    """What ``rounds`` needs to play clients; every client holds the records of ``held``."""

    learner: Quadratic
    tables: Tables
    initial: Tensors
    held: Mapping[str, Sequence[Example]]

    def train(self, client: str) -> Sequence[Example]:
        """Return the client's records."""
        return self.held[client]


def quadratic_plan(**lines: Any) -> Plan:
    """Return a plan whose model and data are never read."""
    return Plan.from_lines(
        {
            "model": "tiny-novels",
            "task": "classify",
            "data": "embedded(name='support')",
            "adapter": "full",
            "trainer": "plain(optimizer='sgd', lr=0.2, steps=4, batch=1)",
            "rounds": 1000,
        }
        | lines
    )


def play(
    plan: Plan,
    learner: Quadratic,
    rounds: int,
    memories: InProcess | None = None,
    *,
    copies: Sequence[int] | None = None,
    replying: Callable[[int, str], bool] = lambda *_: True,
    rates: Mapping[str, float] | None = None,
    store: MemoryStore | None = None,
    state: ServerState | None = None,
) -> Iterator[ServerState]:
    """Play whole rounds, packets and memories included; client i holds record i alone.

    It has ``copies`` of it, by default one. Who is asked in a round answers if ``replying``. Goes
    on from ``state``, up to round ``rounds``.
    """
    memories, store = memories or InProcess(), store or InProcess()
    count, width = learner.curves.shape
    held = {f"client-{i}": [record(i)] * (copies or [1] * count)[i] for i in range(count)}
    tables = Tables(plan, {"x": (width,)})
    population = {name: len(records) for name, records in held.items()}
    site = QuadraticSite(learner, tables, {"x": np.zeros(width, np.float32)}, held)
    state = state or start(plan, tables, site.initial)
    for round in range(state.round, rounds):
        cohort = chooser(plan, state, list(held))(list(held))
        weights = weighed(plan, state, cohort, population, rates=rates)
        sealed, replies = broadcast(plan, tables, state), []
        for name in [name for name in cohort if replying(round, name)]:
            message, memory = sealed.seal(header(state, "run", name)), memories.load(name)
            reply, after = client_round(plan, site, name, message, memory)
            memories.save(name, after)
            replies.append((name, reply))
        state, report = server_round(
            plan, tables, state, "run", population, weights, replies, store=store
        )
        if report.refused:
            raise AssertionError(f"round {round}: {report.refused}")
        yield state
