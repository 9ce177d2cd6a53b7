"""What is run: one base plan for every method, under clients that come and go in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import FedPeftError
from fedpeft.plan import Plan

RATES = (1.0, 3.0, 10.0, 30.0, 100.0)
SEEDS = (0, 1, 2, 3, 4)
STEPS, BATCH = 5, 16
GROUP = 32
"""Clients in one pass. A fixed number, so that a run can be repeated to the same bits."""
LATENCY = "lognormal(median=60, sigma=0.5, devices=0.5)"
"""The simulated clock: a round takes as long as the slowest of those who take part."""


@dataclass(frozen=True, slots=True)
class Method:
    """The lines in which a method differs from the mean of those who take part."""

    name: str
    lines: Mapping[str, str]
    main: bool = False
    """Whether it is run in every setting, not in the first ones only."""


METHODS = (
    Method("mean", {"weighting": "uniform"}, main=True),
    Method("examples", {"weighting": "examples"}),
    Method("all", {"weighting": "uniform(denominator='population')"}),
    Method("fedau_50", {"weighting": "fedau(cutoff=50)"}, main=True),
    Method("fedau", {"weighting": "fedau(cutoff=None)"}, main=True),
    Method("known", {"weighting": "known"}, main=True),
    Method("mifa", {"weighting": "mifa"}, main=True),
    Method("fedvarp", {"weighting": "fedvarp"}, main=True),
    Method("fednova", {"weighting": "fednova"}),
    Method("fedprox", {"weighting": "uniform", "correction": "fedprox(mu=0.1)"}),
    Method("scaffold", {"weighting": "uniform", "correction": "scaffold"}, main=True),
    Method("scaffold_i", {"weighting": "uniform", "correction": "scaffold_i"}),
    Method("fedavg_m", {"weighting": "uniform", "correction": "fedavg_m"}),
    Method("fedavg_m_vr", {"weighting": "uniform", "correction": "fedavg_m_vr"}),
    Method("scaffold_m", {"weighting": "uniform", "correction": "scaffold_m"}, main=True),
    Method("scaffold_m_vr", {"weighting": "uniform", "correction": "scaffold_m_vr"}),
    Method("feddyn", {"weighting": "uniform", "correction": "feddyn"}),
    Method("admm", {"weighting": "uniform(denominator='population')", "correction": "admm"}),
    Method(
        "admm_robust",
        {"weighting": "uniform(denominator='population')", "correction": "admm_robust"},
    ),
    Method("fedamd", {"weighting": "uniform", "correction": "fedamd"}),
    Method("scaffold_fedau_50", {"weighting": "fedau(cutoff=50)", "correction": "scaffold"}),
)
"""A new one is one line; one that the package cannot run is shown as missing."""
BASELINE = METHODS[0]


_DEALT = {"labels": "rates by labels", "shuffled": "the same rates dealt at random"}


@dataclass(frozen=True, slots=True)
class Setting:
    """Data, how many clients, how they come and go, and where their rates are from.

    Without ``model`` everybody is always there: what is lost by absence shows beside it. ``lora``
    trains LoRA on MiniLM, not a linear probe on its features.
    """

    data: str
    clients: int
    model: str = ""
    rates: str = ""
    lora: bool = False

    @property
    def name(self) -> str:
        """Return what names the files of its pieces."""
        kind = "lora" if self.lora else ""
        return "_".join(filter(None, (kind, self.data, str(self.clients), self.model, self.rates)))

    @property
    def title(self) -> str:
        """Return what heads its table."""
        there = f"{self.model}, {_DEALT[self.rates]}" if self.model else "everybody always there"
        kind = "LoRA: " if self.lora else ""
        return f"{kind}{TITLES[self.data]}, {self.clients} clients, {there}"

    @property
    def availability(self) -> str:
        """Return the plan line."""
        if not self.model:
            return "always"
        return f"{self.model}(rates={self.rates!r}, mean=0.1, least=0.02, alpha=0.1)"


TRAINED = {False: "A linear probe on MiniLM's features", True: "LoRA on MiniLM"}
ADAPTERS = {False: "head", True: "lora(r=8, alpha=16, train='B', init='orthonormal')"}
"""B alone is trained, of the same A everywhere: what is linear in updates is so in the model."""
TITLES = {"ag_news": "AG News", "newsgroups20": "20 Newsgroups"}
LENGTHS = {"ag_news": 48, "newsgroups20": 128}
TARGETS = {"ag_news": 0.8, "newsgroups20": 0.5}
"""Test accuracy to which rounds and simulated hours are counted."""
FIRST = tuple(
    Setting(data, 250, "bernoulli", rates) for data in TITLES for rates in ("labels", "shuffled")
)
"""Settings in which all methods are run."""
ALWAYS = tuple(Setting(data, clients) for data in TITLES for clients in (250, 100))
LORA = Setting("ag_news", 100, "bernoulli", "labels", lora=True)
LORA_METHODS = ("mean", "fedau_50", "scaffold_m")
OTHERS = tuple(
    Setting(data, clients, model, "labels")
    for clients in (250, 100)
    for data in TITLES
    for model in ("bernoulli", "markov", "cyclic")
    if (clients, model) != (250, "bernoulli")
)
"""Settings in which the main methods are run."""
SETTINGS = (*FIRST[:3], *OTHERS, LORA, *FIRST[3:], *ALWAYS)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large every run is; :data:`QUICK` is there to see the whole thing work."""

    rounds: int = 500
    every: int = 25
    steps: int = STEPS
    length: int | None = None
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = SEEDS
    rows: int | None = None
    """Records of each split, where not all."""
    test: int | None = None
    """Test records, where not as many."""
    batch: int = BATCH


FULL = Scale()
FULL_LORA = Scale(440, 110, 2, 24, (0.1, 0.3, 1.0, 3.0), SEEDS[:3], test=1000, batch=4)
"""About 32,000 records trained on: 10 clients in a round, with 8 records or fewer each."""
FULL_OTHERS = Scale(rates=RATES[1:])
"""The least rate was best for no main method in any of the first settings."""
QUICK = Scale(4, 2, 1, 8, (10.0,), SEEDS[:2], 500)


def scaled(setting: Setting, scale: Scale) -> Scale:
    """Return how large the runs of a setting are where those of the linear probe are ``scale``."""
    if scale != FULL or not (setting.lora or setting in OTHERS):
        return scale
    return FULL_LORA if setting.lora else FULL_OTHERS


def methods(setting: Setting) -> tuple[Method, ...]:
    """Return the methods that are run in a setting."""
    if setting.lora:
        return tuple(m for m in METHODS if m.name in LORA_METHODS)
    if setting in FIRST:
        return METHODS
    return METHODS[:1] if setting in ALWAYS else tuple(m for m in METHODS if m.main)


def lines(setting: Setting, method: Method, scale: Scale = FULL) -> dict[str, Any]:
    """Return the plan lines of a method's runs, all but the rate in the trainer and the seed."""
    length = scale.length or LENGTHS[setting.data]
    taken = {"rows": scale.rows, "test": scale.test}
    some = "".join(f", {name}={count}" for name, count in taken.items() if count is not None)
    return {
        "model": "minilm",
        "precision": "bfloat16",
        "task": f"classify(max_length={length})",
        "data": f"simulations.participation._data:Texts(name={setting.data!r}{some})",
        "partition": "dirichlet(alpha=0.1)",
        "clients": setting.clients,
        "adapter": ADAPTERS[setting.lora],
        "trainer": f"plain(optimizer='sgd', lr=LR, schedule='linear', steps={scale.steps}, "
        f"batch={scale.batch})",
        "cohort": "everyone",
        "availability": setting.availability,
        "latency": LATENCY,
        "rounds": scale.rounds,
        "eval_every": scale.every,
        "evaluate": "clients,test",
        **method.lines,
    }


def plan_of(given: Mapping[str, Any], lr: float, seed: int) -> Plan:
    """Return the plan of one run."""
    trainer = str(given["trainer"]).replace("LR", repr(lr))
    return Plan.from_lines({**given, "trainer": trainer, "seed": seed})


def lacks(given: Mapping[str, Any]) -> str:
    """Return why the package cannot run these lines; nothing where it can."""
    try:
        plan_of(given, RATES[0], 0)
    except FedPeftError as error:
        return str(error).splitlines()[0]
    return ""
