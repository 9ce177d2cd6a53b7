"""What is run: one base plan for every method, of which only the preset's own lines differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.plan import Plan
from fedpeft.spec import build, describe, find, names

RATES = (0.003, 0.01, 0.03)
SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)
"""Those of a contrast."""
CLIENTS: Mapping[int, str] = {50: "uniform(size=10)", 3: "everyone"}
"""Clients, and who is asked in a round."""
STEPS, BATCH = 2, 8
WORK = f"batch={BATCH}, schedule='linear', final=0.05"
"""At a constant rate the last round decides: the same method ended between 52 and 85 %, by seed."""
SHARED: Mapping[str, Any] = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": "attention"}
"""Fields that every preset gets which has them."""
CENTRAL = "central"
GROUP = 5
"""Clients in one pass. A fixed number, so that a run can be repeated to the same bits."""


@dataclass(frozen=True, slots=True)
class Method:
    """A preset and its fields: :data:`SHARED` but for those it ``keeps``, then ``fields``."""

    name: str
    preset: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()


METHODS = (
    *(
        Method(name, name)
        for name in (
            *("fedit", "ffa_lora", "rolora", "lora_fair", "fedsvd", "flexlora"),
            *("fedrot_lora", "fedsa_lora", "hetlora", "raflora"),
        )
    ),
    # what these send has r x r entries a module: rank 4 would leave them next to nothing
    Method("fed_sb", "fed_sb", keeps=("r",)),
    Method("lora_xs", "lora_xs", keeps=("r", "alpha")),
    Method("ravan", "ravan", keeps=("r",)),
    *(Method(name, name) for name in ("flora", "florist", "fedex_lora", "fedask")),
)
"""The table's rows; one whose preset the package lacks is shown as missing."""
VARIANTS = (
    Method("lora_fair_lam0", "lora_fair", {"lam": 0.0}),
    Method("ffa_orthonormal", "ffa_lora", {"init": "orthonormal"}),
)
"""Run for a contrast only."""
KNOWN: Mapping[str, Method] = {m.name: m for m in (*METHODS, *VARIANTS)}


@dataclass(frozen=True, slots=True)
class Scale:
    """How large every run is; :data:`QUICK` is there to see the whole thing work."""

    rounds: int = 40
    steps: int = STEPS
    test_rows: int = 2000
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = SEEDS
    more_seeds: tuple[int, ...] = MORE_SEEDS


FULL = Scale()
QUICK = Scale(1, 1, 40, RATES[:1], SEEDS[:2], SEEDS[:2])


def available(name: str) -> bool:
    """Tell whether the package has what the method needs."""
    return name == CENTRAL or KNOWN[name].preset in names("presets")


def lines(name: str, clients: int, scale: Scale = FULL) -> dict[str, Any]:
    """Return the plan lines of a method's runs, all but the rate in the trainer and the seed.

    The trainer and who is asked are the same for all, whatever the preset's paper did.
    """
    base = {
        "model": "minilm",
        "precision": "bfloat16",
        "task": "classify(max_length=48)",
        "data": f"simulations.lora_methods._data:AgNews(test_rows={scale.test_rows})",
        "partition": "dirichlet(alpha=0.1)",
        "clients": clients,
        "cohort": CLIENTS[clients],
        "rounds": scale.rounds,
        "eval_every": scale.rounds,
        "evaluate": "clients,test",
        "trainer": f"plain(optimizer='adamw', lr=LR, steps={scale.steps}, {WORK})",
    }
    if name == CENTRAL:
        return {**base, **_preset_lines(KNOWN["fedit"]), **_central(clients, scale)}
    same = {line: base[line] for line in ("trainer", "cohort")}
    return {**base, **_preset_lines(KNOWN[name]), **same}


def plan_of(given: Mapping[str, Any], lr: float, seed: int) -> Plan:
    """Return the plan of one run."""
    trainer = str(given["trainer"]).replace("LR", repr(lr))
    return Plan.from_lines({**given, "trainer": trainer, "seed": seed})


def _preset_lines(method: Method) -> dict[str, Any]:
    """Return the preset's lines; a head that its paper's code leaves frozen is averaged."""
    known = {f.name for f in dataclasses.fields(find("presets", method.preset))}
    shared = {k: v for k, v in SHARED.items() if k in known and k not in method.keeps}
    given = {**shared, **method.fields}
    text = ", ".join(f"{k}={v!r}" for k, v in given.items())
    found = dict(build("presets", f"{method.preset}({text})").lines())
    adapter = build("adapters", found["adapter"])
    if getattr(adapter, "head", None) == "frozen":
        found["adapter"] = describe(dataclasses.replace(adapter, head="average"))
    return found


def _central(clients: int, scale: Scale) -> dict[str, Any]:
    """Return the lines of one client that has all records and sees as many as the federation."""
    cohort = build("cohorts", CLIENTS[clients]).expected(clients)
    records = int(scale.rounds * cohort * scale.steps * BATCH)
    return {
        "partition": "iid",
        "clients": 1,
        "cohort": "everyone",
        "rounds": 1,
        "eval_every": 1,
        "trainer": f"plain(optimizer='adamw', lr=LR, records={records}, {WORK})",
    }
