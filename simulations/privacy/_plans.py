"""What is run: one base plan for every method and budget, of which only the adapter differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import FedPeftError
from fedpeft.plan import Plan

GRID: Mapping[float, tuple[float, float]] = {1.0: (0.03, 1.0), 2.0: (0.1, 3.0), 3.0: (0.3, 10.0)}
"""Learning rates and clips that are tried, the same for all, by the number that names them.

One step of AdamW has the norm ``rate * sqrt(values)``, so wherever more than about 1,100 values
travel the update is as long as the clip, and the rate by itself has next to no say.
"""
RECORD_GRID: Mapping[float, tuple[float, float]] = {
    11.0: (0.001, 1.0),
    12.0: (0.003, 1.0),
    13.0: (0.01, 1.0),
}
"""The same for promises to records, whose clip is that of one record's gradient."""
POINTS = {**GRID, **RECORD_GRID}
SEEDS = (0, 1, 2, 3, 4)
BUDGETS: Mapping[str, float | None] = {"8": 8.0, "none": None, "3": 3.0, "1": 1.0}
"""Epsilons, by how pieces name them, in the order in which they run; without one nothing is clipped
or noised."""
GROUP = 32
"""Clients in one pass. A fixed number, so that a run can be repeated to the same bits."""
PUBLIC = "simulations.privacy._data:Rest(records=RECORDS)"


@dataclass(frozen=True, slots=True)
class Method:
    """An adapter, by the name that the table has for it, and what adds updates up."""

    name: str
    adapter: str
    aggregator: str = "mean"


METHODS = (
    Method("lora", "lora(r=4, alpha=8.0)"),
    Method("ffa", "lora(r=4, alpha=8.0, train='B')"),
    Method("ffa_2r", "lora(r=8, alpha=16.0, train='B')"),
    Method("rolora", "lora(r=4, alpha=8.0, train='B/A')"),
    Method("dylora", "lora(r=4, alpha=8.0, ranks='1..4')"),
    Method("fed_sb", f"core(r=16, init='gradient', public={PUBLIC!r})"),
)
"""A new one is one line; one that the package cannot run is shown as missing."""
EXACT = Method("flexlora", "lora(r=4, alpha=8.0)", "flexlora")
"""The mean of products, for promises to records: one to users takes no single updates."""
BASELINE = METHODS[0]


@dataclass(frozen=True, slots=True)
class Level:
    """Whom a promise is made to, and the lines of a federation where that makes sense.

    ``promise`` is the plan's line, with ``EPSILON`` and ``CLIP`` to be filled in.
    """

    name: str
    title: str
    clients: int
    records: int
    promise: str
    lines: Mapping[str, Any]
    grid: Mapping[float, tuple[float, float]]
    methods: tuple[Method, ...] = METHODS


USERS = Level(
    "users",
    "2,000 users of 3 records, each asked with probability 0.25",
    clients=2000,
    records=6000,
    promise="user(epsilon=EPSILON, delta=1e-05, clip=CLIP, simulate_noise=true)",
    lines={
        "cohort": "poisson(rate=0.25)",
        "weighting": "uniform(denominator='expected')",
        "trainer": "plain(optimizer='adamw', lr=LR, steps=1, batch=3, "
        "schedule='linear', final=0.1)",
    },
    grid=GRID,
)
RECORDS = Level(
    "records",
    "10 clients with 600 records each, in every round",
    clients=10,
    records=6000,
    promise="record(epsilon=EPSILON, delta=1e-05, clip=CLIP, simulate_noise=true)",
    lines={
        "cohort": "everyone",
        "weighting": "uniform",
        "trainer": "plain(optimizer='adamw', lr=LR, steps=5, batch=32, "
        "schedule='linear', final=0.1)",
    },
    grid=RECORD_GRID,
    methods=(*METHODS, EXACT),
)
LEVELS = (USERS, RECORDS)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large every run is; :data:`QUICK` is there to see the whole thing work."""

    rounds: int = 20
    length: int = 24
    places: tuple[int, ...] = (0, 1, 2)
    """Which points of a level's grid are tried."""
    seeds: tuple[int, ...] = SEEDS
    clients: int | None = None
    """How many there are, where not as many as the level has."""
    scored: int | None = None
    """Rows that are scored, where not all."""


FULL = Scale()
QUICK = Scale(2, 12, (2,), SEEDS[:2], 60, 40)


def lines(level: Level, method: Method, budget: str, scale: Scale = FULL) -> dict[str, Any]:
    """Return the plan lines of a method's runs, all but rate, clip and seed."""
    clients = min(scale.clients or level.clients, level.clients)
    records = level.records * clients // level.clients
    some = "" if scale.scored is None else f", some={scale.scored}"
    epsilon = BUDGETS[budget]
    promise = "none" if epsilon is None else level.promise.replace("EPSILON", repr(epsilon))
    return {
        "model": "minilm",
        "precision": "bfloat16",
        "task": f"classify(max_length={scale.length})",
        "data": f"simulations.privacy._data:Users(records={records}{some})",
        "partition": "iid",
        "clients": clients,
        "holdout": 0.0,
        "adapter": method.adapter.replace("RECORDS", str(records)),
        "privacy": promise,
        "aggregator": method.aggregator,
        "optimizer": "sgd",
        "rounds": scale.rounds,
        "eval_every": scale.rounds,
        "evaluate": "test",
        **level.lines,
    }


def plan_of(given: Mapping[str, Any], point: float, seed: int) -> Plan:
    """Return the plan of one run at one of :data:`POINTS`."""
    rate, clip = POINTS[point]
    filled = {"trainer": str(given["trainer"]).replace("LR", repr(rate))}
    filled["privacy"] = str(given["privacy"]).replace("CLIP", repr(clip))
    return Plan.from_lines({**given, **filled, "seed": seed})


def points(level: Level, budget: str, scale: Scale) -> tuple[float, ...]:
    """Return what is tried: where nothing is clipped, each rate once."""
    tried = tuple(sorted(level.grid)[place] for place in scale.places)
    if BUDGETS[budget] is not None:
        return tried
    first = {level.grid[point][0]: point for point in reversed(tried)}
    return tuple(sorted(first.values()))


def lacks(given: Mapping[str, Any]) -> str:
    """Return why the package cannot run these lines; nothing where it can."""
    try:
        plan_of(given, next(iter(GRID)), 0)
    except FedPeftError as error:
        return str(error).splitlines()[0]
    return ""
