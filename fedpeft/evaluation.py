"""Evaluation: on the server's test set, and federated on each client's held-out records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.client_rounds import ALONE, Asked, Client, receive
from fedpeft.grouping import Grouping
from fedpeft.local_models import for_evaluation
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.tensors import padded
from fedpeft.types import Example, Metrics

_LOWER_IS_BETTER = ("loss", "perplexity")
EVALUATED = {"test": "the server's test set", "clients": "held-out records of the clients"}
"""What the places are, before the names of metrics."""
EACH_ALONE = "alone_per_client"
"""The name of each client's metrics on its held-out records after training alone."""
_OWN = "personal/"
"""Before the names of a personal adapter's metrics, which come with those of the shared one."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far, and how many have passed since."""

    value: float = math.nan
    round: int = -1
    stale: int = 0

    def after(self, round: int, value: float, metric: str) -> Best:
        """Return this record once ``round`` scored ``value``."""
        if math.isnan(self.value) or is_better(metric, value, self.value):
            return Best(value, round, 0)
        return Best(self.value, self.round, self.stale + 1)


def is_better(metric: str, value: float, than: float) -> bool:
    """Compare two values of a metric such as ``clients/loss_worst_decile``."""
    name = metric.rpartition("/")[2].removesuffix("_worst_decile")
    return value < than if name in _LOWER_IS_BETTER else value > than


def scored(
    history: Sequence[Mapping[str, Any]], keep_best: str | None, best: Best
) -> Mapping[str, Any]:
    """Return the ledger line with the metrics of what is exported; empty where there is none."""
    lines = [line for line in history if any("/" in name for name in line)]
    if keep_best is not None and best.round >= 0:
        lines = [line for line in lines if line["round"] == best.round]
    return lines[-1] if lines else {}


def group_evaluation(
    plan: Plan,
    site: Client,
    asked: Sequence[Asked],
    held: Sequence[Sequence[Example]],
    grouping: Grouping = ALONE,
) -> Sequence[Metrics]:
    """Return the metrics of what each client holds after its message on its held-out records.

    One that has less than the whole adapter is evaluated with what it has. Those of its personal
    adapter, where the plan has any, are named ``personal/<metric>``. Clients share passes as
    ``grouping`` allows; more of them where all hold the same.
    """
    clients, shapes = [a.client for a in asked], site.tables.shapes
    received = [receive(plan, site, a, training=False) for a in asked]
    tensors = padded([got.tensors for got in received], shapes)
    found = site.learner.evaluate(tensors, held, grouping.width)
    personal = for_evaluation(plan, site, clients, received, grouping)
    if not personal:
        return found
    own = site.learner.evaluate(padded(personal, shapes), held, grouping.width)
    named = [{f"{_OWN}{name}": value for name, value in metrics.items()} for metrics in own]
    return [{**shared, **other} for shared, other in zip(found, named, strict=True)]


def evaluated_clients(plan: Plan, clients: Sequence[str]) -> Sequence[str]:
    """Return whom federated evaluation asks: all, or the same ``eval_clients`` in every round."""
    count = plan.eval_clients
    if count is None or count >= len(clients):
        return list(clients)
    chosen = derive(plan.seed, "evaluation").choice(len(clients), count, replace=False)
    return [clients[i] for i in sorted(chosen)]


def reported(plan: Plan, answers: Iterable[tuple[str, Metrics | Exception]]) -> dict[str, Any]:
    """Return what the ledger says of a federated evaluation: summaries, and each client's metrics.

    ``not_evaluated`` says why a client, or its personal adapter, has none.
    """
    names, refused = {*plan.task.measures}, dict[str, str]()
    has_own = plan.personal.when != "never"
    expected = names | ({f"{_OWN}{name}" for name in names} if has_own else set())
    shared, personal = dict[str, Metrics](), dict[str, Metrics]()
    for client, metrics in answers:
        if isinstance(metrics, Exception):
            refused[client] = str(metrics)[:300]
            continue
        main = {k: v for k, v in metrics.items() if k in names}
        own = {k.removeprefix(_OWN): v for k, v in metrics.items() if k not in names}
        if {*metrics} != expected or not all(map(math.isfinite, main.values())):
            refused[client] = "its metrics are not the task's, or not finite"
            continue
        shared[client] = main
        if has_own and all(map(math.isfinite, own.values())):
            personal[client] = own
        elif has_own:
            refused[client] = "the metrics of its personal adapter are not finite: it diverged"
    line = _line("clients", "per_client", shared)
    line |= _line("personal", "personal_per_client", personal) if has_own else {}
    return line | ({"not_evaluated": refused} if refused else {})


def _line(where: str, each: str, found: Mapping[str, Metrics]) -> dict[str, Any]:
    found = {client: found[client] for client in sorted(found)}
    line: dict[str, Any] = {f"{where}/{name}": v for name, v in summarise(found).items()}
    return line | {each: {client: dict(metrics) for client, metrics in found.items()}}


def summarise(per_client: Mapping[str, Metrics]) -> Metrics:
    """Return the mean over clients and the mean of the worst tenth (at least one client)."""
    found: dict[str, float] = {}
    for name in next(iter(per_client.values()), {}):
        values = sorted(metrics[name] for metrics in per_client.values())
        if not is_better(name, 0.0, 1.0):  # higher is better: the worst come first
            values.reverse()
        tenth = values[-max(1, len(values) // 10) :]
        found[name] = sum(values) / len(values)
        found[f"{name}_worst_decile"] = sum(tenth) / len(tenth)
    return found
