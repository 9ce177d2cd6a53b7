"""What a promise to clients adds to a round: clip, sum, noise and accounting, as shares of it.

Whole rounds of MiniLM are played in this process on one thread; what belongs to the promise is
timed where it is done, in the same run, and set against the CPU time of the round. A client clips
its update; the server clips again, adds up on a grid and adds noise (``release``); coins are drawn,
and the round is accounted for. The sum of the updates is counted, too, though a round without a
promise has its own. Medians over rounds; what the first round takes longer, mostly to import the
accountants and to work out one round's privacy losses, is told apart.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

from fedpeft.driver import simulate
from fedpeft.plan import Plan
from fedpeft.privacy._mechanism import Mechanism
from fedpeft.types import Shapes, Update
from fedpeft.watching import Line, Quiet
from simulations.benchmarks import _record_steps, _report

GOAL = 0.02
LINES = {
    "model": "minilm",
    "task": "classify(max_length=64)",
    "data": 'embedded(name="support")',
    "partition": "iid",
    "clients": 64,
    "holdout": 0.0,
    "adapter": "lora(r=8, alpha=16)",
    "trainer": 'plain(optimizer="sgd", lr=0.05, steps=4, batch=4)',
    "weighting": 'uniform(denominator="expected")',
    "privacy": "user(noise_multiplier=1.0, clip=0.5, simulate_noise=true)",
    "evaluate": "none",
    "eval_every": 1000,
}
COHORTS = ("poisson(rate=0.25)", "poisson(rate=0.25, cap=20)", "uniform(size=16)")
PLACES = ("clip", "release", "coins", "accounting")
CALLS = (
    ("client_rounds", "_clipped", "clip"),
    ("rounds", "drawn", "coins"),
    ("one_round", "chooser", "coins"),
    ("one_round", "spent", "accounting"),
)
"""Module, function, and what its time counts as."""


@dataclass
class Clock(Quiet):
    """CPU seconds of each round, and of what in it belongs to the promise."""

    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    rounds: list[dict[str, float]] = field(default_factory=list)
    _at: float = 0.0

    def begin(self, plan: Plan, round: int) -> None:
        """Start to count."""
        self._at = time.process_time()

    def round(self, line: Line) -> None:
        """Take down a round."""
        now = time.process_time()
        self.rounds.append({"round": now - self._at, "asked": line["asked"], **self.spent})
        self.spent.clear()
        self._at = now

    def timed(self, place: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``work``, whose time counts as that of ``place``."""

        def run(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return work(*given, **named)
            finally:
                self.spent[place] += time.process_time() - began

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time what belongs to the promise, wherever it is called."""
        release = self.timed("release", Mechanism.release)

        def released(
            own: Mechanism, updates: Iterator[Update], shapes: Shapes, clip: float, key: bytes
        ) -> Any:
            held = list(updates)  # decoding and training are the round's, with a promise or without
            return release(own, held, shapes, clip, key)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(Mechanism, "release", released))
            for module, name, place in CALLS:
                owner = import_module(f"fedpeft.{module}")
                work = self.timed(place, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, work))
            yield


def measure(quick: bool) -> dict[str, Any]:
    """Return a row for each way to draw cohorts, and one of a step for each model."""
    import torch

    torch.set_num_threads(1)
    count, cohorts = (3, COHORTS[:1]) if quick else (6, COHORTS)
    rows = [user_level(cohort, count) for cohort in cohorts] + _record_steps.measure(quick)
    return {"rows": rows, "goals": {"user": GOAL, "record": _record_steps.GOAL}}


def user_level(cohort: str, count: int) -> dict[str, Any]:
    """Return milliseconds of a round and of what a promise to clients takes of it."""
    clock = Clock()
    plan = Plan.from_lines({**LINES, "cohort": cohort, "rounds": count})
    with clock.watching():
        simulate(plan, watch=clock, engine="inline(group=4)")
    shares = [sum(line.get(p, 0.0) for p in PLACES) / line["round"] for line in clock.rounds]

    def middle(name: str) -> float:
        return round(1e3 * statistics.median(line.get(name, 0.0) for line in clock.rounds[1:]), 2)

    return {
        "promise": "user",
        "cohort": cohort,
        "asked": statistics.median(line["asked"] for line in clock.rounds[1:]),
        "round_ms": middle("round"),
        **{f"{place}_ms": middle(place) for place in PLACES},
        "share": round(statistics.median(shares[1:]), 4),
        "first_accounting_ms": round(1e3 * clock.rounds[0].get("accounting", 0.0), 1),
    }


if __name__ == "__main__":
    _report.main("privacy", measure)
