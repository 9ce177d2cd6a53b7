"""What is run: one plan for each setting, of which only the lines about lateness differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.plan import Plan
from simulations.lateness._data import RARE

RESULTS = Path(__file__).parent / "results"
COHORT, WORKING = 10, 20
"""Replies of a round, and clients at work at any time where rounds overlap."""
GROUP = 5
"""Clients in one pass. A fixed number, so that a run can be repeated to the same bits."""

_BUFFER = f"size={COHORT}, concurrency={WORKING}, max_staleness=None"
"""What all buffers have in common."""

METHODS: Mapping[str, Mapping[str, str]] = {
    "sync": {"schedule": "sync", "cohort": f"uniform(size={COHORT})"},
    "sync_deadline": {
        "schedule": "sync(deadline=180, minimum=2)",
        "cohort": f"uniform(size={COHORT})",
    },
    "sync_over": {"schedule": "sync(over=1.3)", "cohort": f"uniform(size={COHORT})"},
    "fedbuff_constant": {"schedule": "law='constant'"},
    "fedbuff": {"schedule": "law='polynomial'"},
    "fedbuff_exponential": {"schedule": "law='exponential'"},
    "fedbuff_compensated": {"schedule": "law='constant', compensation=0.04"},
    "fedbuff_compensated_2": {"schedule": "law='constant', compensation=2.0"},
    "fedbuff_inverted": {
        "schedule": f"inversion(buffered({_BUFFER}, law='constant'), beyond=2, iterations=100, "
        "scale=0.07)"
    },
}
"""Name to plan lines; a schedule without a name is one of a buffer."""

LATENCY = "lognormal(median=60, sigma=0.5, slow=0.3, factor=10, stragglers='rarest')"
"""The 30 % of the clients that hold most of the rarest label take ten times as long."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, by which plan lines; ``LR`` stands for the rate in them."""

    name: str
    title: str
    lines: Mapping[str, Any]
    quick: Mapping[str, Any]
    """What a quick look does otherwise."""
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


def _task(length: int) -> str:
    return f"simulations.lateness._task:Finding(place={RARE}, max_length={length})"


_HEAD: Mapping[str, Any] = {
    "model": "minilm",
    "precision": "bfloat16",
    "task": _task(48),
    "data": "simulations.lateness._data:Thinned(keep=0.25)",
    "partition": "dirichlet(alpha=0.1)",
    "clients": 100,
    "adapter": "head",
    "trainer": "plain(optimizer='sgd', lr=LR, steps=5, batch=16)",
    "weighting": "uniform",
    "rounds": 500,
    "eval_every": 10,
    "latency": LATENCY,
}
_QUICK: Mapping[str, Any] = {
    "task": _task(8),
    "data": "simulations.lateness._data:Thinned(keep=0.25, rows=1000)",
    "rounds": 4,
    "eval_every": 2,
}
_RATES, _SEEDS = (1.0, 3.0, 10.0, 30.0, 100.0), (0, 1, 2, 3, 4)

SETTINGS = (
    Setting("head", "The slow clients hold the rare label", _HEAD, _QUICK, _RATES, _SEEDS),
    Setting(
        "drawn",
        "As many slow clients, drawn at random",
        {**_HEAD, "latency": LATENCY.replace("'rarest'", "'drawn'")},
        _QUICK,
        _RATES,
        _SEEDS,
    ),
)
"""A new one is one entry."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A method in a setting, with all its rounds or so few that one sees it work."""

    setting: Setting
    method: str
    quick: bool = False

    def __hash__(self) -> int:
        """Return that of the names: a setting's lines have none."""
        return hash((self.name, self.quick))

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        return f"{self.setting.name}_{self.method}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return its plan lines."""
        lines = dict(METHODS[self.method])
        if "(" not in lines["schedule"] and lines["schedule"] != "sync":
            lines["schedule"] = f"buffered({_BUFFER}, {lines['schedule']})"
        return {**self.setting.lines, **(self.setting.quick if self.quick else {}), **lines}

    @property
    def lacks(self) -> str:
        """Nothing: the package has it all."""
        return ""

    @property
    def rates(self) -> tuple[float, ...]:
        """Return those that are tried on the first seed, the same for every method."""
        return self.setting.rates[-2:-1] if self.quick else self.setting.rates

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of the best rate."""
        return self.setting.seeds[:2] if self.quick else self.setting.seeds

    @property
    def chooser(self) -> Piece:
        """Return itself: each method has its own rate."""
        return self

    @property
    def stage(self) -> int:
        """Return 0: none waits for another."""
        return 0


def pieces(quick: bool = False) -> list[Piece]:
    """Return all pieces in the order in which they run."""
    return [Piece(setting, method, quick) for setting in SETTINGS for method in METHODS]


def plan_of(given: Mapping[str, Any], lr: float, seed: int) -> Plan:
    """Return the plan of one run."""
    trainer = str(given["trainer"]).replace("LR", repr(lr))
    return Plan.from_lines({**given, "trainer": trainer, "seed": seed})
