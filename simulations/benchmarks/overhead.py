"""What a client-task costs beside its training: the round's own work, against Flower's simulation.

Both sides move the same update, 64 float32 tensors of 4 MB in all (or a tiny one), down and up and
into the server's average; neither trains. fedpeft does it in this process with every check of a
real round (decoding, shapes, finite values, weighted sum); Flower by its simulation runtime (Ray,
one worker) with its own FedAvg, as an array record of 64 arrays, start-up excluded.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedpeft.broadcasts import broadcast, header
from fedpeft.client_rounds import client_round
from fedpeft.flower.environment import QUIET
from fedpeft.memory import Memory
from fedpeft.plan import Plan
from fedpeft.rounds import server_round
from fedpeft.spec import method
from fedpeft.state import start
from fedpeft.tables import Tables
from fedpeft.types import Example, Fit, Job, Learner, Shapes, Tensors, Trainer
from fedpeft.weighing import weighed
from fedpeft.wire import Message
from simulations.benchmarks import _report

LARGE: Shapes = {f"layer{i}.lora_{'AB'[i % 2]}.weight": (16, 1024) for i in range(64)}
TINY: Shapes = {f"layer{i}.lora_{'AB'[i % 2]}.weight": (4, 16) for i in range(4)}
LINES = {
    "model": "tiny-novels",
    "task": "causal_lm",
    "data": 'embedded(name="support")',
    "trainer": "simulations.benchmarks.overhead:Still()",
    "clients": 10,
    "rounds": 1000,
}


SPENT = {"training": 0.0}


@method
class Still(Trainer):
    """Trains nothing: returns a copy of what it was given."""

    def fit(self, job: Job) -> Fit:
        """Return copies of the parameters, and count what that takes as training."""
        began = time.perf_counter()
        params = {name: value.clone() for name, value in job.params.items()}
        SPENT["training"] += time.perf_counter() - began
        return Fit(params, [1], [1.0], [1], [0.5])

    def budget(self, records: int) -> tuple[int, int]:
        """One step."""
        return 1, 1

    def seeing(self, records: int) -> Still:
        """The same."""
        return self


class Idle:
    """A client without a model; see ``rounds.Client``."""

    def __init__(self, plan: Plan, shapes: Shapes) -> None:
        self.tables = Tables(plan, shapes)
        rng = np.random.default_rng(0)
        self.initial: Tensors = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}

    @property
    def learner(self) -> Learner:
        """Only its device is asked for."""
        import torch

        class Cpu:
            device = torch.device("cpu")

        return Cpu()  # type: ignore[return-value]

    def train(self, client: str) -> Sequence[Example]:
        """No data."""
        return []


def ours(shapes: Shapes, tasks: int, rounds: int) -> list[float]:
    """Return milliseconds per client-task, one figure per round of ``tasks`` clients."""
    from fedpeft.types import Roles

    plan = Plan.from_lines(LINES)
    site = Idle(plan, shapes)
    everything = frozenset(shapes)
    site.tables.roles = lambda round: Roles(everything, everything, everything)  # type: ignore[method-assign]
    names = [f"client-{i:03d}" for i in range(tasks)]
    population = dict.fromkeys(names, 10)
    state = start(plan, site.tables, site.initial)
    found = []
    for _ in range(rounds):
        began, SPENT["training"] = time.perf_counter(), 0.0
        weights = weighed(plan, state, names, population)
        body, at = broadcast(plan, site.tables, state), state

        def replies(at: Any = at, body: Any = body) -> Iterator[tuple[str, Message]]:
            for name in names:
                message = body.seal(header(at, "run", name))
                yield name, client_round(plan, site, name, message, Memory())[0]

        state, report = server_round(
            plan, site.tables, state, "run", population, weights, replies()
        )
        if len(report.replied) != tasks:
            raise RuntimeError(f"refused: {dict(report.refused)}")
        found.append(1e3 * (time.perf_counter() - began - SPENT["training"]) / tasks)
    return found


def flower(shapes: Shapes, tasks: int, rounds: int) -> list[float]:
    """Return milliseconds per client-task of Flower's simulation, one figure per round."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, found = ClientApp(), ServerApp(), list[float]()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        content = {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": 10}),
        }
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < tasks:
            time.sleep(0.1)
        rng = np.random.default_rng(0)
        arrays = ArrayRecord([rng.standard_normal(s, np.float32) for s in shapes.values()])
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=tasks)
        from flwr.app import ConfigRecord

        for number in range(rounds + 1):
            began = time.perf_counter()
            messages = strategy.configure_train(number, arrays, ConfigRecord({}), grid)
            answers = grid.send_and_receive(list(messages))
            aggregated, _ = strategy.aggregate_train(number, answers)
            arrays = aggregated or arrays
            if number:  # the first starts the worker
                found.append(1e3 * (time.perf_counter() - began) / tasks)

    run_simulation(
        server,
        client,
        num_supernodes=tasks,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}},
    )
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Return medians for both sizes and both sides."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ.update(QUIET, RAY_USAGE_STATS_ENABLED="0")
    tasks, rounds = 10, 5 if quick else 20
    rows = []
    for name, shapes in (("4 MB in 64 tensors", LARGE), ("tiny, 4 tensors", TINY)):
        own = ours(shapes, tasks, 4 * rounds)[rounds:]
        other = flower(shapes, tasks, rounds)
        rows.append(
            {
                "update": name,
                "fedpeft_ms": round(float(np.median(own)), 3),
                "fedpeft_least_ms": round(min(own), 3),
                "flower_ms": round(float(np.median(other)), 3),
                "ratio": round(float(np.median(other) / np.median(own)), 1),
            }
        )
    return {"rows": rows, "targets_ms": {"4 MB in 64 tensors": 2.0, "tiny, 4 tensors": 0.6}}


if __name__ == "__main__":
    _report.main("overhead", measure)
