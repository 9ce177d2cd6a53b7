"""What a federated adapter is compared with: nothing, each client alone, and pooled data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.client_rounds import ALONE
from fedpeft.evaluation import EACH_ALONE, evaluated_clients, summarise
from fedpeft.grouping import Grouping
from fedpeft.local_models import Start, train_all
from fedpeft.plan import Plan
from fedpeft.rng import derive_seed
from fedpeft.site import Site
from fedpeft.tensors import padded
from fedpeft.types import Example, Metrics, Tensors

if TYPE_CHECKING:
    from fedpeft.engine._base import Engine

Rows = Mapping[str, Any]
Tell = Callable[[str, int, int], None]


def compare(
    plan: Plan,
    site: Site,
    engine: Engine,
    history: Sequence[Mapping[str, Any]],
    federated: Tensors,
    done: Rows,
    keep: Callable[[Rows], None] | None,
    tell: Tell,
) -> Rows:
    """Return the metrics on the test set of the rows that ``plan.compare`` asks for.

    ``alone`` is the mean over clients, each trained on its own records, with as much of the adapter
    as it has, in passes that they share as ``engine`` says; ``central`` is trained on all records.
    Both see as many records as the federation did: in all (``central``), or per client (``alone``).
    Beside ``alone`` is ``EACH_ALONE``, where clients have held records out. ``done`` holds rows of
    an interrupted run; ``keep`` is told after each new row.
    """
    examples = site.test()
    if not examples or not plan.comparisons:
        return {}
    seen = sum(int(line.get("seen", 0)) for line in history)
    clients = len(site.federation.train)
    makers: dict[str, Callable[[], Rows]] = {
        "base": lambda: {"base": _score(site, site.initial)},
        "alone": lambda: _alone(plan, site, engine, max(1, seen // clients), tell),
        "federated": lambda: {"federated": _score(site, federated)},
        "central": lambda: {"central": _central(plan, site, max(1, seen), tell)},
    }
    rows = dict(done)
    for name in ("base", "alone", "federated", "central"):
        if name in rows or not (name == "federated" or name in plan.comparisons):
            continue
        rows |= makers[name]()
        if keep:
            keep(rows)
    return rows


def _alone(plan: Plan, site: Site, engine: Engine, seen: int, tell: Tell) -> Rows:
    names = evaluated_clients(plan, list(site.federation.train))
    found, own = list[Metrics](), dict[str, Metrics]()

    def play(part: Sequence[str], grouping: Grouping) -> Sequence[Metrics]:
        begun, most = len(found) * seen, len(part) * seen
        trained = train(
            plan,
            site,
            [site.train(client) for client in part],
            [site.tables.of(client).part(site.initial) for client in part],
            seen,
            [("alone", client) for client in part],
            lambda n: tell("alone", begun + min(n, most), len(names) * seen),
            grouping,
        )
        held = {client: site.held(client) for client in part}
        having = [(c, tensors) for c, tensors in zip(part, trained, strict=True) if held[c]]
        if having:
            asked, each = zip(*having, strict=True)
            scores = site.learner.evaluate(each, [held[c] for c in asked], grouping.width)
            own.update(zip(asked, scores, strict=True))
        return site.learner.evaluate(trained, [site.test()] * len(part), grouping.width)

    for metrics in engine.share(names, play):
        found += metrics
    rows: dict[str, Any] = {"alone": summarise(dict(zip(names, found, strict=True)))}
    return rows | ({EACH_ALONE: {c: dict(own[c]) for c in sorted(own)}} if own else {})


def _central(plan: Plan, site: Site, seen: int, tell: Tell) -> Metrics:
    pooled = [example for client in site.federation.train for example in site.train(client)]
    (tensors,) = train(
        plan,
        site,
        [pooled],
        [site.initial],
        seen,
        [("central",)],
        lambda n: tell("central", n, seen),
    )
    return _score(site, tensors)


def _score(site: Site, tensors: Tensors) -> Metrics:
    return site.learner.evaluate([tensors], [site.test()])[0]


def train(
    plan: Plan,
    site: Site,
    each: Sequence[Sequence[Example]],
    starts: Sequence[Tensors],
    seen: int,
    names: Sequence[tuple[str, ...]],
    tell: Callable[[int], None],
    grouping: Grouping = ALONE,
) -> list[Tensors]:
    """Train K models, each from its start on its own records until it has seen ``seen`` of them.

    Seeds are derived from ``names``; ``tell`` is told how many records all have seen so far.
    """
    total = 0

    def on_step(records: int) -> None:
        nonlocal total
        total += records
        tell(total)

    begun = [
        Start(start, examples, derive_seed(plan.seed, *name))
        for start, examples, name in zip(starts, each, names, strict=True)
    ]
    trainer = plan.trainer.seeing(seen)
    trained = train_all(plan, site, trainer, begun, grouping=grouping, on_step=on_step)
    return padded(trained, site.tables.shapes)
