"""What a federated adapter is compared with: nothing, each client alone, and pooled data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedpeft.evaluation import evaluated_clients, summarise
from fedpeft.plan import Plan
from fedpeft.rng import derive_seed
from fedpeft.site import Site
from fedpeft.types import Example, Job, Metrics, Tensors

Rows = Mapping[str, Metrics]
Tell = Callable[[str, int, int], None]


def compare(
    plan: Plan,
    site: Site,
    history: Sequence[Mapping[str, Any]],
    federated: Tensors,
    done: Rows,
    keep: Callable[[Rows], None] | None,
    tell: Tell,
) -> Rows:
    """Return the metrics on the test set of the rows that ``plan.compare`` asks for.

    ``alone`` is the mean over clients, each trained on its own records; ``central`` is trained on
    all records. Both see as many records as the federation did: in all (``central``), or per client
    (``alone``). ``done`` holds rows of an interrupted run; ``keep`` is told after each new row.
    """
    examples = site.test()
    if not examples or not plan.comparisons:
        return {}
    seen = sum(int(line.get("seen", 0)) for line in history)
    clients = len(site.federation.train)
    makers: dict[str, Callable[[], Metrics]] = {
        "base": lambda: _score(site, site.initial),
        "alone": lambda: _alone(plan, site, max(1, seen // clients), tell),
        "central": lambda: _central(plan, site, max(1, seen), tell),
    }
    rows = dict(done)
    for name in ("base", "alone", "federated", "central"):
        if name in rows or not (name == "federated" or name in plan.comparisons):
            continue
        if name == "federated":
            rows[name] = _score(site, federated)
        else:
            rows[name] = makers[name]()
        if keep:
            keep(rows)
    return rows


def _alone(plan: Plan, site: Site, seen: int, tell: Tell) -> Metrics:
    names = evaluated_clients(plan, list(site.federation.train))
    found = {}
    for i, client in enumerate(names):
        tensors = _train(
            plan,
            site,
            site.train(client),
            seen,
            ("alone", client),
            lambda n, i=i: tell("alone", i * seen + n, len(names) * seen),  # type: ignore[misc]
        )
        found[client] = _score(site, tensors)
    return summarise(found)


def _central(plan: Plan, site: Site, seen: int, tell: Tell) -> Metrics:
    pooled = [example for client in site.federation.train for example in site.train(client)]
    tensors = _train(plan, site, pooled, seen, ("central",), lambda n: tell("central", n, seen))
    return _score(site, tensors)


def _score(site: Site, tensors: Tensors) -> Metrics:
    return site.learner.evaluate([tensors], [site.test()])[0]


def _train(
    plan: Plan,
    site: Site,
    examples: Sequence[Example],
    seen: int,
    names: tuple[str, ...],
    tell: Callable[[int], None],
) -> Tensors:
    from fedpeft.stacking import stack, unstack

    roles = site.tables.roles(0)
    stacked = stack([site.initial], site.learner.device)
    total = 0

    def on_step(records: int) -> None:
        nonlocal total
        total += records
        tell(total)

    fit = plan.trainer.seeing(seen).fit(
        Job(
            learner=site.learner,
            params={k: v for k, v in stacked.items() if k in roles.train},
            fixed={k: v for k, v in stacked.items() if k not in roles.train},
            examples=[examples],
            seeds=[derive_seed(plan.seed, *names)],
            adjust=lambda grads, params: grads,
            on_step=on_step,
        )
    )
    return {**site.initial, **unstack(fit.params)[0]}
